# SPDX-License-Identifier: Apache-2.0

"""A pre-processor whose exported resize is the one the model was trained with.

anomalib trains with an antialiased resize and switches the antialiasing off for export. An image that does not have the
model's own size then gets other scores from the exported model than from the checkpoint.

Example:
    >>> from torchvision.transforms.v2 import Resize
    >>> from anomalib_recon.pre_processing import ExactResizePreProcessor
    >>> pre_processor = ExactResizePreProcessor(Resize((256, 256), antialias=True))
"""

from collections.abc import Iterator
from typing import Any

from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from lightning.pytorch import LightningModule, Trainer
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

from anomalib_recon.layers import AntialiasResize


class ExactResizePreProcessor(PreProcessor):
    """Pre-processor that resizes alike in training, in inference and in exported models.

    This holds for each antialiased bilinear ``Resize`` to a fixed height and width. A ``Resize`` with another
    interpolation, or of the shorter side, and all other transforms are exported as anomalib does it.

    Args:
        transform (Transform | None): Transform to apply to the data before passing it to the model.
            Defaults to ``None``.
    """

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__(transform)
        self.export_transform = _get_exact_export_transform(transform)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Transform a training batch, if it has images: cached features are those of transformed images."""
        if hasattr(batch, "image"):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transform and rebuild its exportable version.

        Args:
            config (dict[str, Any]): What ``checkpoint_config`` returned.
        """
        super().load_checkpoint_config(config)
        self.export_transform = _get_exact_export_transform(self.transform)


def _get_exact_export_transform(transform: Transform | None) -> Transform | None:
    """Get an exportable version of a transform that keeps the antialiasing."""
    return get_exportable_transform(None if transform is None else _replace_resize(transform))


def _replace_resize(transform: Transform) -> Transform:
    """Replace each antialiased bilinear resize to a fixed size, also in nested compositions."""
    if isinstance(transform, Compose):
        return Compose([_replace_resize(part) for part in transform.transforms])
    if (
        isinstance(transform, Resize)
        and transform.antialias
        and transform.interpolation == InterpolationMode.BILINEAR
        and transform.size is not None
        and len(transform.size) == 2
    ):
        height, width = transform.size
        return AntialiasResize((height, width))
    return transform


def flatten_transform(transform: Transform | None) -> Iterator[Transform]:
    """List the transforms of a composition.

    Args:
        transform (Transform | None): Transform, a nested composition, or none.

    Yields:
        Transform: The parts, in order.
    """
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from flatten_transform(part)
    elif transform is not None:
        yield transform
