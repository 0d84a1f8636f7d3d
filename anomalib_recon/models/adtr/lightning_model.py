# SPDX-License-Identifier: Apache-2.0

"""ADTR and ADTR+ in anomalib.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_recon.models import ADTR
    >>> engine = Engine(max_epochs=500)  # doctest: +SKIP
    >>> engine.train(model=ADTR(), datamodule=MVTecAD(category="screw", train_batch_size=16))  # doctest: +SKIP

Paper:
    ADTR: Anomaly Detection Transformer with Feature Reconstruction, https://arxiv.org/abs/2209.01816

See Also:
    :class:`anomalib_recon.models.adtr.torch_model.ADTRModel`: the network, usable alone.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from anomalib.data import AnomalibDataset, Batch
from anomalib.data.utils import LabelName
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.config import to_tuple
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anomalib_recon.layers import ScaleBy, check_fraction, check_not_negative, check_positive, check_whole
from anomalib_recon.models.base import ReconstructionModule
from anomalib_recon.training import FeatureCache, load_checkpoint, one_cycle

from .anomaly_map import Distance
from .confetti import ConfettiNoise
from .loss import ImageLoss, NormalLoss, PixelLoss
from .torch_model import ADTRModel


class ADTR(ReconstructionModule, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Reconstruction of a frozen backbone's features by a transformer with a learned query.

    With ``labels=None`` it is ADTR, trained on normal images. With ``labels="pixel"`` or ``"image"`` it is ADTR+, which
    starts from the weights of an ADTR (``normal_checkpoint``) and also learns to rebuild anomalies badly. The anomalies
    are drawn on normal images (``confetti``), come from the training set (as with the datamodule ``LabelledFolder``),
    or both.

    Images have values in [0, 1]: the model itself normalises them for its backbone. Validation, which sets the
    thresholds, runs once, when training ends.

    Args:
        backbone (str): CNN of timm, with or without the tag of its weights, or ``"pixels"`` for the pixels of each
            cell as its features.
            Defaults to ``"tf_efficientnet_b4.aa_in1k"``.
        layers (Sequence[str] | None): Stages, by their names in timm, or any modules, whose features are concatenated.
            ``None`` stands for all stages.
            Defaults to ``None``.
        pre_trained (bool): Use timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to use instead.
            Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels; an int means
            a square. ``None`` takes the size of ``pre_processor``, or else 256 x 256.
            Defaults to ``None``.
        feature_size (int | tuple[int, int] | None): Height and width of the feature map: those of one of the
            backbone's stages. ``None`` stands for the stage with stride 16.
            Defaults to ``None``.
        embed_dim (int): Width of the tokens.
            Defaults to ``256``.
        depth (int): Number of encoder layers, and of decoder layers.
            Defaults to ``4``.
        num_heads (int): Number of heads of each attention.
            Defaults to ``8``.
        mlp_dim (int): Hidden width of the feed-forward networks.
            Defaults to ``1024``.
        dropout (float): Fraction of the output of each attention and feed-forward network that is dropped in training.
            Defaults to ``0.1``.
        query (Literal["learned", "encoder"]): Decode a learned query embedding, or the encoder embedding.
            Defaults to ``"learned"``.
        attention (Literal["multihead", "concat"]): Multi-head attention, or concatenation and projection.
            Defaults to ``"multihead"``.
        reconstruction (Literal["transformer", "cnn"]): Rebuild features with the transformer, or with residual blocks.
            Defaults to ``"transformer"``.
        patch_size (int): Side of a token, in cells of the feature map; divides h and w.
            Defaults to ``1``.
        hole_size (int): Side of the square of tokens around its own that a query does not see, odd, so that it must
            rebuild its features from those around. 0 stands for none, as in the paper.
            Defaults to ``0``.
        pool_size (int): Side of the window, in pixels, over which the map is averaged for the image's score.
            Defaults to ``16``.
        top_fraction (float): Share of the averaged map, from the highest value down, whose mean is the image's score;
            at 0 the score is the maximum.
            Defaults to ``0.0``.
        feature_scale (Literal["none", "stage", "channel", "whiten"]): Bring features to one scale: that of each stage
            or channel, or of all principal components.
            Defaults to ``"none"``.
        distance (Literal["norm", "mahalanobis"]): Length of a difference of features: its L2 norm (eq. 3), or in units
            of the residuals of normal images at that place, which are taken when training ends.
            Defaults to ``"norm"``.
        labels (Literal["pixel", "image"] | None): Train ADTR+ with the masks (L_px) or with the labels (L_img) of
            anomalies; ``None`` trains ADTR (L_norm).
            Defaults to ``None``.
        normal_checkpoint (str | Path | None): Checkpoint of the ADTR that ADTR+ starts from.
            Defaults to ``None``.
        confetti (float): Probability with which ADTR+ draws confetti noise on a normal training image.
            Defaults to ``0.0``.
        alpha (float): Weight of the push in L_px and L_img.
            Defaults to ``0.003``.
        top_k (int): Number of cells k of L_img.
            Defaults to ``20``.
        learning_rate (float): Initial learning rate of AdamW.
            Defaults to ``1e-4``.
        weight_decay (float): Weight decay of AdamW.
            Defaults to ``1e-4``.
        lr_drop_epoch (int): Epoch after which the learning rate is a tenth; 200 for ADTR+ (section 4.2).
            Defaults to ``400``.
        use_one_cycle (bool): Let the learning rate rise from a 25th and fall to nearly 0 within the training, instead.
            Defaults to ``False``.
        feature_cache_gib (float): Features of the training images are computed once, at the start of a fit, and kept in
            half precision, in up to so many GiB of memory a process. More, or 0, has them computed anew in each epoch,
            as confetti and augmentations do on their own: choose 0 if a callback or a dataset of yours changes training
            images at random.
            Defaults to ``2.0``.
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

    network = ADTRModel
    free_arguments = ("dropout",)
    score_arguments = ("pool_size", "top_fraction")
    defaulted_arguments = ("layers", "feature_size")
    added_arguments: ClassVar[dict[str, Any]] = {"reconstruction": "transformer"}

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        feature_size: int | tuple[int, int] | None = None,
        embed_dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        mlp_dim: int = 1024,
        dropout: float = 0.1,
        query: Literal["learned", "encoder"] = "learned",
        attention: Literal["multihead", "concat"] = "multihead",
        reconstruction: Literal["transformer", "cnn"] = "transformer",
        patch_size: int = 1,
        hole_size: int = 0,
        pool_size: int = 16,
        top_fraction: float = 0.0,
        feature_scale: ScaleBy = "none",
        distance: Distance = "norm",
        labels: Literal["pixel", "image"] | None = None,
        normal_checkpoint: str | Path | None = None,
        confetti: float = 0.0,
        alpha: float = 0.003,
        top_k: int = 20,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-4,
        lr_drop_epoch: int = 400,
        use_one_cycle: bool = False,
        feature_cache_gib: float = 2.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # assigned before the arguments are saved as hyper-parameters
        feature_size = None if feature_size is None else to_tuple(feature_size)  # type: ignore[arg-type]  # hints at int alone
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer)
        check_whole(lr_drop_epoch=lr_drop_epoch)
        check_positive(alpha=alpha, learning_rate=learning_rate)
        check_not_negative(weight_decay=weight_decay)
        check_fraction(confetti=confetti)
        if not labels and (confetti or normal_checkpoint):
            msg = (
                f"confetti={confetti} and normal_checkpoint={normal_checkpoint} are for ADTR+, but labels is None; "
                "pass labels='pixel' or labels='image', or leave them out."
            )
            raise ValueError(msg)

        self.model: ADTRModel = self.build_network()
        self.loss = _choose_loss(labels, alpha, top_k, math.prod(self.model.feature_size))
        self.confetti = ConfettiNoise(confetti) if confetti else None
        self.labels = labels
        self.loads_start = labels is not None
        # the engine moves the link `latest` before the fit that reads it
        self.normal_checkpoint = normal_checkpoint and Path(normal_checkpoint).resolve()
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.lr_drop_epoch = lr_drop_epoch
        self.use_one_cycle = use_one_cycle
        self.scales_features = feature_scale != "none"
        self.needs_datamodule = self.scales_features or distance == "mahalanobis"
        self.feature_cache = FeatureCache(feature_cache_gib, "confetti is drawn on images" if confetti else None)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and a tenth of the learning rate after ``lr_drop_epoch`` epochs (section 4.2), or one cycle."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay)
        if self.use_one_cycle:
            return one_cycle(optimizer, self)  # type: ignore[return-value]
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [self.lr_drop_epoch])]

    def initialize(self) -> None:
        """Start ADTR+ from an ADTR.

        Raises:
            ValueError: If ``normal_checkpoint`` is not the checkpoint of an ADTR with the same network.
        """
        if self.normal_checkpoint is None or not Path(self.normal_checkpoint).is_file():
            msg = (
                f"normal_checkpoint={self.normal_checkpoint} is not a file; ADTR+ starts from the checkpoint of an "
                "ADTR trained with labels=None."
            )
            raise ValueError(msg)
        checkpoint = load_checkpoint(self.normal_checkpoint, "normal_checkpoint")
        try:
            self.refuse_other_networks(checkpoint)
            self.refuse_other_tensors(checkpoint)
        except ValueError as error:
            msg = f"normal_checkpoint={self.normal_checkpoint} cannot be started from. {error}"
            raise ValueError(msg) from error
        weights = {key: value for key, value in checkpoint["state_dict"].items() if key.startswith("model.")}
        self.load_state_dict(weights, strict=False)

    def start_features(self, batch: Batch) -> Tensor:
        """Features of a batch of images, before they are scaled."""
        return self.model.extract(self.tiles(batch))

    def start(self, features: Iterable[Tensor]) -> None:
        """Take the scale of the features of the normal training images; ADTR+ has that of its ADTR.

        Args:
            features (Iterable[Tensor]): Features of shape ``(b, C, h, w)``.
        """
        self.model.scale.fit(features)

    def targets(self, features: Tensor) -> Tensor:
        """Scale features of shape ``(B, C, h, w)``."""
        return self.model.scale(features)

    def finish(self) -> None:
        """Measure the residuals of the normal training images, if distances are in their units."""
        if (distance := self.model.anomaly_map_generator.mahalanobis) is not None:
            distance.fit(self.residuals())

    def training_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Compute what the loss needs of a training batch.

        Args:
            batch (Batch): Batch of B pre-processed images.

        Returns:
            tuple[Tensor, ...]: Features of shape ``(B, C, h, w)``, followed by masks of shape ``(B, H, W)`` for
            ``labels="pixel"``, or by labels of shape ``(B,)`` for ``labels="image"``.
        """
        images, masks, labels = self._anomalies(batch)
        targets = {None: (), "pixel": (masks,), "image": (labels,)}[self.labels]
        return self.model.extract(images), *targets

    def _anomalies(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W), masks (B, H, W) and labels (B,) of a batch, confetti included."""
        images = self.tiles(batch)
        labels = torch.zeros(len(images), dtype=torch.bool, device=self.device)
        masks = torch.zeros_like(images[:, 0], dtype=torch.bool)
        if batch.gt_mask is not None:
            given = batch.gt_mask.bool()
            masks = masks | (given if self.tiler is None else self.tiler.tile(given[:, None].float())[:, 0].bool())
        if batch.gt_label is not None:  # a tile is anomalous if its part of the mask is
            labels = labels | (batch.gt_label.bool() if self.tiler is None else masks.flatten(1).any(dim=1))
        if self.confetti:
            seed = int(torch.randint(2**31, ())) + self.global_rank  # other confetti in each process
            noisy, drawn = self.confetti(images, torch.Generator().manual_seed(seed))
            images = torch.where(labels[:, None, None, None], images, noisy)
            masks = masks | drawn & ~labels[:, None, None]
            labels = labels | drawn.any(dim=(1, 2))
        return images, masks, labels

    def check_tiles(self) -> None:
        """Compare the sizes of images, tiles and network.

        Raises:
            ValueError: If they do not fit, or anomalies are labelled by image.
        """
        super().check_tiles()
        if self.tiler is not None and self.labels == "image":
            msg = "labels='image' does not say which tile of an image is anomalous; pass labels='pixel', or no tiler."
            raise ValueError(msg)

    def check_training_set(self, dataset: AnomalibDataset) -> None:
        """Compare the training set with ``labels``.

        Args:
            dataset (AnomalibDataset): Training set.

        Raises:
            ValueError: If it lacks anomalies or their masks, or has anomalies without ``labels``.
        """
        anomalous = dataset.samples[dataset.samples.label_index == LabelName.ABNORMAL]
        if not self.labels and len(anomalous):
            msg = (
                f"labels=None trains on normal images alone, but the training set has {len(anomalous)} anomalous ones; "
                "pass labels='pixel' or labels='image', or leave them out."
            )
            raise ValueError(msg)
        if self.labels and not self.confetti and not len(anomalous):
            msg = (
                f"labels={self.labels!r} trains ADTR+, which needs anomalies, but the training set has none; pass "
                "confetti=0.5, or anomalies by a datamodule such as LabelledFolder."
            )
            raise ValueError(msg)

        if self.labels == "pixel" and len(anomalous) and dataset.task != "segmentation":
            msg = (
                "labels='pixel' needs a mask for each anomalous training image, but the training set has none, or not "
                "for all; give the masks (train_mask_dir of LabelledFolder), or pass labels='image'."
            )
            raise ValueError(msg)


def _choose_loss(labels: str | None, alpha: float, top_k: int, num_cells: int) -> NormalLoss | PixelLoss | ImageLoss:
    if labels is None:
        return NormalLoss()
    if labels == "pixel":
        return PixelLoss(alpha)
    if labels != "image":
        msg = f"labels must be None, 'pixel' or 'image', got {labels!r}."
        raise ValueError(msg)
    check_whole(top_k=top_k)
    if top_k > num_cells:
        msg = f"top_k must be from 1 to the {num_cells} cells of the feature map, got {top_k}."
        raise ValueError(msg)
    return ImageLoss(alpha, top_k)
