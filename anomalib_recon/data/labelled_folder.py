# SPDX-License-Identifier: Apache-2.0

r"""A folder of images with labelled anomalies among the training images.

anomalib's own datamodules train on normal images alone. Models that learn from known defects as well, such as ADTR+,
get them here.

Example:
    >>> from anomalib_recon.data import LabelledFolder
    >>> datamodule = LabelledFolder(
    ...     name="screw",
    ...     root="datasets/MVTecAD/screw",
    ...     normal_dir="train/good",
    ...     normal_test_dir="test/good",
    ...     abnormal_dir=["test/scratch_head", "test/thread_top"],
    ...     mask_dir=["ground_truth/scratch_head", "ground_truth/thread_top"],
    ...     train_abnormal_dir="test/scratch_head",
    ...     train_mask_dir="ground_truth/scratch_head",
    ...     num_train_abnormal=5,
    ... )

    On the command line::

        anomalib train --model ADTR --data LabelledFolder --data.name screw --data.root datasets/MVTecAD/screw \
            --data.normal_dir train/good --data.normal_test_dir test/good \
            --data.abnormal_dir "[test/scratch_head, test/thread_top]" \
            --data.mask_dir "[ground_truth/scratch_head, ground_truth/thread_top]" \
            --data.train_abnormal_dir test/scratch_head --data.train_mask_dir ground_truth/scratch_head \
            --data.num_train_abnormal 5
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import Folder
from anomalib.data.utils import LabelName, Split
from anomalib.data.utils.path import DirType, resolve_path
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.tv_tensors import Mask

from .sample_dataset import SampleDataset

Folders = str | Path | Sequence[str | Path]

# what the column `label` of the samples says of an image that is anomalous everywhere
IRRELEVANT = "irrelevant"


def draw(total: int, count: int, seed: int | None) -> list[int]:
    """Draw ``count`` of ``total`` indices; in order, the same ones for the same seed, of which ``None`` is 0."""
    generator = torch.Generator().manual_seed(seed or 0)
    return sorted(torch.randperm(total, generator=generator)[:count].tolist())


class LabelledFolderDataset(SampleDataset):
    """Images to train on, normal and anomalous.

    If every anomaly has a mask, or is irrelevant, the task is segmentation: ``gt_mask`` is zero for normal images, the
    mask for defects, one for irrelevant images. Otherwise the task is classification and no image has a ``gt_mask``,
    for a defect of unknown extent is neither all anomalous nor all normal.

    Args:
        name (str): Name of the dataset.
        samples (pd.DataFrame): Samples as those of anomalib's ``FolderDataset``. Irrelevant images have the label
            ``"irrelevant"``.
    """

    def __init__(self, name: str, samples: pd.DataFrame) -> None:
        super().__init__(name, samples)
        unmasked = (samples.label == DirType.ABNORMAL.value) & (samples.mask_path == "")
        self.samples.attrs["task"] = (TaskType.CLASSIFICATION if unmasked.any() else TaskType.SEGMENTATION).value

    def read_mask(self, sample: pd.Series, size: tuple[int, ...]) -> Mask:
        """Read the mask of a defect, or make one for a normal or an irrelevant image."""
        if sample.label == IRRELEVANT:
            return Mask(torch.ones(size, dtype=torch.uint8))
        return super().read_mask(sample, size)


class LabelledFolder(Folder):
    """anomalib's ``Folder`` with labelled anomalies in the training set.

    Two kinds of anomalies can be added: defects, with or without masks, and irrelevant images, which are anomalous
    everywhere. They join the training set after the test and validation sets have been split off, which therefore
    hold what ``Folder`` would put there, but no image that is trained on. All folders may be relative to ``root`` and
    are searched recursively.

    Batches of the training set have ``gt_label`` 0 or 1. They also have a ``gt_mask`` unless ``train_abnormal_dir`` is
    given without ``train_mask_dir``; the task of ``train_data`` is classification then (see
    :class:`LabelledFolderDataset`), and a model whose loss needs masks can refuse it. A model that ignores labels, as
    anomalib's own do, would take the anomalies for normal.

    Args:
        name (str): Name of the dataset, for the results.
        normal_dir (Folders): Folder or folders of normal images.
        extensions (tuple[str, ...] | None): File extensions of images.
            Defaults to ``None``, which means torchvision's.
        train_abnormal_dir (Folders | None): Folder or folders of defects to train on; may overlap ``abnormal_dir``.
            Defaults to ``None``.
        train_mask_dir (Folders | None): One folder of masks for each of ``train_abnormal_dir``, in the same order. The
            mask of ``a/000.png`` is ``a/000.png`` or ``a/000_mask.png`` there, with any extension and of any size.
            Defaults to ``None``.
        num_train_abnormal (int | None): Number of defects to draw.
            Defaults to ``None``, which means all.
        irrelevant_dir (Folders | None): Folder or folders of irrelevant images.
            Defaults to ``None``.
        num_irrelevant (int | None): Number of irrelevant images to draw.
            Defaults to ``None``, which means all.
        **kwargs (Any): The other arguments of ``Folder``. Draws take its ``seed``, and 0 if that is ``None``, as a
            later test must leave out the same defects.

    Raises:
        ValueError: If a number is less than 1, or an argument lacks the folder that it is about. From ``setup``: if a
            folder holds no image, too few, or an image of another one; if a defect lacks its mask; if no test image of
            ``abnormal_dir`` is left.
        FileNotFoundError: From ``setup``, if a folder does not exist.
    """

    def __init__(
        self,
        name: str,
        normal_dir: Folders,
        extensions: tuple[str, ...] | None = None,
        train_abnormal_dir: Folders | None = None,
        train_mask_dir: Folders | None = None,
        num_train_abnormal: int | None = None,
        irrelevant_dir: Folders | None = None,
        num_irrelevant: int | None = None,
        **kwargs: Any,
    ) -> None:
        for argument, value, folder_argument, folder in (
            ("train_mask_dir", train_mask_dir, "train_abnormal_dir", train_abnormal_dir),
            ("num_train_abnormal", num_train_abnormal, "train_abnormal_dir", train_abnormal_dir),
            ("num_irrelevant", num_irrelevant, "irrelevant_dir", irrelevant_dir),
        ):
            if value is not None and folder is None:
                msg = f"{argument}={value} is given without {folder_argument}: name the folder of the images."
                raise ValueError(msg)
            if isinstance(value, int) and value < 1:
                msg = f"{argument}={value} is less than 1: leave it out to train on all images of {folder_argument}."
                raise ValueError(msg)
        # Folder hands extensions on as a tuple of any length
        super().__init__(name, normal_dir, extensions=extensions, **kwargs)  # type: ignore[arg-type]
        self.train_abnormal_dir = train_abnormal_dir
        self.train_mask_dir = train_mask_dir
        self.num_train_abnormal = num_train_abnormal
        self.irrelevant_dir = irrelevant_dir
        self.num_irrelevant = num_irrelevant

    def _setup(self, _stage: str | None = None) -> None:
        """Find the images of all folders, and leave out of the test set those to train on."""
        defects, irrelevant = self._find_defects(), self._find_irrelevant()
        super()._setup(_stage)
        self._check_roles(defects, irrelevant)
        defects = self._draw("num_train_abnormal", self.num_train_abnormal, defects)
        irrelevant = self._draw("num_irrelevant", self.num_irrelevant, irrelevant)
        self._anomalies = pd.concat([defects, irrelevant])
        self._remove_from_test_set(defects)

    def _create_val_split(self) -> None:
        """Make the validation set as ``Folder`` does, then let the anomalies join the training set."""
        super()._create_val_split()
        if not self._anomalies.empty:
            samples = pd.concat([self.train_data.samples, self._anomalies])
            self.train_data = LabelledFolderDataset(self.name, samples)

    def _find_defects(self) -> pd.DataFrame:
        folders, mask_folders = _as_list(self.train_abnormal_dir), _as_list(self.train_mask_dir)
        if mask_folders and len(mask_folders) != len(folders):
            msg = (
                f"train_mask_dir names {len(mask_folders)} folders and train_abnormal_dir {len(folders)}: name one "
                "folder of masks for each folder of images, in the same order."
            )
            raise ValueError(msg)
        images: list[Path] = []
        masks: list[Path] = []
        for index, folder in enumerate(folders):
            found = self._find_images("train_abnormal_dir", folder)
            images += found.values()
            if mask_folders:
                masks += _pair_masks(found, self._find_images("train_mask_dir", mask_folders[index]))
        return _anomalous_samples(DirType.ABNORMAL.value, images, masks or "")

    def _find_irrelevant(self) -> pd.DataFrame:
        folders = _as_list(self.irrelevant_dir)
        images = [path for folder in folders for path in self._find_images("irrelevant_dir", folder).values()]
        return _anomalous_samples(IRRELEVANT, images, "")

    def _find_images(self, argument: str, directory: str | Path) -> dict[Path, Path]:
        """Find the images in a folder, by their path in that folder."""
        folder = resolve_path(directory, self.root)
        if not folder.is_dir():
            msg = f"{argument} names {folder}, which is not a folder: check the argument and root={self.root}."
            raise FileNotFoundError(msg)
        extensions = [extension.lower() for extension in self.extensions or IMG_EXTENSIONS]
        images = {
            path.relative_to(folder): path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in extensions and path.is_file()
        }
        if not images:
            msg = f"{argument} names {folder}, which has no image with one of the extensions {', '.join(extensions)}."
            raise ValueError(msg)
        return images

    def _check_roles(self, defects: pd.DataFrame, irrelevant: pd.DataFrame) -> None:
        """Refuse an image that is said to be more than one of normal, defective and irrelevant."""
        samples = pd.concat([self.train_data.samples, self.test_data.samples])
        normal = _resolve(samples.image_path[samples.label_index == LabelName.NORMAL])
        not_irrelevant = _resolve(samples.image_path) | _resolve(defects.image_path)
        for argument, others, shared in (
            ("train_abnormal_dir", "a folder of normal images", _resolve(defects.image_path) & normal),
            ("irrelevant_dir", "another folder of this datamodule", _resolve(irrelevant.image_path) & not_irrelevant),
        ):
            if shared:
                msg = f"{argument} and {others} both hold {min(shared)}: keep the image in one of them."
                raise ValueError(msg)

    def _draw(self, argument: str, count: int | None, samples: pd.DataFrame) -> pd.DataFrame:
        if count is None:
            return samples
        if count > len(samples):
            msg = f"{argument}={count} is more than the {len(samples)} images found: choose fewer, or add images."
            raise ValueError(msg)
        return samples.iloc[draw(len(samples), count, self.seed)]

    def _remove_from_test_set(self, defects: pd.DataFrame) -> None:
        used = _resolve(defects.image_path)
        samples = self.test_data.samples
        left = [index for index, path in enumerate(samples.image_path) if Path(path).resolve() not in used]
        had_anomalies = self.test_data.has_anomalous
        self.test_data = self.test_data.subsample(left)
        if had_anomalies and not self.test_data.has_anomalous:
            msg = (
                f"All images of abnormal_dir={self.abnormal_dir} are trained on, and none is left to test on: lower "
                "num_train_abnormal or add images."
            )
            raise ValueError(msg)


def _as_list(folders: Folders | None) -> Sequence[str | Path]:
    if folders is None:
        return []
    return [folders] if isinstance(folders, str | Path) else folders


def _resolve(paths: Iterable[str | Path]) -> set[Path]:
    return {Path(path).resolve() for path in paths}


def _pair_masks(images: dict[Path, Path], masks: dict[Path, Path]) -> list[Path]:
    """Find the mask of each image; both by their path in the folder they were found in."""
    by_name = {path.with_suffix(""): mask for path, mask in masks.items()}
    pairs = []
    for path, image in images.items():
        names = path.with_suffix(""), path.with_name(f"{path.stem}_mask")
        mask = next((by_name[name] for name in names if name in by_name), None)
        if mask is None:
            msg = (
                f"train_mask_dir has no mask of {image}, named {names[0]} or {names[1]}: add it, or leave "
                "train_mask_dir out to train on labels of whole images."
            )
            raise ValueError(msg)
        pairs.append(mask)
    return pairs


def _anomalous_samples(label: str, images: list[Path], masks: list[Path] | str) -> pd.DataFrame:
    samples = pd.DataFrame({"image_path": images, "mask_path": masks, "label": label})
    samples["label_index"] = int(LabelName.ABNORMAL)
    samples["split"] = Split.TRAIN.value
    return samples.astype({"image_path": str, "mask_path": str})
