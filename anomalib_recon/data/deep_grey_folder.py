# SPDX-License-Identifier: Apache-2.0

r"""Folders of images with more than 8 bits of grey, such as PNG and TIFF files with 16 bits.

anomalib reads every image as RGB with 8 bits, and clips what is above 255. The datamodule and the dataset here scale
the values between a black and a white level to [0, 1], in floating point, so no level between them is lost. Models
see three equal channels, as anomalib asks for three.

Example:
    >>> from anomalib_recon.data import DeepGreyFolder
    >>> datamodule = DeepGreyFolder(
    ...     name="casting",
    ...     root="datasets/casting",
    ...     normal_dir="good",
    ...     abnormal_dir="defective",
    ...     black_level=20000,
    ...     white_level=24000,
    ... )

    On the command line::

        anomalib train --model InTra --data DeepGreyFolder --data.name casting --data.root datasets/casting \
            --data.normal_dir good --data.abnormal_dir defective --data.black_level 20000 --data.white_level 24000
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data import Folder, ImageItem, PredictDataset
from anomalib.data.utils import TestSplitMode, ValSplitMode
from torchvision.transforms.v2 import Transform
from torchvision.tv_tensors import Image

from anomalib_recon.deploy import GreyLevels, read_image

from .sample_dataset import SampleDataset


class DeepGreyDataset(SampleDataset):
    """Images with more than 8 bits of grey, as three equal channels in [0, 1], and their masks.

    Args:
        name (str): Name of the dataset.
        samples (pd.DataFrame): Samples as those of anomalib's ``FolderDataset``.
        levels (GreyLevels): Values in the files that become 0 and 1.
    """

    def __init__(self, name: str, samples: pd.DataFrame, levels: GreyLevels) -> None:
        super().__init__(name, samples)
        self.levels = levels

    def read_image(self, path: str) -> Image:
        """Read an image of shape ``(3, H, W)`` with values in [0, 1]."""
        return _read(path, self.levels)


class DeepGreyFolder(Folder):
    """anomalib's ``Folder`` for images with more than 8 bits of grey.

    It reads PNG and TIFF files with 16 bits of grey, and those with 32 bits or in floating point. Values are those in
    the files, whatever the number of bits. Images with 8 bits and images in colour are refused: for them, there is
    ``Folder``. Masks are read as in ``Folder``; they may have 8 bits.

    Args:
        name (str): Name of the dataset, for the results.
        normal_dir (str | Path | Sequence[str | Path]): Folder or folders of normal images.
        black_level (float): Value in the files that becomes 0. What is darker becomes 0, too.
            Defaults to ``0``.
        white_level (float): Value in the files that becomes 1. What is brighter becomes 1, too.
            Defaults to ``65535``.
        **kwargs (Any): The other arguments of ``Folder``.

    Raises:
        ValueError: If ``white_level`` is not above ``black_level``, or a split is to be made of synthetic anomalies,
            which anomalib draws on images with 8 bits.
    """

    def __init__(
        self,
        name: str,
        normal_dir: str | Path | Sequence[str | Path],
        black_level: float = 0,
        white_level: float = 65535,
        **kwargs: Any,
    ) -> None:
        super().__init__(name, normal_dir, **kwargs)
        self.levels = GreyLevels(black_level, white_level)
        for argument, mode, others in (
            ("test_split_mode", self.test_split_mode, (TestSplitMode.FROM_DIR, TestSplitMode.NONE)),
            ("val_split_mode", self.val_split_mode, (ValSplitMode.FROM_TEST, ValSplitMode.FROM_TRAIN)),
        ):
            if mode.value == "synthetic":
                msg = (
                    f"{argument}=synthetic makes anomalies of images with 8 bits; choose {others[0].value} or "
                    f"{others[1].value}."
                )
                raise ValueError(msg)

    def _setup(self, _stage: str | None = None) -> None:
        """Find the images as ``Folder`` does, and read them by their levels."""
        super()._setup(_stage)
        self.train_data, self.test_data = (
            DeepGreyDataset(self.name, dataset.samples, self.levels) for dataset in (self.train_data, self.test_data)
        )


class DeepGreyPredictDataset(PredictDataset):
    """anomalib's ``PredictDataset`` for images with more than 8 bits of grey.

    Args:
        path (str | Path): An image, or a folder of images.
        black_level (float): That of the training.
            Defaults to ``0``.
        white_level (float): That of the training.
            Defaults to ``65535``.
        transform (Transform | None): Transform of the images.
            Defaults to ``None``.

    Raises:
        ValueError: If ``white_level`` is not above ``black_level``.

    Example:
        >>> from anomalib_recon.data import DeepGreyPredictDataset
        >>> images = DeepGreyPredictDataset("IMAGES", 20000, 24000)  # doctest: +SKIP
        >>> engine.predict(model, dataset=images)  # doctest: +SKIP
    """

    def __init__(
        self,
        path: str | Path,
        black_level: float = 0,
        white_level: float = 65535,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(path, transform)
        self.levels = GreyLevels(black_level, white_level)

    def __getitem__(self, index: int) -> ImageItem:
        """Load an image."""
        path = self.image_filenames[index]
        image = _read(path, self.levels)
        return ImageItem(image=self.transform(image) if self.transform else image, image_path=str(path))


def _read(path: str | Path, levels: GreyLevels) -> Image:
    return Image(torch.from_numpy(read_image(path, levels)))
