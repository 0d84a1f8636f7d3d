# SPDX-License-Identifier: Apache-2.0

"""The images of a fit: which are normal, whether they can be read, and one pass over them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, AnomalibDataset, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.data.utils import LabelName
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Compose, Resize

from .image_files import check_image_files, check_mask_files, levels_of, mask_files

Result = TypeVar("Result")


def normal_indices(dataset: AnomalibDataset) -> Sequence[int]:
    """Places of the normal images in a dataset."""
    return (dataset.samples.label_index == LabelName.NORMAL).to_numpy().nonzero()[0].tolist()


def normal_images(dataset: AnomalibDataset, module: AnomalibModule) -> AnomalibDataset:
    """Normal images of a dataset, loaded as anomalib loads test images.

    Args:
        dataset (AnomalibDataset): Training or validation images.
        module (AnomalibModule): The model. anomalib applies the datamodule's ``test_augmentations`` and the resize of
            the model's pre-processor to each image before it makes batches.

    Returns:
        AnomalibDataset: A copy.

    Raises:
        ValueError: If there is none.
    """
    normal = normal_indices(dataset)
    if not normal:
        msg = (
            f"None of the {len(dataset)} images of the training or validation set is normal; check the root, the "
            "category and the folder of good images."
        )
        raise ValueError(msg)
    dataset = dataset.subsample(normal)
    datamodule = getattr(module._trainer, "datamodule", None)  # without a trainer, `trainer` is an error
    given = getattr(datamodule, "test_augmentations", None)
    resizes = extract_transforms_by_type(getattr(module.pre_processor, "transform", None), Resize)[:1]
    transforms = [*filter(None, [given]), *resizes]
    dataset.augmentations = Compose(transforms) if transforms else None
    return dataset


def own_share(trainer: Trainer, dataset: AnomalibDataset) -> AnomalibDataset:
    """The images that this process looks at, if each image is looked at by one process.

    Args:
        trainer (Trainer): The trainer.
        dataset (AnomalibDataset): Images.

    Returns:
        AnomalibDataset: Every ``trainer.world_size``-th image; there may be none.
    """
    return dataset.subsample(range(trainer.global_rank, len(dataset), trainer.world_size))


def lacks_validation_images(trainer: Trainer) -> bool:
    """Find out whether the datamodule has no validation set, for which anomalib has no dataloader.

    Args:
        trainer (Trainer): Trainer whose datamodule has been set up.

    Returns:
        bool: Whether it has none, as with ``val_split_mode="none"``.
    """
    datamodule = getattr(trainer, "datamodule", None)
    return isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data")


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Have a module in evaluation mode, without gradients, and leave it as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def map_images(
    trainer: Trainer, module: AnomalibModule, dataset: AnomalibDataset, compute: Callable[[ImageBatch], Result]
) -> Iterator[Result]:
    """Compute something from each batch of a dataset, in order.

    The batches are pre-processed, on the trainer's device. The model is in evaluation mode, without gradients, in the
    trainer's precision. Random numbers stay as they are, for the sake of resumed runs.

    Args:
        trainer (Trainer): Trainer that is fitting or has fitted the model.
        module (AnomalibModule): The model, on the trainer's device.
        dataset (AnomalibDataset): Images.
        compute (Callable[[ImageBatch], Result]): Function of a batch.

    Yields:
        Result: What it returns.
    """
    if len(dataset) == 0:
        return
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    loader = DataLoader(
        dataset,
        batch_size=datamodule.train_batch_size,
        num_workers=datamodule.num_workers,
        collate_fn=datamodule.external_collate_fn or dataset.collate_fn,
        generator=torch.Generator(),  # leaves the global one alone
    )
    for index, loaded in enumerate(loader):
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(loaded))
        if isinstance(module.pre_processor, Callback):
            module.pre_processor.on_test_batch_start(trainer, module, batch, index)
        with evaluation(module), trainer.precision_plugin.forward_context():
            result = compute(batch)
        yield result


def score_images(trainer: Trainer, module: AnomalibModule, dataset: AnomalibDataset) -> Iterator[ImageBatch]:
    """Score images as in a test, before the post-processor. Each process scores its share.

    Args:
        trainer (Trainer): Trainer that is fitting or has fitted the model.
        module (AnomalibModule): The model, on the trainer's device.
        dataset (AnomalibDataset): Images.

    Yields:
        ImageBatch: Batches with ``pred_score`` and ``anomaly_map``, raw, as far as the model has them.
    """
    share = own_share(trainer, dataset)
    yield from map_images(trainer, module, share, lambda batch: cast("ImageBatch", module.test_step(batch, 0)))


def check_training_files(datamodule: Any, module: AnomalibModule) -> None:
    """Read the images and masks of training and validation once, so that a bad one does not end a long run.

    Args:
        datamodule (Any): Datamodule of anomalib.
        module (AnomalibModule): The model.

    Raises:
        ValueError: If an image or a mask cannot be used, or there is no normal training image.
    """
    normal_images(datamodule.train_data, module)
    for dataset in filter(None, (datamodule.train_data, getattr(datamodule, "val_data", None))):
        check_image_files(dataset.samples.image_path, deep_grey=levels_of(dataset) is not None)
        if dataset.task == TaskType.SEGMENTATION:
            anomalous = dataset.samples.label_index == LabelName.ABNORMAL
            masks = filter(None, dataset.samples.mask_path[anomalous])
            check_mask_files(path for mask in masks for path in mask_files(mask))
