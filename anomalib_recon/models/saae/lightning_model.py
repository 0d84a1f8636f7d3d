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
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib import LearningType
from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torchvision.transforms.v2 import Resize
from tqdm.auto import tqdm

from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models.components import (
    BackboneInCheckpoint,
    CachedBatch,
    CurrentOpsetExport,
    FeatureCache,
    ValidationAtEnd,
    check_finite,
    check_training_files,
    guards,
    load_images,
    normal_training_set,
    refuse_normalize,
    refuse_other_networks,
    resolve_image_size,
)
from anomalib_recon.pre_processing import ExactResizePreProcessor

from .anomaly_map import Distance
from .latent_size import FeatureCovariance
from .loss import SAAELoss
from .torch_model import DEFAULT_BACKBONE, DEFAULT_IMAGE_SIZE, SAAEModel

logger = logging.getLogger(__name__)

# a pre-processor with a smaller size does not set the image size of the model
MIN_IMAGE_SIZE = 16
# arguments that a checkpoint and the model it is loaded into must share
NETWORK_ARGUMENTS = (
    "backbone",
    "layers",
    "image_size",
    "feature_stride",
    "patch_size",
    "num_heads",
    "depth",
    "mlp_ratio",
    "transformer",
    "distance",
)


class SAAE(CurrentOpsetExport, BackboneInCheckpoint, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Self-attention autoencoder, trained to reconstruct a frozen backbone's features of normal images.

    Before training, the latent width V is found by a principal component analysis of the features of all training
    images, unless ``latent_dim`` gives it. A checkpoint knows its V.

    Images have values in [0, 1]: the model itself normalises them for its backbone. Validation, which sets the
    thresholds, runs once, when training ends.

    Args:
        backbone (str): Vision transformer or CNN of timm, with or without the tag of its weights.
            Defaults to ``"vit_base_patch16_384.augreg_in21k_ft_in1k"``.
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
        transformer (bool): Have a transformer between the convolutions; without it the autoencoder is that of the
            ablation "w/o SAAE".
            Defaults to ``True``.
        distance (Literal["norm", "mse"]): Compare feature vectors by the L2 norm of their difference (eqs. 2 and 3) or
            by its mean square.
            Defaults to ``"norm"``.
        learning_rate (float): Learning rate of Adam.
            Defaults to ``1e-4``.
        feature_cache_gib (float): Features of the training images are computed in the first epoch and kept, in up to so
            many GiB of memory a process; more are in a temporary file in the trainer's ``default_root_dir``. 0 computes
            them anew in each epoch, as augmentations do on their own: choose 0 if a callback or a dataset of yours
            changes training images at random.
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

    first_own_weight = "model.autoencoder.conv_encoder.0.0.weight"

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
        transformer: bool = True,
        distance: Distance = "norm",
        learning_rate: float = 1e-4,
        feature_cache_gib: float = 2.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # assigned before the arguments are saved as hyper-parameters, which are plain data
        given_size, image_size = image_size, resolve_image_size(image_size, pre_processor, DEFAULT_IMAGE_SIZE)
        if given_size is None and min(image_size) < MIN_IMAGE_SIZE:
            # anomalib's tiled ensemble builds a model for 10 x 10 pixels only to ask for its evaluator
            image_size = DEFAULT_IMAGE_SIZE
        layers = None if layers is None else list(layers)
        backbone_weights = backbone_weights and str(backbone_weights)
        refuse_normalize(pre_processor)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        check_finite(learning_rate=learning_rate, explained_variance=explained_variance)
        if learning_rate <= 0:
            msg = f"learning_rate must be positive, got {learning_rate}."
            raise ValueError(msg)
        if not 0 < explained_variance <= 1:
            msg = f"explained_variance must be above 0 and at most 1, got {explained_variance}."
            raise ValueError(msg)

        self.model: SAAEModel = SAAEModel(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            backbone_weights=backbone_weights,
            image_size=image_size,
            feature_stride=feature_stride,
            latent_dim=latent_dim,
            patch_size=patch_size,
            num_heads=num_heads,
            depth=depth,
            mlp_ratio=mlp_ratio,
            transformer=transformer,
            distance=distance,
        )
        self.loss = SAAELoss(distance)
        self.explained_variance = explained_variance
        self.learning_rate = learning_rate
        self._given_latent_dim = latent_dim
        self._feature_cache = FeatureCache(feature_cache_gib)

    def setup(self, stage: str) -> None:
        """Look at the image files and find the latent width before training.

        Lightning loads the checkpoint of a resumed run after this, and with it the run's own latent width.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If an image cannot be used, the training images are not all normal, or there is no datamodule
                to find the latent width with.
        """
        if stage != "fit":
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        if datamodule:
            check_training_files(datamodule)
            if anomalous := int((datamodule.train_data.samples.label_index == 1).sum()):
                msg = f"SAAE trains on normal images alone, but {anomalous} training images are not; leave them out."
                raise ValueError(msg)
        if self.model.autoencoder is None:
            if datamodule is None:
                msg = "latent_dim must be given when training without a datamodule; pass it, or a datamodule."
                raise ValueError(msg)
            self._build_autoencoder(self._find_latent_dim(datamodule))

    @torch.no_grad()
    def _find_latent_dim(self, datamodule: Any) -> int:
        """Find V from the features of all training images, shared among the processes."""
        strategy = self.trainer.strategy
        model = self.model.to(strategy.root_device)
        transform = getattr(self.pre_processor, "transform", None)
        dataset = normal_training_set(datamodule.train_data)
        share = range(self.global_rank, len(dataset), self.trainer.world_size)
        covariance = FeatureCovariance(model.feature_extractor.num_channels, strategy.root_device)
        batches = load_images(dataset, share, datamodule.train_dataloader())
        for images in tqdm(batches, "Batches for the PCA", delay=10, leave=False, disable=self.global_rank > 0):
            on_device = images.to(strategy.root_device)
            covariance.update(model.extract_features(transform(on_device) if transform else on_device))
        covariance.reduce(lambda tensor: strategy.reduce(tensor, reduce_op="sum"))
        latent_dim = strategy.broadcast(covariance.num_components(self.explained_variance))
        logger.info(
            "%d of %d principal components hold %g of the variance of %d images' features: latent_dim=%d.",
            latent_dim,
            model.feature_extractor.num_channels,
            self.explained_variance,
            len(dataset),
            latent_dim,
        )
        return latent_dim

    def _build_autoencoder(self, latent_dim: int) -> None:
        """Build the autoencoder, and let checkpoints know its size."""
        self.model.build_autoencoder(latent_dim)
        self.hparams["latent_dim"] = latent_dim

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as in section 4.1."""
        return torch.optim.Adam(cast("torch.nn.Module", self.model.autoencoder).parameters(), lr=self.learning_rate)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, validation at the end, features computed once, and the guards of all models."""
        callbacks = cast("Sequence[Callback]", super().configure_callbacks())
        return [*callbacks, ValidationAtEnd(), self._feature_cache, *guards()]

    def features_and_targets(self, batch: Batch) -> tuple[Tensor]:
        """Compute what the loss needs of a training batch; there are no targets.

        Args:
            batch (Batch): Batch of B pre-processed images.

        Returns:
            tuple[Tensor]: Features of shape ``(B, U, H_0, W_0)``.
        """
        return (self.model.extract_features(cast("Tensor", batch.image)),)

    def training_step(self, batch: Batch | CachedBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of a batch of images.

        Args:
            batch (Batch | CachedBatch): Batch of pre-processed images, or their features.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            Tensor: Loss, a scalar.
        """
        del args, kwargs
        (features,) = batch.inputs if isinstance(batch, CachedBatch) else self.features_and_targets(batch)
        loss = self.loss(features, self.model.reconstruct(features))
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(features))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images.

        Args:
            batch (Batch): Batch of B pre-processed images.
            batch_idx (int): Not used.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score`` and ``anomaly_map``.
        """
        del batch_idx, args, kwargs
        return batch.update(**self.model(batch.image)._asdict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the autoencoder whose weights the checkpoint holds.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is of another model, or of a network with other arguments.
        """
        names = NETWORK_ARGUMENTS if self._given_latent_dim is None else (*NETWORK_ARGUMENTS, "latent_dim")
        refuse_other_networks(checkpoint, "SAAE", self.hparams, names)
        super().on_load_checkpoint(checkpoint)
        latent_dim = checkpoint["hyper_parameters"]["latent_dim"]
        if latent_dim is not None and latent_dim != self.hparams["latent_dim"]:
            self._build_autoencoder(latent_dim)

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize images; their values stay in [0, 1], as the model itself normalises them.

        Args:
            image_size (tuple[int, int] | None): Height and width.
                Defaults to ``None``, which means 384 x 384.

        Returns:
            PreProcessor: Pre-processor.
        """
        return ExactResizePreProcessor(Resize(image_size or DEFAULT_IMAGE_SIZE, antialias=True))

    @staticmethod
    def configure_evaluator() -> RawScoreEvaluator:
        """Image and pixel AUROC and F1 score, and pixel AUPRO up to a false-positive rate of 0.3, on raw scores."""
        return RawScoreEvaluator()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """None: the paper's 700 epochs are in the configuration files, where a user's flags win."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images."""
        return LearningType.ONE_CLASS
