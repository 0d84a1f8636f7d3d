# SPDX-License-Identifier: Apache-2.0

"""PatchAE in anomalib.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_recon.models import PatchAE
    >>> engine = Engine(max_epochs=100)  # doctest: +SKIP
    >>> engine.train(model=PatchAE(), datamodule=MVTecAD(category="screw"))  # doctest: +SKIP

Paper:
    Patch-wise Auto-Encoder for Visual Anomaly Detection, https://arxiv.org/abs/2308.00429

See Also:
    :class:`anomalib_recon.models.patch_ae.torch_model.PatchAEModel`: the network, usable alone.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from anomalib_recon.layers import ScaleBy, check_finite, check_positive, check_share, check_whole
from anomalib_recon.layers.whitening import VECTORS_PER_PART
from anomalib_recon.models.base import ReconstructionModule
from anomalib_recon.training import FeatureCache, map_images, own_share

from .defects import KINDS, ArtificialDefects
from .loss import HybridLoss
from .normal_bank import draw_vectors, select_coreset, stack_parts
from .torch_model import PatchAEModel

logger = logging.getLogger(__name__)

# distances computed to select the bank, above which a warning is logged: they take many minutes on a CPU
MANY_DISTANCES = 10**10


class PatchAE(ReconstructionModule, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Auto-encoder of patches, trained on images with artificial defects; scores are distances to normal features.

    When training ends, the features of the normal training images, without defects, become the bank that images are
    compared with; then validation, which sets the thresholds, runs once. Images have values in [0, 1]: the model
    itself normalises them for its backbone.

    Args:
        backbone (str): CNN of timm, with or without the tag of its weights.
            Defaults to ``"wide_resnet101_2"``.
        layers (Sequence[str] | None): Stages whose features are concatenated, by their names in timm. ``None`` stands
            for the last four.
            Defaults to ``None``.
        pre_trained (bool): Start from timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to start from instead.
            Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels, multiples of
            ``patch_size``; an int means a square. ``None`` takes the size of ``pre_processor``, or else 256 x 256.
            Defaults to ``None``.
        patch_size (int): Side of a patch in pixels.
            Defaults to ``8``.
        embed_dim (int | None): Width D of the vectors. ``None`` leaves the projection out: the vectors are those of the
            concatenated stages.
            Defaults to ``512``.
        trained_stages (int): Number of these stages that are trained, counted from the last one. With all of them, what
            comes before them is trained, too; with 0 the backbone stays as it is.
            Defaults to ``1``.
        patch_wise (bool): Decode each vector alone. Otherwise the decoder has 3 x 3 convolutions in place of the
            1 x 1 (ablation).
            Defaults to ``True``.
        alpha (float): Weight, in [0, 1], of the pixels normalised within their patch in the loss; that of the plain
            pixels is ``1 - alpha``.
            Defaults to ``0.5``.
        defect_probability (float): Probability that a training image gets an artificial defect.
            Defaults to ``0.5``.
        defect_kinds (Sequence[str]): Kinds of defects, of ``"patch"``, ``"scar"``, ``"noise"`` and ``"blob"``.
            Defaults to all.
        defect_size_range (tuple[float, float]): Least and greatest area, as fractions of that of the image.
            Defaults to ``(0.001, 0.05)``.
        defect_aspect_range (tuple[float, float]): Least and greatest length by breadth, but for scars.
            Defaults to ``(0.3, 3.3)``.
        defect_angle_range (tuple[float, float]): Least and greatest angle, in degrees.
            Defaults to ``(0.0, 180.0)``.
        defect_position_range (tuple[float, float]): Least and greatest place of the centre, as fractions of height and
            width.
            Defaults to ``(0.0, 1.0)``.
        learning_rate (float): Learning rate of Adam for the new layers; see :meth:`configure_optimizers`.
            Defaults to ``1e-3``.
        backbone_learning_rate (float): The same for the weights of the backbone.
            Defaults to ``2e-5``.
        coreset_ratio (float): Share of the normal features, or of ``coreset_candidates``, in (0, 1], that becomes the
            bank; 1 keeps all.
            Defaults to ``0.1``.
        coreset_candidates (int | None): Normal features that the bank is selected from, drawn at random, the same share
            from each image. Bounds the memory at the end of the training, and the time to select. ``None`` keeps all.
            Defaults to ``None``.
        feature_scale (Literal["none", "stage", "channel", "whiten"]): Bring the stages to one scale: that of each stage
            or channel, or of all principal components.
            Defaults to ``"channel"``.
        score_by (Literal["features", "reconstruction"]): Distance of the vectors to the normal ones, or error of the
            reconstruction, without a bank (ablation).
            Defaults to ``"features"``.
        sigma (float): Standard deviation of the Gaussian that smooths the map, in pixels; 0 stands for none.
            Defaults to ``4.0``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 the
            score is the maximum.
            Defaults to ``0.0``.
        vectors_per_chunk (int): Vectors of the bank that are compared with those of an image at a time. Bounds memory,
            changes no result.
            Defaults to ``4096``.
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
        FileNotFoundError: If ``backbone_weights`` is not a file.
        ConnectionError: If the backbone's weights can be had neither from the local cache nor from the network.
    """

    network = PatchAEModel
    free_arguments = ("trained_stages", "vectors_per_chunk")
    score_arguments = ("sigma", "top_fraction")
    defaulted_arguments = ("layers",)
    needs_datamodule = True

    def __init__(
        self,
        backbone: str = "wide_resnet101_2",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int = 8,
        embed_dim: int | None = 512,
        trained_stages: int = 1,
        patch_wise: bool = True,
        alpha: float = 0.5,
        defect_probability: float = 0.5,
        defect_kinds: Sequence[str] = KINDS,
        defect_size_range: tuple[float, float] = (0.001, 0.05),
        defect_aspect_range: tuple[float, float] = (0.3, 3.3),
        defect_angle_range: tuple[float, float] = (0.0, 180.0),
        defect_position_range: tuple[float, float] = (0.0, 1.0),
        learning_rate: float = 1e-3,
        backbone_learning_rate: float = 2e-5,
        coreset_ratio: float = 0.1,
        coreset_candidates: int | None = None,
        feature_scale: ScaleBy = "channel",
        score_by: Literal["features", "reconstruction"] = "features",
        sigma: float = 4.0,
        top_fraction: float = 0.0,
        vectors_per_chunk: int = 4096,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer)
        check_finite(backbone_learning_rate=backbone_learning_rate)
        check_share(coreset_ratio=coreset_ratio)
        check_positive(learning_rate=learning_rate)
        if backbone_learning_rate <= 0:
            msg = (
                f"backbone_learning_rate must be positive, got {backbone_learning_rate}; to keep the backbone as it "
                "is pass trained_stages=0."
            )
            raise ValueError(msg)

        if coreset_candidates is not None:
            check_whole(coreset_candidates=coreset_candidates)

        self.model: PatchAEModel = self.build_network()
        self.loss = HybridLoss(alpha, patch_size)
        self.defects = ArtificialDefects(
            probability=defect_probability,
            kinds=defect_kinds,
            size_range=defect_size_range,
            aspect_range=defect_aspect_range,
            angle_range=defect_angle_range,
            position_range=defect_position_range,
        )
        self.scales_features = feature_scale != "none"
        self.feature_cache = FeatureCache(0, "defects are drawn on images")
        self.learning_rate = learning_rate
        self.backbone_learning_rate = backbone_learning_rate
        self.coreset_ratio = coreset_ratio
        self.coreset_candidates = coreset_candidates

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with smaller steps for the weights that come from ImageNet, and for the layer with the most inputs.

        The first convolution sums over the channels of all stages, often thousands. Adam moves each weight by about the
        learning rate, and so an output by the more, the more inputs it has: the rate of this layer is lowered until its
        outputs move no farther than those of a layer with ``embed_dim`` inputs.
        """
        model = self.model
        first, *others = [layer for layer in (*model.project, *model.decoder) if isinstance(layer, nn.Conv2d)]
        embed_dim, num_channels = first.weight.shape[:2]
        groups: list[dict[str, Any]] = [
            {"params": [weight for layer in others for weight in layer.parameters()]},
            {"params": list(first.parameters()), "lr": self.learning_rate * min(1, embed_dim / num_channels)},
            {
                "params": [weight for weight in model.backbone.parameters() if weight.requires_grad],
                "lr": self.backbone_learning_rate,
            },
        ]
        return torch.optim.Adam(groups, lr=self.learning_rate)

    def start_features(self, batch: Batch) -> Tensor:
        """The stages of a batch of images, before they are scaled."""
        return self.model.extract_stages(self.tiles(batch))

    def start(self, features: Iterable[Tensor]) -> None:
        """Take mean and variance of each channel over the normal training images.

        Args:
            features (Iterable[Tensor]): Stages of shape ``(b, C, h, w)``.
        """
        self.model.scale.fit(features)

    def on_train_start(self) -> None:
        """Say before training, not after it, that the bank would be empty or take long to select.

        Raises:
            ValueError: If it would be empty.
        """
        if self.model.score_by == "reconstruction":
            return
        images = self.training_images()
        num_images = len(images)
        num_patches = self.model.num_patches * len(self.model.tile(cast("Tensor", images[0].image)[None]))  # of tiles
        num_candidates = num_images * min(num_patches, self._candidates_per_image(num_images) or num_patches)
        num_selected = int(self.coreset_ratio * num_candidates)
        if num_selected == 0:
            msg = f"coreset_ratio={self.coreset_ratio} leaves none of the {num_candidates} normal features; raise it."
            raise ValueError(msg)
        if self.coreset_ratio < 1 and num_selected * num_candidates > MANY_DISTANCES:
            logger.warning(
                "When training ends, %d of %d vectors are selected for the bank, by as many passes over all of them; "
                "to take less time, lower coreset_ratio (%g) or pass coreset_candidates.",
                num_selected, num_candidates, self.coreset_ratio,
            )  # fmt: skip

    def on_train_epoch_start(self) -> None:
        """Forget the bank of other weights, which a checkpoint or an earlier training has left."""
        self.model.bank.fill(torch.empty(0, 0, device=self.device))

    def training_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Paste defects on the images of a batch and rebuild them, defects included.

        Args:
            batch (Batch): Batch of B pre-processed training images.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            STEP_OUTPUT: The loss.
        """
        del args, kwargs
        images = self.tiles(batch)
        seed = int(torch.randint(2**31, ())) + self.global_rank
        images, _ = self.defects(images, torch.Generator(self.device).manual_seed(seed))
        loss = self.loss(images, self.model.reconstruct(self.model.embed(images)))
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(images))
        return loss

    @torch.no_grad()
    def finish(self) -> None:
        """Fill the bank with the features of the normal training images, each process with its share of them."""
        if self.model.score_by == "reconstruction":
            return
        images = self.training_images()
        # a process without an image repeats the first: a vector more than once changes no distance
        share = own_share(self.trainer, images)
        share = share if len(share) else images.subsample([0])
        per_image = self._candidates_per_image(len(images))

        def candidates(batch: Batch) -> Tensor:
            num_images = len(cast("Tensor", batch.image))
            codes = self.model.embed(self.tiles(batch)).float().movedim(1, -1)  # (b, h, w, D), of all tiles
            return draw_vectors(codes.reshape(num_images, -1, codes.shape[-1]), per_image)

        vectors = stack_parts(map_images(self.trainer, self, share, candidates), len(share)).flatten(0, 1)  # (M, D)
        if self.trainer.world_size > 1:
            vectors = torch.cat(gather_all_tensors(vectors))
        self.model.whitening.fit(vectors)
        for part in vectors.split(VECTORS_PER_PART):  # in place, as there may be gigabytes
            part.copy_(self.model.whitening.whiten(part))
        # one process selects, for all to have the same
        coreset = select_coreset(vectors, self.coreset_ratio).cpu() if self.trainer.is_global_zero else torch.empty(0)
        self.model.bank.fill(self.trainer.strategy.broadcast(coreset).to(self.device))

    def _candidates_per_image(self, num_images: int) -> int | None:
        """Normal features of an image that the bank is selected from; ``None`` stands for all."""
        return None if self.coreset_candidates is None else max(1, self.coreset_candidates // num_images)

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images, whose codes are compared with those of the bank, not with a reconstruction.

        Args:
            batch (Batch): Batch of B pre-processed images.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score``, ``anomaly_map`` and ``reconstruction``.
        """
        del args, kwargs
        images = self.tiles(batch)
        codes = self.model.embed(images)
        reconstruction = self.model.reconstruct(codes)
        by_features = self.model.score_by == "features"
        predictions = self.model.compare(codes) if by_features else self.model.compare_pixels(images, reconstruction)
        return self.scored(batch, predictions, reconstruction)
