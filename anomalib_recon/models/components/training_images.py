# SPDX-License-Identifier: Apache-2.0

"""The images of a training run, looked at before it starts."""

from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataset

from anomalib_recon.data.image_files import check_image_files


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


def check_training_files(datamodule: Any) -> None:
    """Read the images of training and validation once, so that a bad one does not end a long run in the middle.

    Args:
        datamodule (Any): Datamodule of anomalib. One over arrays may name images for which there are no files.

    Raises:
        ValueError: If an image cannot be used, or there is no normal training image.
    """
    normal_training_set(datamodule.train_data)
    for dataset in filter(None, (datamodule.train_data, getattr(datamodule, "val_data", None))):
        check_image_files(path for path in dataset.samples.image_path if Path(path).exists())
