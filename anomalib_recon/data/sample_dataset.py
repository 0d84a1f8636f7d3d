# SPDX-License-Identifier: Apache-2.0

"""A dataset whose subclasses say how images and masks are read."""

import pandas as pd
import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageItem
from anomalib.data.utils import read_image, read_mask
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from torchvision.tv_tensors import Mask


class SampleDataset(AnomalibDataset):
    """Images of given samples, with their masks if the task is segmentation.

    Args:
        name (str): Name of the dataset.
        samples (pd.DataFrame): Samples as those of anomalib's ``FolderDataset``.
    """

    def __init__(self, name: str, samples: pd.DataFrame) -> None:
        super().__init__()
        self._name = name
        self.samples = samples

    @property
    def name(self) -> str:
        """Name of the dataset."""
        return self._name

    def read_image(self, path: str) -> Tensor:
        """Read an image of shape ``(3, H, W)`` with values in [0, 1]."""
        return torch.as_tensor(read_image(path, as_tensor=True))

    def read_mask(self, sample: pd.Series, size: tuple[int, ...]) -> Mask:
        """Read the mask of a sample, or make one without anomalies, of a height and width in pixels."""
        if sample.mask_path:
            # to the nearest pixel, as it is a Mask
            return resize(read_mask(sample.mask_path, as_tensor=True), list(size))
        return Mask(torch.zeros(size, dtype=torch.uint8))

    def __getitem__(self, index: int) -> ImageItem:
        """Load an image, and its mask if the task is segmentation."""
        sample = self.samples.iloc[index]
        image = self.read_image(sample.image_path)
        gt_mask = self.read_mask(sample, image.shape[-2:]) if self.task == TaskType.SEGMENTATION else None
        if self.augmentations:
            image, gt_mask = self.augmentations(image, gt_mask)
        return ImageItem(
            image=image,
            gt_mask=gt_mask,
            gt_label=torch.tensor(sample.label_index),
            image_path=sample.image_path,
            mask_path=sample.mask_path,
        )
