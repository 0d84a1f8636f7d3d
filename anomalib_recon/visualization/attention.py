# SPDX-License-Identifier: Apache-2.0

"""Pictures of where a network looks to inpaint a patch.

Example:
    >>> import torch
    >>> from anomalib_recon.models.intra.torch_model import InTraModel
    >>> from anomalib_recon.visualization import draw_attention
    >>> model = InTraModel(image_size=(64, 64), patch_size=8, embed_dim=32, depth=2, num_heads=4).eval()
    >>> image = torch.rand(3, 64, 64)
    >>> picture = draw_attention(image, model.attention_rollout(image, row=3, col=4), row=3, col=4)
"""

from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map, visualize_image
from lightning.pytorch import LightningModule, Trainer
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

from .visualizer import ReconstructionVisualizer


class AttentionVisualizer(ReconstructionVisualizer):
    """Visualizer of InTra that also shows where the network looked to inpaint the most anomalous patch.

    That is the patch with the highest mean of the anomaly map; see :func:`draw_attention`.

    Args:
        fields (list[str] | None): Fields to show. ``None`` stands for
            ``["image", "gt_mask", "reconstruction", "attention", "anomaly_map"]``.
            Defaults to ``None``.
        **kwargs (Any): The other arguments of anomalib's ``ImageVisualizer``.
    """

    def __init__(self, fields: list[str] | None = None, **kwargs: Any) -> None:
        super().__init__(fields or ["image", "gt_mask", "reconstruction", "attention", "anomaly_map"], **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the model.

        Raises:
            ValueError: If it has no attention rollout.
        """
        del trainer, stage
        if not hasattr(getattr(pl_module, "model", None), "attention_rollout"):
            msg = f"AttentionVisualizer is for InTra, got {type(pl_module).__name__}; leave visualizer out."
            raise ValueError(msg)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the pictures of a batch; of images that are cut into tiles, without attention."""
        if pl_module.tiler is None:
            pairs = zip(cast("Tensor", batch.image), cast("Tensor", batch.anomaly_map), strict=True)
            of_items = [_look(pl_module.model, *pair) for pair in pairs]
            batch.attention = torch.stack(of_items)  # type: ignore[attr-defined]
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)


@torch.no_grad()
def _look(network: Any, image: Tensor, anomaly_map: Tensor) -> Tensor:
    """Picture ``(3, H, W)`` of where a network looks to inpaint the most anomalous patch of an image."""
    single = anomaly_map.float().reshape(1, *anomaly_map.shape[-2:])
    of_patches = functional.avg_pool2d(single, network.patch_size)[0]  # (N, M)
    row, col = divmod(int(of_patches.argmax()), of_patches.shape[1])
    picture = draw_attention(image, network.attention_rollout(image, row, col), row, col)
    return pil_to_tensor(picture).float() / 255


def draw_attention(image: Tensor, shares: Tensor, row: int, col: int) -> Image.Image:
    """Lay the shares of the patches over an image, and frame the patch that is inpainted from them.

    Args:
        image (Tensor): Image of shape ``(3, H, W)`` with values in [0, 1].
        shares (Tensor): Share of each patch in the inpainted one, shape ``(N, M)``, such as of
            ``InTraModel.attention_rollout``. The highest is shown red, none blue.
        row (int): Row of the inpainted patch in the grid of N x M patches.
        col (int): Its column.

    Returns:
        Image.Image: Picture of H x W pixels.
    """
    height, width = image.shape[-2] // shares.shape[0], image.shape[-1] // shares.shape[1]
    enlarged = functional.interpolate(shares[None, None].float(), size=image.shape[-2:], mode="nearest")[0, 0]
    heat = visualize_anomaly_map((enlarged / enlarged.max()).cpu(), colormap=True)
    picture = overlay_images(visualize_image(image.cpu()), heat).convert("RGB")
    left, top = col * width, row * height
    ImageDraw.Draw(picture).rectangle((left, top, left + width - 1, top + height - 1), outline="white")
    return picture
