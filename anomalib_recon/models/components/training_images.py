# SPDX-License-Identifier: Apache-2.0

"""The images of a training run: the normal ones, whether they can be read, and in order."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset
from anomalib.data.utils import LabelName
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_recon.data.image_files import check_image_files, check_mask_files


def normal_training_set(dataset: AnomalibDataset) -> AnomalibDataset:
    """Normal images of a training set, without augmentations.

    Args:
        dataset (AnomalibDataset): Training set.

    Returns:
        AnomalibDataset: A copy with the normal images only.

    Raises:
        ValueError: If there is none.
    """
    normal = [index for index, label in enumerate(dataset.samples.label_index) if label == 0]
    if not normal:
        msg = "The training set has no normal image; check the root, the category and the folder of good images."
        raise ValueError(msg)
    dataset = dataset.subsample(normal)
    dataset.augmentations = None
    return dataset


def load_images(dataset: AnomalibDataset, indices: Sequence[int], loader: DataLoader) -> Iterator[Tensor]:
    """Load images in order, in batches as those of a training dataloader.

    Args:
        dataset (AnomalibDataset): Images.
        indices (Sequence[int]): Those to load.
        loader (DataLoader): The training dataloader.

    Yields:
        Tensor: Images of shape ``(b, 3, h, w)``, not pre-processed.
    """
    if len(indices) == 0:
        return
    for batch in DataLoader(
        dataset.subsample(indices),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),  # leaves the global random numbers alone, for the sake of resumed runs
    ):
        yield batch.image


def check_training_files(datamodule: Any) -> None:
    """Read the images and masks of training and validation once, so that a bad one does not end a long run.

    Args:
        datamodule (Any): Datamodule of anomalib.

    Raises:
        ValueError: If an image or a mask cannot be used, or there is no normal training image.
    """
    normal_training_set(datamodule.train_data)
    for dataset in filter(None, (datamodule.train_data, getattr(datamodule, "val_data", None))):
        check_files(dataset)


def check_files(dataset: AnomalibDataset) -> None:
    """Read the images of a dataset, and the masks if it has them.

    Args:
        dataset (AnomalibDataset): Images.

    Raises:
        ValueError: If an image or a mask cannot be used.
    """
    check_image_files(dataset.samples.image_path)
    if dataset.task == TaskType.SEGMENTATION:
        anomalous = dataset.samples.label_index == LabelName.ABNORMAL
        check_mask_files(filter(None, dataset.samples.mask_path[anomalous]))
