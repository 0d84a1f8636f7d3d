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

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataset, Batch, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize
from tqdm.auto import tqdm

from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models.components import (
    CurrentOpsetExport,
    DeferredValidation,
    check_finite,
    check_training_files,
    check_whole,
    guards,
    load_images,
    normal_training_set,
    refuse_other_networks,
    resolve_image_size,
    save_anew,
)
from anomalib_recon.pre_processing import ExactResizePreProcessor
from anomalib_recon.visualization import ReconstructionVisualizer

from .loss import MIN_PATCH_SIZE, InTraLoss
from .torch_model import InTraModel, check_sizes
from .training_images import draw_held_out, rotate_and_flip

logger = logging.getLogger(__name__)

DEFAULT_IMAGE_SIZE = (256, 256)
# arguments that a checkpoint and the model it is loaded into must share
NETWORK_ARGUMENTS = (
    "image_size",
    "patch_size",
    "window_size",
    "embed_dim",
    "depth",
    "num_heads",
    "attention",
    "long_residuals",
    "position",
    "readout",
    "sigmoid",
)
# windows that pass forward and backward at a time in training on a CPU
WINDOWS_PER_PASS = 64
# optimiser steps after which the length of the run is estimated, and the length from which on the user is told
ESTIMATE_STEPS = 3
LONG_RUN_HOURS = 3.0


