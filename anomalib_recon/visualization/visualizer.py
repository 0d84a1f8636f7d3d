# SPDX-License-Identifier: Apache-2.0

"""Result pictures that show what a model reconstructed.

Example:
    >>> import torch
    >>> from anomalib.data import ImageBatch
    >>> from anomalib_recon.visualization import ReconstructionVisualizer
    >>> batch = ImageBatch(image=torch.rand(1, 3, 64, 64), anomaly_map=torch.rand(1, 64, 64))
    >>> batch.reconstruction = torch.rand(1, 3, 64, 64)
    >>> picture = ReconstructionVisualizer()(batch)
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import functional
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

# anomalib draws a field with the function of that module that bears its name.
functional.visualize_reconstruction = functional.visualize_image  # type: ignore[attr-defined]


class ReconstructionVisualizer(ImageVisualizer):
    """Visualizer that shows a model's reconstruction beside the image.

    The pictures show the image, the ground truth mask if there is one, the reconstruction, the anomaly map over the
    image and the predicted mask over the image. Without a reconstruction they are those of anomalib's visualizer.

    A model provides the reconstruction as the attribute ``reconstruction`` of the batch, a tensor of shape
    ``(B, 3, H, W)`` with values in ``[0, 1]``. Lightning does not move this attribute between devices: it should be on
    the CPU, or the batches that ``predict`` collects keep it in the accelerator's memory.

    Args:
        fields (list[str] | None): Fields to show. ``None`` stands for
            ``["image", "gt_mask", "reconstruction"]``. Defaults to ``None``.
        **kwargs (Any): The other arguments of anomalib's ``ImageVisualizer``.
    """

    def __init__(self, fields: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(fields or ["image", "gt_mask", "reconstruction"], **kwargs)
        # anomalib's own size cuts off the longest title, "Image + Anomaly Map"
        self.text_config = {**self.text_config, "size": self.text_config["size"] or self.field_size[0] // 16}

    def visualize(
        self, predictions: ImageItem | NumpyImageItem | ImageBatch | NumpyImageBatch
    ) -> Image.Image | list[Image.Image | None] | None:
        """Draw predictions.

        Args:
            predictions (ImageItem | NumpyImageItem | ImageBatch | NumpyImageBatch): One or more predictions.

        Returns:
            Image.Image | list[Image.Image | None] | None: One picture for an item or a batch of one, else a list.
        """
        return super().visualize(_hand_out_reconstruction(predictions))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save one picture for each image; anomalib's ``on_predict_batch_end`` calls this too."""
        items = _hand_out_reconstruction(batch)
        super().on_test_batch_end(trainer, pl_module, outputs, items, batch_idx, dataloader_idx)


@dataclass
class _ReconstructionItem(ImageItem):
    """An item with a reconstruction of shape ``(3, H, W)``."""

    reconstruction: Tensor | None = None


@dataclass
class _ReconstructionBatch(ImageBatch):
    """A batch whose items have a reconstruction."""

    item_class: ClassVar[type[ImageItem]] = _ReconstructionItem
    reconstruction: Tensor | None = None


def _hand_out_reconstruction(predictions: Any) -> Any:
    """Make the items of a batch carry their part of its reconstruction, if it has one."""
    if isinstance(predictions, ImageBatch) and hasattr(predictions, "reconstruction"):
        return _ReconstructionBatch(**vars(predictions))
    return predictions
