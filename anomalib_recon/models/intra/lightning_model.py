# SPDX-License-Identifier: Apache-2.0

"""InTra: the inpainting transformer in anomalib.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_recon.models import InTra
    >>> model = InTra(image_size=320)  # doctest: +SKIP
    >>> Engine().train(model=model, datamodule=MVTecAD(category="screw"))  # doctest: +SKIP

Paper:
    Inpainting Transformer for Anomaly Detection, https://arxiv.org/abs/2104.13897

See Also:
    :class:`anomalib_recon.models.intra.torch_model.InTraModel`: the network, usable alone.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, cast

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from tqdm.auto import tqdm

from anomalib_recon.layers import check_finite, check_not_negative, check_positive, check_whole
from anomalib_recon.models.base import ReconstructionModule
from anomalib_recon.training import (
    EndOfFit,
    HeldOutImages,
    check_end,
    map_images,
    one_cycle_factor,
    own_share,
    share_of_fit,
)

from .augmentation import rotate_and_flip
from .loss import MIN_PATCH_SIZE, InTraLoss
from .torch_model import NUM_CHANNELS, InTraModel, check_readout
from .windows import draw_windows

# windows that pass forward and backward at a time in training on a CPU
WINDOWS_PER_PASS = 64


class InTra(ReconstructionModule, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Inpainting transformer, trained from scratch on windows of the normal training images.

    A tenth of the normal training images is held out. Training stops when the loss on them has not fallen for
    ``patience`` epochs (or at the trainer's ``max_epochs``); then the weights of the best epoch are restored, the
    statistics of the normal training images are taken (eq. 17, or those of ``distance``), and the validation images are
    inpainted, once, to set the thresholds.

    Args:
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels; an int means
            a square. ``None`` takes the size of ``pre_processor``, or else 256 x 256.
            Defaults to ``None``.
        patch_size (int): Side K of a patch, in pixels.
            Defaults to ``16``.
        window_size (int): Side L of a window, in patches.
            Defaults to ``7``.
        embed_dim (int): Latent dimension D.
            Defaults to ``512``.
        depth (int): Number of transformer blocks n.
            Defaults to ``13``.
        num_heads (int): Number of attention heads h.
            Defaults to ``8``.
        attention (Literal["mfsa", "msa"]): Multihead feature self-attention or regular multihead self-attention.
            Defaults to ``"mfsa"``.
        long_residuals (bool): Connect early blocks to late ones.
            Defaults to ``True``.
        position (Literal["global", "local"]): Number the patches within the image or within the window.
            Defaults to ``"global"``.
        readout (Literal["mean", "token"]): Inpaint from the mean of the output sequence, or from its covered token.
            Defaults to ``"mean"``.
        sigmoid (bool): End in a sigmoid (version 3 of the paper) or not (version 1).
            Defaults to ``True``.
        gms_weight (float): alpha, the weight of the gradient magnitude similarity in the loss.
            Defaults to ``0.01``.
        ssim_weight (float): beta, the weight of the structural similarity in the loss; 0 saves its computation, which
            takes longer than a small network.
            Defaults to ``0.01``.
        windows_per_image (int): Windows drawn from each training image in an epoch.
            Defaults to ``600``.
        windows_per_step (int): Windows per optimiser step, over all devices together.
            Defaults to ``256``.
        held_out_fraction (float): Fraction of the normal training images that is held out; at least one is.
            Defaults to ``0.1``.
        max_held_out (int): Most images to hold out.
            Defaults to ``20``.
        patience (int): Epochs without a lower held-out loss after which training stops.
            Defaults to ``50``.
        learning_rate (float): Learning rate, the highest one of a cycle.
            Defaults to ``1e-4``.
        weight_decay (float): Weight decay of AdamW, which is Adam without.
            Defaults to ``0.0``.
        use_one_cycle (bool): Let the learning rate rise and fall to nearly 0 within the time of the training (the
            trainer's ``max_time``), or its epochs or steps.
            Defaults to ``False``.
        augment (bool): Rotate training images by multiples of 90 degrees (180 if they are not square) and flip them.
            Defaults to ``True``.
        windows_per_chunk (int): Windows inpainted at a time outside training; bounds memory, changes no result.
            Defaults to ``32``.
        train_covered (int): Patches covered in each window in training, at random places. More than one teach more
            in the same time, and need ``readout="token"``.
            Defaults to ``1``.
        covered_per_window (int): Patches covered and inpainted at a time in a window outside training: 1 is the
            paper's; 4 and 9 make inference about 2.5 and 5 times as fast, as an approximation, and need
            ``readout="token"``.
            Defaults to ``1``.
        in_channels (int): Channels of an image that are inpainted: 3, or 1 for grey images, whose three channels are
            equal. With 1, images in colour are taken as the mean of their channels.
            Defaults to ``3``.
        distance (Literal["gms", "mahalanobis"]): Compare the gradients of images and reconstructions (section 3.5), or
            pixels and gradients, in units of what is normal in the context.
            Defaults to ``"gms"``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 the
            score is the maximum (eq. 18).
            Defaults to ``0.0``.
        pre_processor (PreProcessor | bool): Pre-processor.
            Defaults to ``True``.
        post_processor (PostProcessor | bool): Post-processor.
            Defaults to ``True``.
        evaluator (Evaluator | bool): Evaluator.
            Defaults to ``True``.
        visualizer (Visualizer | bool): Visualizer.
            Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
    """

    network = InTraModel
    free_arguments = ("windows_per_chunk",)
    score_arguments = ("covered_per_window", "top_fraction")
    added_arguments: ClassVar[dict[str, Any]] = {"in_channels": NUM_CHANNELS, "distance": "gms"}

    def __init__(
        self,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int = 16,
        window_size: int = 7,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        attention: Literal["mfsa", "msa"] = "mfsa",
        long_residuals: bool = True,
        position: Literal["global", "local"] = "global",
        readout: Literal["mean", "token"] = "mean",
        sigmoid: bool = True,
        gms_weight: float = 0.01,
        ssim_weight: float = 0.01,
        windows_per_image: int = 600,
        windows_per_step: int = 256,
        held_out_fraction: float = 0.1,
        max_held_out: int = 20,
        patience: int = 50,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        use_one_cycle: bool = False,
        augment: bool = True,
        train_covered: int = 1,
        windows_per_chunk: int = 32,
        covered_per_window: int = 1,
        in_channels: int = NUM_CHANNELS,
        distance: Literal["gms", "mahalanobis"] = "gms",
        top_fraction: float = 0.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer)
        check_whole(
            patch_size=patch_size,
            window_size=window_size,
            windows_per_image=windows_per_image,
            windows_per_step=windows_per_step,
            max_held_out=max_held_out,
            patience=patience,
            train_covered=train_covered,
        )
        check_positive(learning_rate=learning_rate)
        check_readout("train_covered", train_covered, readout)
        if train_covered >= window_size**2:
            msg = (
                f"train_covered must be less than the {window_size**2} patches of a window, got {train_covered}: a "
                "window needs patches to inpaint the covered ones from."
            )
            raise ValueError(msg)
        check_finite(held_out_fraction=held_out_fraction)
        check_not_negative(weight_decay=weight_decay)
        if ssim_weight and patch_size < MIN_PATCH_SIZE:
            msg = (
                f"patch_size must be at least {MIN_PATCH_SIZE} for the SSIM in the loss, got {patch_size}; enlarge it "
                "or set ssim_weight to 0."
            )
            raise ValueError(msg)
        if in_channels not in {1, NUM_CHANNELS}:
            msg = f"in_channels must be 1 or {NUM_CHANNELS}, got {in_channels}: images of anomalib have three channels."
            raise ValueError(msg)
        if not 0 < held_out_fraction < 1:
            msg = f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}."
            raise ValueError(msg)

        self.model: InTraModel = self.build_network()
        self.loss = InTraLoss(gms_weight, ssim_weight)
        self.reconstructs_in_int8 = distance == "gms"
        self.windows_per_image = windows_per_image
        self.windows_per_step = windows_per_step
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.use_one_cycle = use_one_cycle
        self.train_covered = train_covered
        self.augment = augment
        self.held_out_arguments = (held_out_fraction, max_held_out, patience)
        # an optimiser step takes windows_per_step windows, a batch of images yields many of them
        self.automatic_optimization = False

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in section 4.1; AdamW with ``weight_decay``.

        Raises:
            ValueError: If nothing ends a fit with ``use_one_cycle``.
        """
        if self.use_one_cycle:
            check_end(self.trainer)
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)

    def configure_end(self) -> Sequence[Callback]:
        """Hold out images to stop training, and take the weights of its best epoch."""
        held_out = HeldOutImages(*self.held_out_arguments)
        return [held_out, EndOfFit(held_out)]

    def training_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        """Draw windows from the images of the batch and take an optimiser step for every ``windows_per_step`` of them.

        Args:
            batch (Batch): Batch of training images.
            batch_idx (int): Number of the batch in its epoch.
            *args (Any): Not used.
            **kwargs (Any): Not used.
        """
        del args, kwargs
        images = self.tiles(batch)
        # all processes take as many optimiser steps as the one with most images
        counts = cast("Tensor", self.all_gather(torch.tensor(len(images), device=self.device)))
        num_windows = self.windows_per_image * int(counts.max())
        generator = torch.Generator(self.device).manual_seed(int(torch.randint(2**31, ())) + self.global_rank)
        image_index = torch.randperm(num_windows, generator=generator, device=self.device) % len(images)

        start, losses = time.monotonic(), []
        steps = image_index.split(max(1, self.windows_per_step // self.trainer.world_size))
        share = share_of_fit(self.trainer, batch_idx)
        for index in tqdm(steps, "Optimiser steps", delay=10, leave=False, disable=not self.trainer.is_global_zero):
            if self.use_one_cycle:
                self._set_learning_rate(self.learning_rate * one_cycle_factor(share))
            losses.append(self._optimise(images, index, generator))
            share = share_of_fit(self.trainer, batch_idx + len(losses) / len(steps))
            if share >= 1:
                break
        num_trained = sum(map(len, steps[: len(losses)])) * self.trainer.world_size
        self.log("train_loss", torch.stack(losses).mean(), prog_bar=True)
        self.log("windows_per_second", num_trained / (time.monotonic() - start), prog_bar=True)

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in cast("LightningOptimizer", self.optimizers()).param_groups:
            group["lr"] = learning_rate

    def _optimise(self, images: Tensor, image_index: Tensor, generator: torch.Generator) -> Tensor:
        """Take an optimiser step on one window of each of the images ``image_index``, shape ``(n,)``."""
        if self.augment:
            images = rotate_and_flip(images, generator)
        patches = self.model.embed(images)
        places, covered = draw_windows(
            self.model.grid_size, self.model.window_size, len(image_index), generator, self.train_covered
        )
        # the gradients of parts add up to those of all; on a CPU, smaller activations take less time and memory
        size = WINDOWS_PER_PASS if self.device.type == "cpu" else len(image_index)
        parts = zip(*(values.split(size) for values in (image_index, places, covered)), strict=True)

        optimizer, total = cast("LightningOptimizer", self.optimizers()), torch.zeros((), device=self.device)
        optimizer.zero_grad()
        for part in parts:
            loss = self._loss(patches, *part) * (len(part[0]) / len(image_index))
            self.manual_backward(loss)
            total += loss.detach()
        optimizer.step()
        return total

    def _loss(self, patches: Tensor, image_index: Tensor, places: Tensor, covered: Tensor) -> Tensor:
        """Mean loss of windows of the images ``image_index``; see :meth:`InTraModel.inpaint` for the others."""
        windows = patches[image_index[:, None], places]
        inpainted = self.model.inpaint(windows, places, covered)
        original = windows.gather(1, covered[:, :, None].expand_as(inpainted))
        return self.loss(self.model.pixels(original), self.model.pixels(inpainted))

    @torch.no_grad()
    def held_out_loss(self, images: Tensor) -> float:
        """Mean loss over all patches of images, each inpainted from its window as at inference.

        Args:
            images (Tensor): Images of shape ``(n, 3, H, W)``.

        Returns:
            float: The loss, over all processes together.
        """
        total = torch.zeros((), device=self.device)
        for image in images[self.trainer.global_rank :: self.trainer.world_size]:
            patches = self.model.embed(self.model.tile(image[None]))
            with self.trainer.precision_plugin.forward_context():
                inpainted = self.model.reconstruct(patches)
            total += self.loss(self.model.pixels(patches), self.model.pixels(inpainted))
        return float(self.trainer.strategy.reduce(total, reduce_op="sum")) / len(images)

    def reconstructions(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inpaint the normal training images, in an order that is drawn once and for all.

        Yields:
            tuple[Tensor, Tensor]: Images, or their tiles, and reconstructions, both of shape ``(b, C, H, W)``.
        """

        def inpaint(batch: Any) -> tuple[Tensor, Tensor]:
            patches = self.model.embed(self.tiles(batch))
            return self.model.unpatchify(patches), self.model.unpatchify(self.model.reconstruct(patches))

        images = self.training_images()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        yield from map_images(self.trainer, self, images.subsample(order.tolist()), inpaint)

    def finish(self) -> None:
        """Take the mean difference of the normal training images (eq. 17), or what is normal in each context."""
        if self.model.mahalanobis is not None:
            self.model.mahalanobis.fit(self.reconstructions())
            for value in self.model.mahalanobis.buffers():  # sums in another order would give other contexts
                value.copy_(self.trainer.strategy.broadcast(value))
            return

        def total_difference(batch: Any) -> Tensor:
            patches = self.model.embed(self.tiles(batch))
            difference = self.model.difference(patches, self.model.reconstruct(patches))
            of_tiles = difference.unflatten(0, (len(batch.image), -1))
            return of_tiles.mean(dim=1).sum(dim=0, keepdim=True)

        images = self.training_images()
        total = torch.zeros_like(self.model.normal_difference)
        for part in map_images(self.trainer, self, own_share(self.trainer, images), total_difference):
            total += part
        self.model.normal_difference.copy_(self.trainer.strategy.reduce(total, reduce_op="sum") / len(images))