class InTra(CurrentOpsetExport, AnomalibModule):  # type: ignore[misc]  # anomalib's to_onnx is not Lightning's
    """Inpainting transformer, trained from scratch on windows of the normal training images.

    A tenth of the normal training images is held out. Training stops when the loss on them has not fallen for
    ``patience`` epochs (or at the trainer's ``max_epochs``); then the weights of the best epoch are restored, the mean
    difference map of the normal training images is taken (eq. 17), and the validation images are inpainted, once, to
    set the thresholds.

    Args:
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels; an int means
            a square. ``None`` takes the size of ``pre_processor`` if patches and windows fit in it, or else 256 x 256.
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
        readout (Literal["mean", "token"]): Paint from the mean of the output sequence, or from its covered token.
            Defaults to ``"mean"``.
        sigmoid (bool): End in a sigmoid (version 3 of the paper) or not (version 1).
            Defaults to ``True``.
        gms_weight (float): alpha, the weight of the gradient magnitude similarity in the loss.
            Defaults to ``0.01``.
        ssim_weight (float): beta, the weight of the structural similarity in the loss.
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
        learning_rate (float): Learning rate of Adam.
            Defaults to ``1e-4``.
        augment (bool): Rotate training images by multiples of 90 degrees (180 if they are not square) and flip them.
            Defaults to ``True``.
        windows_per_chunk (int): Windows inpainted at a time outside training; bounds memory, changes no result.
            Defaults to ``32``.
        covered_per_window (int): Patches covered and painted at a time in a window, in training and outside: 1 is
            exact; 4 and 9 make inference about as many times faster, an approximation, and need ``readout="token"``.
            Defaults to ``1``.
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
        augment: bool = True,
        windows_per_chunk: int = 32,
        covered_per_window: int = 1,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # assigned before the arguments are saved as hyper-parameters, so that a checkpoint knows its image size
        image_size = find_image_size(image_size, pre_processor, patch_size, window_size)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        check_whole(
            windows_per_image=windows_per_image,
            windows_per_step=windows_per_step,
            max_held_out=max_held_out,
            patience=patience,
        )
        check_finite(
            learning_rate=learning_rate,
            held_out_fraction=held_out_fraction,
            gms_weight=gms_weight,
            ssim_weight=ssim_weight,
        )
        if learning_rate <= 0:
            msg = f"learning_rate must be positive, got {learning_rate}."
            raise ValueError(msg)
        if patch_size < MIN_PATCH_SIZE:
            msg = f"patch_size must be at least {MIN_PATCH_SIZE} for the SSIM in the loss, got {patch_size}."
            raise ValueError(msg)
        if not 0 < held_out_fraction < 1:
            msg = f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}."
            raise ValueError(msg)

        self.model: InTraModel = InTraModel(
            image_size=image_size,
            patch_size=patch_size,
            window_size=window_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            attention=attention,
            long_residuals=long_residuals,
            position=position,
            readout=readout,
            sigmoid=sigmoid,
            windows_per_chunk=windows_per_chunk,
            covered_per_window=covered_per_window,
        )
        self.loss = InTraLoss(gms_weight, ssim_weight)
        self.windows_per_image = windows_per_image
        self.windows_per_step = windows_per_step
        self.held_out_fraction = held_out_fraction
        self.max_held_out = max_held_out
        self.patience = patience
        self.learning_rate = learning_rate
        self.augment = augment
        # an optimiser step takes windows_per_step windows, a batch of images yields many of them
        self.automatic_optimization = False

        self.held_out_losses: list[float] = []
        self._held_out_paths: list[str] = []
        self._best_weights: dict[str, Tensor] = {}
        self._fitted = False
        self._deferred_validation = DeferredValidation()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in section 4.1."""
        return torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)

    def setup(self, stage: str) -> None:
        """Look at the image files before a long training, not in the middle of it.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If an image cannot be used, or there is no normal training image.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and datamodule:
            check_training_files(datamodule)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, what puts validation off, and the guards of all models."""
        return [*cast("Sequence[Callback]", super().configure_callbacks()), self._deferred_validation, *guards()]

    def on_fit_start(self) -> None:
        """Start afresh, or continue the interrupted run whose checkpoint was given."""
        self._fitted = False
        self._step_times: list[float] = []
        if self.trainer.ckpt_path is None:
            self.held_out_losses, self._held_out_paths, self._best_weights = [], [], {}
            return
        if not self._best_weights:  # a finished run, which has the weights of its best epoch
            self._best_weights = self._copy_weights()

    def on_train_start(self) -> None:
        """Hold out a part of the normal training images.

        Raises:
            ValueError: If no normal image is left to train on.
        """
        dataset = cast("AnomalibDataset", self._train_loader.dataset)
        self._normal_set = normal_training_set(dataset)
        paths = [str(path) for path in self._normal_set.samples.image_path]
        if not self._held_out_paths or not set(self._held_out_paths) <= set(paths):
            self._held_out_paths = draw_held_out(paths, self.held_out_fraction, self.max_held_out)
        self._held_out_paths = self.trainer.strategy.broadcast(self._held_out_paths)
        held_out = [index for index, path in enumerate(paths) if path in self._held_out_paths]
        self._num_training_images = len(paths) - len(held_out)
        self._held_out_images = torch.cat(list(self._load(held_out)))

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> None:
        """Draw windows from the images of the batch and take an optimiser step for every ``windows_per_step`` of them.

        Args:
            batch (Batch): Batch of training images.
            *args (Any): Not used.
            **kwargs (Any): Not used.
        """
        del args, kwargs
        images = self._training_images(batch)
        # every process takes as many optimiser steps as the others, however many images it holds out
        counts = cast("Tensor", self.all_gather(torch.tensor(len(images), device=self.device)))
        if counts.min() == 0:
            return
        num_windows = self.windows_per_image * int(counts.max())
        generator = torch.Generator(self.device).manual_seed(int(torch.randint(2**31, ())) + self.global_rank)
        image_index = torch.randperm(num_windows, generator=generator, device=self.device) % len(images)

        start, losses = time.monotonic(), []
        steps = image_index.split(max(1, self.windows_per_step // self.trainer.world_size))
        for index in tqdm(steps, "Optimiser steps", delay=10, leave=False, disable=not self.trainer.is_global_zero):
            losses.append(self._optimise(images, index, generator))
            self._tell_if_long()
            if 0 < self.trainer.max_steps <= self.trainer.global_step:
                break
        loss = torch.stack(losses).mean()
        num_windows = sum(map(len, steps[: len(losses)])) * self.trainer.world_size
        self.log("train_loss", loss, prog_bar=True)
        self.log("windows_per_second", num_windows / (time.monotonic() - start), prog_bar=True)

    def _training_images(self, batch: Batch) -> Tensor:
        """Normal images of a batch that are not held out, shape ``(b, 3, H, W)``."""
        images = cast("Tensor", batch.image)
        paths = cast("list[str]", cast("ImageBatch", batch).image_path)
        labels = torch.zeros(len(images)) if batch.gt_label is None else batch.gt_label
        held_out = set(self._held_out_paths)
        return images[[str(path) not in held_out and not label for path, label in zip(paths, labels, strict=True)]]

    def _optimise(self, images: Tensor, image_index: Tensor, generator: torch.Generator) -> Tensor:
        """Take an optimiser step on one window of each of the images ``image_index``, shape ``(n,)``."""
        if self.augment:
            images = rotate_and_flip(images, generator)
        patches = self.model.patchify(images)
        tokens, covered = self.model.draw_windows(len(image_index), generator)
        # the gradients of parts add up to those of all; on a CPU, smaller activations take less time and memory
        size = WINDOWS_PER_PASS if self.device.type == "cpu" else len(image_index)
        parts = zip(*(values.split(size) for values in (image_index, tokens, covered)), strict=True)

        optimizer, total = cast("LightningOptimizer", self.optimizers()), torch.zeros((), device=self.device)
        optimizer.zero_grad()
        for part in parts:
            loss = self._loss(patches, *part) * (len(part[0]) / len(image_index))
            self.manual_backward(loss)
            total += loss.detach()
        optimizer.step()
        return total

    def _loss(self, patches: Tensor, image_index: Tensor, tokens: Tensor, covered: Tensor) -> Tensor:
        """Mean loss of windows; the arguments are those of :meth:`InTraModel.inpaint`."""
        inpainted = self.model.inpaint(patches, image_index, tokens, covered)
        original = patches[image_index[:, None], tokens.gather(1, covered)].flatten(0, 1)
        return self.loss(self.model.pixels(inpainted), self.model.pixels(original))

    def _tell_if_long(self) -> None:
        """After the first steps, say in a line how long the run may take if that is many hours."""
        if len(self._step_times) == ESTIMATE_STEPS:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._step_times.append(time.monotonic())
        if len(self._step_times) < ESTIMATE_STEPS or not self.trainer.is_global_zero:
            return
        seconds_per_step = (self._step_times[-1] - self._step_times[0]) / (ESTIMATE_STEPS - 1)
        steps_per_epoch = self._num_training_images * self.windows_per_image / self.windows_per_step
        limits = [
            (cast("int", self.trainer.max_epochs) - self.current_epoch) * steps_per_epoch * seconds_per_step,
            (self.trainer.max_steps - self.trainer.global_step) * seconds_per_step,
            *(
                callback.time_remaining() or 0  # max_time
                for callback in self.trainer.callbacks  # type: ignore[attr-defined]
                if isinstance(callback, Timer)
            ),
        ]
        # the trainer's -1 stands for no limit
        hours = min((limit for limit in limits if limit >= 0), default=0) / 3600
        if hours > LONG_RUN_HOURS:
            logger.warning(
                "Training as asked may take up to %.0f hours on this machine, unless the held-out loss stops it "
                "earlier; `python -m anomalib_recon.quickstart` shows a small InTra in minutes.",
                hours,
            )

    def on_train_epoch_end(self) -> None:
        """Keep the weights of the best epoch; stop when the held-out loss does not fall any more."""
        loss = self._held_out_loss()
        if not math.isfinite(loss):
            msg = (
                f"The held-out loss is {loss} after epoch {self.current_epoch}; lower learning_rate "
                f"({self.learning_rate}) or use precision 32. The last checkpoint is from before."
            )
            raise RuntimeError(msg)
        self.log("held_out_loss", loss, prog_bar=True)
        self.held_out_losses.append(loss)
        best_epoch = self.held_out_losses.index(min(self.held_out_losses))
        epochs_since_best = len(self.held_out_losses) - 1 - best_epoch
        if epochs_since_best == 0:
            self._best_weights = self._copy_weights()
        if epochs_since_best >= self.patience:
            logger.info("The held-out loss has not fallen for %d epochs.", self.patience)
            self.trainer.should_stop = True
        if self.trainer.fit_loop.done:
            self._finish()

    def on_train_end(self) -> None:
        """Finish a training that something else than this module has stopped, and save it anew."""
        if self._fitted or not self.held_out_losses:
            return
        self._finish()
        save_anew(self.trainer)

    def _finish(self) -> None:
        """Restore the best weights, take the mean normal difference (eq. 17) and let the thresholds be set."""
        self.model.load_state_dict(self._best_weights)
        self._best_weights = {}
        self.model.normal_difference.copy_(self._mean_normal_difference())
        self._fitted = True
        self._deferred_validation.validate(self.trainer)

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        """Mean loss over all patches of the held-out images, each inpainted from its window as at inference."""
        total = torch.zeros((), device=self.device)
        for image in self._held_out_images[self.global_rank :: self.trainer.world_size]:
            with self.trainer.precision_plugin.forward_context():
                reconstruction = self.model.reconstruct(image[None])
            pair = (self.model.pixels(self.model.patchify(images)) for images in (reconstruction, image[None]))
            total += self.loss(*pair)
        return float(self.trainer.strategy.reduce(total, reduce_op="sum")) / len(self._held_out_images)

    @torch.no_grad()
    def _mean_normal_difference(self) -> Tensor:
        """Mean of ``diff`` over the normal training images, shape ``(1, 1, H, W)``."""
        total = torch.zeros_like(self.model.normal_difference)
        count = len(self._normal_set)
        for images in self._load(range(self.global_rank, count, self.trainer.world_size)):
            with self.trainer.precision_plugin.forward_context():
                reconstruction = self.model.reconstruct(images)
            total += self.model.anomaly_map_generator.difference(images, reconstruction.float()).sum(0, keepdim=True)
        return self.trainer.strategy.reduce(total, reduce_op="sum") / count

    def _load(self, indices: Sequence[int]) -> Iterator[Tensor]:
        """Batches of pre-processed normal training images, shape ``(b, 3, H, W)``."""
        transform = getattr(self.pre_processor, "transform", None)
        for images in load_images(self._normal_set, indices, self._train_loader):
            yield transform(images.to(self.device)) if transform else images.to(self.device)

    @property
    def _train_loader(self) -> DataLoader:
        return cast("DataLoader", self.trainer.train_dataloader)

    def validation_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images; see :meth:`test_step`."""
        return self.test_step(batch, batch_idx, *args, **kwargs)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> STEP_OUTPUT:
        """Score a batch of images; see :meth:`test_step`."""
        return self.test_step(batch, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images and keep their reconstruction for the pictures.

        Args:
            batch (Batch): Batch of B pre-processed images.
            batch_idx (int): Not used.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score``, ``anomaly_map`` and ``reconstruction`` of shape
                ``(B, 3, H, W)``.
        """
        del batch_idx, args, kwargs
        images = cast("Tensor", batch.image)
        reconstruction = self.model.reconstruct(images).float()
        with torch.autocast(self.device.type, enabled=False):
            predictions = self.model.score(images, reconstruction)
        scored = batch.update(**predictions._asdict())
        scored.reconstruction = reconstruction.clamp(0, 1).cpu()
        return scored

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what an interrupted run needs to continue as if it had not been."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["intra"] = {
            "held_out_losses": self.held_out_losses,
            "held_out_paths": self._held_out_paths,
            "best_weights": self._best_weights,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what :meth:`on_save_checkpoint` saved.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is of another model, or of a network with other arguments.
        """
        refuse_other_networks(checkpoint, "InTra", self.hparams, NETWORK_ARGUMENTS)
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["intra"]
        self.held_out_losses = state["held_out_losses"]
        self._held_out_paths = state["held_out_paths"]
        self._best_weights = state["best_weights"]

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize images; their values stay in [0, 1], as they are also the target of the reconstruction.

        Args:
            image_size (tuple[int, int] | None): Height and width.
                Defaults to ``None``, which means 256 x 256.

        Returns:
            PreProcessor: Pre-processor.
        """
        return ExactResizePreProcessor(Resize(image_size or DEFAULT_IMAGE_SIZE, antialias=True))

    @staticmethod
    def configure_evaluator() -> RawScoreEvaluator:
        """Image and pixel AUROC and F1 score, and pixel AUPRO, on raw scores."""
        return RawScoreEvaluator()

    @classmethod
    def configure_visualizer(cls) -> ReconstructionVisualizer:
        """Show image, ground truth, reconstruction, anomaly map and predicted mask."""
        return ReconstructionVisualizer()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """None: Lightning's own default, at most 1000 epochs, leaves the end to ``patience``."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images."""
        return LearningType.ONE_CLASS


def find_image_size(
    image_size: int | Sequence[int] | None, pre_processor: PreProcessor | bool, patch_size: int, window_size: int
) -> tuple[int, int]:
    """Find the size of the images from the arguments of the model.

    Args:
        image_size (int | Sequence[int] | None): Size as given by the user.
        pre_processor (PreProcessor | bool): Pre-processor as given by the user.
        patch_size (int): Side of a patch.
        window_size (int): Side of a window.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        ValueError: If the two sizes disagree.
    """
    size = resolve_image_size(image_size, pre_processor, DEFAULT_IMAGE_SIZE)
    if image_size is None:
        try:
            check_sizes(size, patch_size, window_size)
        except ValueError:
            # also for anomalib's tiled ensemble, which builds a model for 10 x 10 pixels only to ask for its evaluator
            return DEFAULT_IMAGE_SIZE
    return size
