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

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataset, Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.utilities.distributed import gather_all_tensors
from torchvision.transforms.v2 import Resize

from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models.components import (
    BackboneInCheckpoint,
    CurrentOpsetExport,
    ValidationAtEnd,
    check_finite,
    check_training_files,
    guards,
    load_images,
    refuse_normalize,
    refuse_other_networks,
    resolve_image_size,
)
from anomalib_recon.post_processing.normal_images import normal_images
from anomalib_recon.pre_processing import ExactResizePreProcessor
from anomalib_recon.visualization import ReconstructionVisualizer

from .defects import KINDS, ArtificialDefects
from .loss import HybridLoss
from .normal_bank import select_coreset
from .torch_model import PatchAEModel

DEFAULT_IMAGE_SIZE = (256, 256)
# arguments that a checkpoint and the model it is loaded into must share
NETWORK_ARGUMENTS = ("backbone", "image_size", "patch_size", "embed_dim", "patch_wise", "score_by")


class PatchAE(CurrentOpsetExport, BackboneInCheckpoint, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Auto-encoder of patches, trained on images with artificial defects; scores are distances to normal features.

    When training ends, the features of the normal training images, without defects, become the bank that images are
    compared with; then validation, which sets the thresholds, runs once. Images have values in [0, 1]: the model
    itself normalises them for its backbone.

    Args:
        backbone (str): CNN of timm, with or without the tag of its weights; its last four stages are used.
            Defaults to ``"wide_resnet101_2"``.
        pre_trained (bool): Start from timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to start from instead.
            Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels, multiples of
            ``patch_size``; an int means a square. ``None`` takes the size of ``pre_processor`` if patches fit in it, or
            else 256 x 256.
            Defaults to ``None``.
        patch_size (int): Side of a patch in pixels.
            Defaults to ``8``.
        embed_dim (int): Width D of the vectors.
            Defaults to ``512``.
        trained_stages (int): Number of the backbone's stages that are trained, counted from the last one. With all
            four, what comes before them is trained, too; with 0 the backbone stays as it is.
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
        coreset_ratio (float): Share of the normal features, in (0, 1], that becomes the bank; 1 keeps all.
            Defaults to ``0.1``.
        score_by (Literal["features", "stages", "reconstruction"]): Distance of the vectors to the normal ones, the same
            for the concatenated stages they are made from, or error of the reconstruction, without a bank (ablations).
            Defaults to ``"features"``.
        sigma (float): Standard deviation of the Gaussian that smooths the map, in pixels; 0 stands for none.
            Defaults to ``4.0``.
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

    comparison_layers = 1  # the whitening
    first_own_weight = "model.project.0.weight"

    def __init__(
        self,
        backbone: str = "wide_resnet101_2",
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        patch_size: int = 8,
        embed_dim: int = 512,
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
        score_by: Literal["features", "stages", "reconstruction"] = "features",
        sigma: float = 4.0,
        vectors_per_chunk: int = 4096,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # assigned before the arguments are saved as hyper-parameters, which are plain data
        image_size = find_image_size(image_size, pre_processor, patch_size)
        backbone_weights = backbone_weights and str(backbone_weights)
        refuse_normalize(pre_processor)
        if pre_processor is True:
            pre_processor = self.configure_pre_processor(image_size)
        super().__init__(
            pre_processor=pre_processor, post_processor=post_processor, evaluator=evaluator, visualizer=visualizer
        )
        check_finite(
            learning_rate=learning_rate,
            backbone_learning_rate=backbone_learning_rate,
            coreset_ratio=coreset_ratio,
            alpha=alpha,
            sigma=sigma,
        )
        if learning_rate <= 0:
            msg = f"learning_rate must be positive, got {learning_rate}."
            raise ValueError(msg)
        if backbone_learning_rate <= 0:
            msg = (
                f"backbone_learning_rate must be positive, got {backbone_learning_rate}; to keep the backbone as it "
                "is pass trained_stages=0."
            )
            raise ValueError(msg)
        if not 0 < coreset_ratio <= 1:
            msg = f"coreset_ratio must be above 0 and at most 1, got {coreset_ratio}."
            raise ValueError(msg)

        self.loss = HybridLoss(alpha, patch_size)
        self.defects = ArtificialDefects(
            defect_probability,
            defect_kinds,
            defect_size_range,
            defect_aspect_range,
            defect_angle_range,
            defect_position_range,
        )
        self.model: PatchAEModel = PatchAEModel(
            backbone=backbone,
            pre_trained=pre_trained,
            backbone_weights=backbone_weights,
            image_size=image_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            trained_stages=trained_stages,
            patch_wise=patch_wise,
            score_by=score_by,
            sigma=sigma,
            vectors_per_chunk=vectors_per_chunk,
        )
        self.learning_rate = learning_rate
        self.backbone_learning_rate = backbone_learning_rate
        self.coreset_ratio = coreset_ratio

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, with smaller steps for the weights that come from ImageNet, and for the layer with the most inputs.

        The first convolution sums over the channels of all stages, often thousands. Adam moves each weight by about the
        learning rate, and so an output by the more, the more inputs it has: the rate of this layer is lowered until its
        outputs move no farther than those of a layer with ``embed_dim`` inputs.
        """
        model = self.model
        first, *others = (*model.project, *model.decoder)
        embed_dim, num_channels = cast("Tensor", first.weight).shape[:2]
        groups: list[dict[str, Any]] = [
            {"params": [weight for layer in others for weight in layer.parameters()]},
            {"params": list(first.parameters()), "lr": self.learning_rate * min(1, embed_dim / num_channels)},
            {
                "params": [weight for weight in model.backbone.parameters() if weight.requires_grad],
                "lr": self.backbone_learning_rate,
            },
        ]
        return torch.optim.Adam(groups, lr=self.learning_rate)

    def configure_callbacks(self) -> Sequence[Callback]:
        """Anomalib's components, bank and validation at the end, and the guards of all models."""
        at_end = ValidationAtEnd(prepare=self._fill_bank)
        return [*cast("Sequence[Callback]", super().configure_callbacks()), at_end, *guards()]

    def setup(self, stage: str) -> None:
        """Look at the training images before a long training.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            ValueError: If an image cannot be used, or there is no normal training image.
        """
        datamodule = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and datamodule:
            check_training_files(datamodule)

    def on_train_start(self) -> None:
        """Tell before the training that the bank would be empty after it.

        Raises:
            ValueError: If it would.
        """
        num_vectors = len(self._normal_training_images()) * self.model.num_patches
        if int(self.coreset_ratio * num_vectors) == 0:
            msg = f"coreset_ratio={self.coreset_ratio} leaves none of the {num_vectors} normal features; raise it."
            raise ValueError(msg)

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
        images = cast("Tensor", batch.image)
        seed = int(torch.randint(2**31, ())) + self.global_rank
        images, _ = self.defects(images, torch.Generator(self.device).manual_seed(seed))
        reconstruction = self.model.decode(self.model.encode(images)).float()
        with torch.autocast(self.device.type, enabled=False):
            loss = self.loss(reconstruction, images)
        self.log("train_loss", loss, prog_bar=True, on_epoch=True, batch_size=len(images))
        return loss

    @torch.no_grad()
    def _fill_bank(self) -> None:
        """Fill the bank with the features of the normal training images, each process with its share of them."""
        if self.model.score_by == "reconstruction":
            return
        dataset = self._normal_training_images()
        # a process without an image repeats the first: a vector more than once changes no distance
        share = range(self.global_rank, len(dataset), self.trainer.world_size) or range(1)
        transform = getattr(self.pre_processor, "transform", None)
        self.eval()
        parts = []
        for loaded in load_images(dataset, share, self._train_loader):
            images = loaded.to(self.device)
            with self.trainer.precision_plugin.forward_context():
                features = self.model.extract_scored(transform(images) if transform else images)
            parts.append(features.float().movedim(1, -1).flatten(0, 2))  # (n, D)
        self.train()
        vectors = torch.cat(parts)
        if self.trainer.world_size > 1:
            vectors = torch.cat(gather_all_tensors(vectors))
        self.model.whitening.fit(vectors)
        vectors = self.model.whitening(vectors[:, :, None, None]).flatten(1)
        # one process selects, for all to have the same
        coreset = select_coreset(vectors, self.coreset_ratio).cpu() if self.trainer.is_global_zero else torch.empty(0)
        self.model.bank.fill(self.trainer.strategy.broadcast(coreset).to(self.device))

    def _normal_training_images(self) -> AnomalibDataset:
        dataset = cast("AnomalibDataset", self._train_loader.dataset)
        return normal_images(dataset, getattr(self.pre_processor, "transform", None))

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
        reconstruction, predictions = self.model.reconstruct_and_score(cast("Tensor", batch.image))
        scored = batch.update(**predictions._asdict())
        scored.reconstruction = reconstruction.clamp(0, 1).cpu()
        return scored

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is of another model, or of a network with other arguments.
        """
        refuse_other_networks(checkpoint, "PatchAE", self.hparams, NETWORK_ARGUMENTS)
        super().on_load_checkpoint(checkpoint)

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
        """None: the number of epochs is a matter of the config, or of ``--trainer.max_epochs``."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images."""
        return LearningType.ONE_CLASS


def find_image_size(
    image_size: int | Sequence[int] | None, pre_processor: PreProcessor | bool, patch_size: int
) -> tuple[int, int]:
    """Find the size of the images from the arguments of the model.

    Args:
        image_size (int | Sequence[int] | None): Size as given by the user.
        pre_processor (PreProcessor | bool): Pre-processor as given by the user.
        patch_size (int): Side of a patch.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        ValueError: If the two sizes disagree.
    """
    size = resolve_image_size(image_size, pre_processor, DEFAULT_IMAGE_SIZE)
    if image_size is None and any(side % max(1, patch_size) for side in size):
        # also for anomalib's tiled ensemble, which builds a model for 10 x 10 pixels only to ask for its evaluator
        return DEFAULT_IMAGE_SIZE
    return size
