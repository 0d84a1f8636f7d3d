# SPDX-License-Identifier: Apache-2.0

"""SAAE: the self-attention autoencoder in anomalib.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_recon.models import SAAE
    >>> model = SAAE(mlp_ratio=2)  # doctest: +SKIP
    >>> Engine(max_epochs=700).train(model=model, datamodule=MVTecAD(category="screw"))  # doctest: +SKIP

Paper:
    Self-Attention Autoencoder for Anomaly Segmentation, Yang Yang, Preprints 2021.

See Also:
    :class:`anomalib_recon.models.saae.torch_model.SAAEModel`: the network, usable alone.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from anomalib_recon.layers import FeatureCovariance, ScaleBy, check_positive, check_share
from anomalib_recon.models.base import ReconstructionModule
from anomalib_recon.training import FeatureCache, one_cycle

from .anomaly_map import Distance
from .loss import SAAELoss
from .torch_model import DEFAULT_BACKBONE, DEFAULT_IMAGE_SIZE, SAAEModel

logger = logging.getLogger(__name__)


class SAAE(ReconstructionModule, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Self-attention autoencoder, trained to reconstruct a frozen backbone's features of normal images.

    Before training, the latent width V is found by a principal component analysis of the features of the normal
    training images, unless ``latent_dim`` gives it. A checkpoint knows its V.

    Images have values in [0, 1]: the model itself normalises them for its backbone. Validation, which sets the
    thresholds, runs once, when training ends.

    Args:
        backbone (str): Vision transformer or CNN of timm, with or without the tag of its weights.
            Defaults to ``"vit_base_patch16_384.orig_in21k_ft_in1k"``.
        layers (Sequence[str] | None): Layers whose outputs are concatenated. Of a vision transformer ``"patch_embed"``,
            ``"blocks.0"``, ``"blocks.1"`` and so on; of a CNN timm's stages, or any modules. ``None`` stands for the
            linear projection and the first four blocks, or for all stages of a CNN.
            Defaults to ``None``.
        pre_trained (bool): Use timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to use instead.
            Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels; an int means
            a square. ``None`` takes the size of ``pre_processor``, or else 384 x 384.
            Defaults to ``None``.
        feature_stride (int | None): Side of the region that a cell of the feature map describes, in pixels. ``None``
            stands for the patch size of a vision transformer, which allows no other, and for 8 with a CNN.
            Defaults to ``None``.
        latent_dim (int | None): Latent width V; ``None`` has it found.
            Defaults to ``None``.
        explained_variance (float): Fraction of the features' variance that V principal components hold.
            Defaults to ``0.8``.
        patch_size (int): Side p of the autoencoder's patches, in cells of the feature map.
            Defaults to ``1``.
        num_heads (int): Heads of each attention.
            Defaults to ``3``.
        depth (int): Number of encoder layers, and of decoder layers.
            Defaults to ``1``.
        mlp_ratio (int): Inner width of the feed-forward networks over V: 1 for textures, 2 for objects.
            Defaults to ``1``.
        transformer (bool | Literal["author"]): Have a transformer between the convolutions, that of the paper or, with
            ``"author"``, that of the author's code; without it the autoencoder is that of the ablation "w/o SAAE".
            Defaults to ``True``.
        normalize (bool): Shift and scale images by the mean and deviation that the backbone was trained with; ``False``
            is for vision transformers.
            Defaults to ``True``.
        backbone_dropout (float): Probability of dropout in a vision transformer while the autoencoder trains: a noise
            on features and target alike. They are then not cached.
            Defaults to ``0.0``.
        align_corners (bool): Enlarge the map so that the centres of its corner cells lie on the image's corners.
            Defaults to ``False``.
        feature_scale (Literal["none", "stage", "channel", "whiten"]): Bring features to one scale: that of each stage
            or channel, or of all principal components.
            Defaults to ``"none"``.
        distance (Literal["norm", "mse", "mahalanobis"]): Compare feature vectors by the L2 norm of their difference
            (eqs. 2 and 3), by its mean square, or in units of the residuals of normal images at that place; these are
            taken when training ends.
            Defaults to ``"norm"``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 the
            score is the maximum.
            Defaults to ``0.0``.
        learning_rate (float): Learning rate of Adam.
            Defaults to ``1e-4``.
        use_one_cycle (bool): Let the learning rate rise from a 25th and fall to nearly 0 within the training.
            Defaults to ``False``.
        feature_cache_gib (float): Features of the training images are computed once, at the start of a fit, and kept in
            half precision, in up to so many GiB of memory a process. More, or 0, has them computed anew in each epoch,
            as augmentations do on their own: choose 0 if a callback or a dataset of yours changes training images at
            random.
            Defaults to ``2.0``.
        pre_processor (PreProcessor | bool): Pre-processor; it must leave images in [0, 1].
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

    network = SAAEModel
    default_image_size = DEFAULT_IMAGE_SIZE
    free_arguments = ("latent_dim",)
    score_arguments = ("top_fraction",)
    defaulted_arguments = ("layers", "feature_stride")
    added_arguments: ClassVar[dict[str, Any]] = {"normalize": True, "backbone_dropout": 0.0, "align_corners": False}

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        feature_stride: int | None = None,
        latent_dim: int | None = None,
        explained_variance: float = 0.8,
        patch_size: int = 1,
        num_heads: int = 3,
        depth: int = 1,
        mlp_ratio: int = 1,
        transformer: bool | Literal["author"] = True,
        normalize: bool = True,
        backbone_dropout: float = 0.0,
        align_corners: bool = False,
        feature_scale: ScaleBy = "none",
        distance: Distance = "norm",
        top_fraction: float = 0.0,
        learning_rate: float = 1e-4,
        use_one_cycle: bool = False,
        feature_cache_gib: float = 2.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer)
        check_positive(learning_rate=learning_rate)
        check_share(explained_variance=explained_variance)
        self.model: SAAEModel = self.build_network()
        self.loss = SAAELoss(distance)
        self.explained_variance = explained_variance
        self.learning_rate = learning_rate
        self.use_one_cycle = use_one_cycle
        self.scales_features = feature_scale != "none"
        self.needs_datamodule = self.scales_features or distance == "mahalanobis"
        self.feature_cache = FeatureCache(
            feature_cache_gib, f"backbone_dropout={backbone_dropout} changes features" if backbone_dropout else None
        )
        self._given_latent_dim = latent_dim

    def start_features(self, batch: Batch) -> Tensor:
        """Features of a batch of images, before they are scaled."""
        return self.model.backbone(self.tiles(batch))

    def targets(self, features: Tensor) -> Tensor:
        """Scale features of shape ``(B, U, H_0, W_0)``."""
        return self.model.scale(features)

    def start(self, features: Iterable[Tensor]) -> None:
        """Take the scale of the features of the normal training images, and find V from them, unless it is given.

        Args:
            features (Iterable[Tensor]): Features of shape ``(b, U, H_0, W_0)``.
        """
        self.model.scale.fit(features)
        if self.model.autoencoder is not None:
            return
        covariance = FeatureCovariance(self.model.backbone.num_channels)
        for batch in features:
            covariance.update(self.model.scale.standardize(batch))
        latent_dim = covariance.num_components(self.explained_variance)
        logger.info("%d principal components hold %g of the variance.", latent_dim, self.explained_variance)
        self._build_autoencoder(latent_dim)

    def _build_autoencoder(self, latent_dim: int) -> None:
        """Build the autoencoder, and let checkpoints know its size."""
        self.model.build_autoencoder(latent_dim)
        self.hparams["latent_dim"] = latent_dim

    def finish(self) -> None:
        """Measure the residuals of the normal training images, if distances are in their units."""
        if (distance := self.model.anomaly_map_generator.mahalanobis) is not None:
            distance.fit(self.residuals())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Adam, as in section 4.1.2, with a constant learning rate or one cycle.

        Raises:
            ValueError: If there is no autoencoder yet, because V is not known.
        """
        if self.model.autoencoder is None:
            msg = (
                "latent_dim must be given when training without a datamodule, or on an Engine that has trained another "
                "model; pass it, a datamodule, or a new Engine."
            )
            raise ValueError(msg)
        optimizer = torch.optim.Adam(self.model.autoencoder.parameters(), lr=self.learning_rate)
        return one_cycle(optimizer, self) if self.use_one_cycle else optimizer  # type: ignore[return-value]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the autoencoder whose weights the checkpoint holds.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is of another model, or of a network with other arguments.
        """
        self.refuse_other_networks(checkpoint)
        latent_dim = checkpoint["hyper_parameters"]["latent_dim"]
        if self._given_latent_dim not in {None, latent_dim}:
            msg = (
                f"The checkpoint needs a model with latent_dim={latent_dim} (not {self._given_latent_dim}); pass it, "
                "on the command line as --model.latent_dim, or use SAAE.load_from_checkpoint."
            )
            raise ValueError(msg)
        if latent_dim is not None and latent_dim != self.hparams["latent_dim"]:
            self._build_autoencoder(latent_dim)
        super().on_load_checkpoint(checkpoint)
