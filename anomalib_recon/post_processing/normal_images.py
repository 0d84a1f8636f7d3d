# SPDX-License-Identifier: Apache-2.0

"""Raw scores of normal images during a fit."""

from collections.abc import Iterator
from typing import cast

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.transforms.utils import extract_transforms_by_type
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize, Transform


def normal_images(dataset: AnomalibDataset, transform: Transform | None) -> AnomalibDataset:
    """Normal images of a dataset, loaded as anomalib loads images at inference: without augmentation.

    Args:
        dataset: Training or validation images.
        transform: Transform of the pre-processor, whose resize anomalib applies before it makes batches.

    Returns:
        A copy.

    Raises:
        ValueError: If there is none.
    """
    normal = [index for index, label in enumerate(dataset.samples.label_index) if label == 0]
    if not normal:
        msg = (
            f"None of the {len(dataset)} images is normal, so no threshold can be set at a false-positive rate: "
            "check the root, the category and the folder of good images."
        )
        raise ValueError(msg)
    dataset = dataset.subsample(normal)
    dataset.augmentations = next(iter(extract_transforms_by_type(transform, Resize)), None)
    return dataset


@torch.no_grad()
def score_images(trainer: Trainer, module: AnomalibModule, dataset: AnomalibDataset) -> Iterator[ImageBatch]:
    """Score images as in a test, before the post-processor, in the trainer's precision.

    Each process scores its share, no image twice. That is why this is no loop of Lightning's, which would give some
    images to several processes.

    Args:
        trainer: Trainer that is fitting or has fitted the model.
        module: The model, on the trainer's device.
        dataset: Images.

    Yields:
        Batches with ``pred_score`` and ``anomaly_map``, raw, as far as the model has them.
    """
    share = range(trainer.global_rank, len(dataset), trainer.world_size)
    if not share:
        return
    train_loader = cast("DataLoader", trainer.train_dataloader)
    loader = DataLoader(
        dataset.subsample(share),
        batch_size=train_loader.batch_size,
        num_workers=train_loader.num_workers,
        collate_fn=dataset.collate_fn,
    )
    training = {part: part.training for part in module.modules()}
    module.eval()
    for index, loaded in enumerate(loader):
        batch = trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(loaded))
        if isinstance(module.pre_processor, Callback):
            module.pre_processor.on_test_batch_start(trainer, module, batch, index)
        with trainer.precision_plugin.test_step_context():
            scored = cast("ImageBatch", module.test_step(batch, index))
        yield scored
    for part, mode in training.items():
        part.training = mode
