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

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image import functional
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor

from anomalib_recon.deploy.grey_levels import is_deep

# anomalib draws a field with the function of that module that bears its name.
functional.visualize_reconstruction = functional.visualize_image  # type: ignore[attr-defined]
functional.visualize_attention = functional.visualize_image  # type: ignore[attr-defined]


class ReconstructionVisualizer(ImageVisualizer):
    """Visualizer that shows a model's reconstruction beside the image.

    The pictures show the image, the ground truth mask if there is one, the reconstruction, the anomaly map twice, and
    the predicted mask over the image. The first map has a scale of its own, from its smallest to its largest value:
    it shows where the image is most unusual. The second one, over the image, has the same scale for all images, with
    the threshold in the middle: it shows how unusual that is. A field that an item lacks is left out.
    anomalib's visualizer draws the image from its file; of a file with more than 8 bits of grey, which it would draw
    white, the pictures show what the model has seen.

    A model provides the reconstruction as the attribute ``reconstruction`` of the batch, a tensor of shape
    ``(B, 3, H, W)`` with values in ``[0, 1]``. Lightning does not move this attribute between devices: it should be on
    the CPU, or the batches that ``predict`` collects keep it in the accelerator's memory.

    Args:
        fields (list[str] | None): Fields to show. ``None`` stands for
            ``["image", "gt_mask", "reconstruction", "anomaly_map"]``. Defaults to ``None``.
        **kwargs (Any): The other arguments of anomalib's ``ImageVisualizer``.
    """

    def __init__(self, fields: list[str] | None = None, **kwargs: Any) -> None:
        own_scale = {"anomaly_map": {"colormap": True, "normalize": True}}
        kwargs["fields_config"] = {**own_scale, **(kwargs.get("fields_config") or {})}
        super().__init__(fields or ["image", "gt_mask", "reconstruction", "anomaly_map"], **kwargs)
        # anomalib's own size cuts off the longest title, "Image + Anomaly Map"
        self.text_config = {**self.text_config, "size": self.text_config["size"] or self.field_size[0] // 16}
        self._saved: set[Path] = set()

    def visualize(
        self, predictions: ImageItem | NumpyImageItem | ImageBatch | NumpyImageBatch
    ) -> Image.Image | list[Image.Image | None] | None:
        """Draw predictions.

        Args:
            predictions (ImageItem | NumpyImageItem | ImageBatch | NumpyImageBatch): One or more predictions.

        Returns:
            Image.Image | list[Image.Image | None] | None: One picture for an item or a batch of one, else a list.
        """
        if isinstance(predictions, ImageItem):
            return super().visualize(_from_memory_if_deep(predictions))
        if not isinstance(predictions, ImageBatch):
            return super().visualize(predictions)
        pictures: list[Any] = [self.visualize(item) for item in _hand_out_reconstruction(predictions)]
        return pictures[0] if len(pictures) == 1 else pictures

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Let pictures replace those of an earlier run."""
        del trainer, pl_module
        self._saved = set()

    on_predict_start = on_test_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save one picture for each image; anomalib's ``on_predict_batch_end`` calls this too.

        Images of one name in several folders get a number each, if their folders do not tell them apart.
        """
        del pl_module, outputs, batch_idx, dataloader_idx
        self.output_dir = self.output_dir or Path(trainer.default_root_dir) / "images"
        datamodule = getattr(trainer, "datamodule", None)
        for item in _hand_out_reconstruction(batch):
            picture: Any = self.visualize(item)
            if picture is not None:
                path = generate_output_filename(
                    input_path=item.image_path or "",
                    output_path=self.output_dir,
                    dataset_name=getattr(datamodule, "name", None),
                    category=getattr(datamodule, "category", None),
                )
                if path in self._saved:
                    path = path.with_stem(f"{path.stem}_{len(self._saved)}")
                self._saved.add(path)
                picture.save(path)


@dataclass
class _ReconstructionItem(ImageItem):
    """An item with pictures of its own, of shape ``(3, H, W)``."""

    reconstruction: Tensor | None = None
    attention: Tensor | None = None


@dataclass
class _ReconstructionBatch(ImageBatch):
    """A batch whose items have pictures of their own."""

    item_class: ClassVar[type[ImageItem]] = _ReconstructionItem
    reconstruction: Tensor | None = None
    attention: Tensor | None = None


def _hand_out_reconstruction(batch: ImageBatch) -> ImageBatch:
    """Make the items of a batch carry their part of its reconstruction, if it has one."""
    return _ReconstructionBatch(**vars(batch)) if hasattr(batch, "reconstruction") else batch


def _from_memory_if_deep(item: ImageItem) -> ImageItem:
    """Leave out the path of a file with more than 8 bits of grey: without one, anomalib draws ``item.image``."""
    return replace(item, image_path=None) if item.image_path and is_deep(item.image_path) else item
