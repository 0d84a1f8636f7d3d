# SPDX-License-Identifier: Apache-2.0

"""What all models of this package do alike in anomalib.

A model is a network in plain torch and a module that wires it to anomalib::

    class MyModel(ReconstructionModule, AnomalibModule):
        network = MyNetwork

The network has the nouns of every reconstruction model: ``embed`` turns images into what is rebuilt, ``reconstruct``
rebuilds it, ``compare`` makes score and map of the two, and ``forward`` is these three in a row. CONTRIBUTING.md shows
a whole model.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, AnomalibDataset, Batch, InferenceBatch
from anomalib.data.utils import LabelName
from anomalib.data.utils.tiler import Tiler
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.utils.config import to_tuple
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.utilities.types import STEP_OUTPUT
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize, Resize

from anomalib_recon.deploy import GreyLevels
from anomalib_recon.layers import check_whole, tiler_arguments
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.post_processing import RegionPostProcessor
from anomalib_recon.pre_processing import ExactResizePreProcessor, flatten_transform
from anomalib_recon.training import (
    EndOfFit,
    FeatureBatch,
    FeatureCache,
    FiniteLoss,
    ProgressLines,
    RandomState,
    ReadableImages,
    evaluation,
    normal_images,
)
from anomalib_recon.visualization import ReconstructionVisualizer

from .export import CurrentOpsetExport

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as _Base
else:
    _Base = object

logger = logging.getLogger(__name__)

NUM_CHANNELS = 3
# anomalib's tiled ensemble builds a model for images of this size only to ask it for its evaluator
PROBE_SIZE = (10, 10)

# where a checkpoint says how images are cut into tiles, and which levels of deep grey images are black and white
TILER = "anomalib_recon_tiler"
GREY_LEVELS = "anomalib_recon_grey_levels"


class ReconstructionModule(CurrentOpsetExport, _Base):  # type: ignore[misc]  # to_onnx as anomalib's
    """Mixin of models that rebuild something and compare it with what it should be.

    Put it before anomalib's ``AnomalibModule``, of which a model is a direct subclass: anomalib finds no others. A
    model's constructor calls ``super().__init__`` with the arguments below, checks its own, and sets ``self.model`` (by
    :meth:`build_network`) and ``self.loss``.

    Args:
        image_size (int | Sequence[int] | None): Height and width that images are resized to, in pixels; an int means a
            square. ``None`` takes the size of ``pre_processor``, or else ``default_image_size``.
        pre_processor (PreProcessor | bool): Pre-processor, or whether to have the default one.
        post_processor (PostProcessor | bool): Post-processor, or whether to have the default one.
        evaluator (Evaluator | bool): Evaluator, or whether to have the default one.
        visualizer (Visualizer | bool): Visualizer, or whether to have the default one.

    Attributes:
        network (type[nn.Module]): The network. The module has its arguments by the same names.
        default_image_size (tuple[int, int]): Height and width of images if neither the user nor a pre-processor says
            one.
        free_arguments (tuple[str, ...]): Arguments of the network in which a checkpoint may differ from the model it is
            loaded into.
        score_arguments (tuple[str, ...]): Such arguments that change scores, for which the checkpoint's thresholds are
            not: a difference is logged as a warning.
        added_arguments (dict[str, Any]): Arguments that the network did not have at first, with the value by which it
            is what it was: a checkpoint without them has these.
        defaulted_arguments (tuple[str, ...]): Arguments of which ``None`` stands for a value that another model may
            say: a checkpoint and a model differ in them if both say one. Weights of other shapes are refused anyway.
        feature_cache (FeatureCache | None): Keeps what ``training_inputs`` makes of images that stay the same.
        needs_datamodule (bool): Whether ``start`` or ``finish`` need the normal training images, of whatever arguments
            the model has.
        loads_start (bool): Whether ``initialize`` loads weights that training starts from.
        grey_levels (GreyLevels | None): Levels of the images that the model was trained on, if these have more than 8
            bits of grey.
    """

    network: ClassVar[type[nn.Module]]
    default_image_size: ClassVar[tuple[int, int]] = (256, 256)
    free_arguments: ClassVar[tuple[str, ...]] = ()
    score_arguments: ClassVar[tuple[str, ...]] = ()
    added_arguments: ClassVar[dict[str, Any]] = {}
    defaulted_arguments: ClassVar[tuple[str, ...]] = ()
    feature_cache: FeatureCache | None = None
    needs_datamodule: bool = False
    loads_start: bool = False
    model: Any

    # --- construction

    def __init__(
        self,
        image_size: int | Sequence[int] | None,
        pre_processor: PreProcessor | bool,
        post_processor: PostProcessor | bool,
        evaluator: Evaluator | bool,
        visualizer: Visualizer | bool,
    ) -> None:
        size = self.find_image_size(image_size, pre_processor)
        super().__init__(
            pre_processor=self.configure_pre_processor(size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        for name, value in self.hparams.items():
            if OmegaConf.is_config(value):  # from anomalib's `get_model`; in a checkpoint it would be no plain data
                self.hparams[name] = OmegaConf.to_container(value)
        self.hparams["image_size"] = size  # anomalib has saved the argument

    @classmethod
    def find_image_size(
        cls, image_size: int | Sequence[int] | None, pre_processor: PreProcessor | bool
    ) -> tuple[int, int]:
        """Find the size that images have when they come to the network.

        Args:
            image_size (int | Sequence[int] | None): Size as given by the user; an int means a square.
            pre_processor (PreProcessor | bool): Pre-processor as given by the user.

        Returns:
            tuple[int, int]: Height and width.

        Raises:
            ValueError: If images are smaller than ``image_size``, this is not positive, or the pre-processor normalises
                images.
        """
        transform = getattr(pre_processor, "transform", None)
        if any(isinstance(part, Normalize) for part in flatten_transform(transform)):
            msg = "pre_processor must leave images in [0, 1], got one with Normalize; the model normalises itself."
            raise ValueError(msg)
        resized = _resized(pre_processor)
        if resized == PROBE_SIZE:
            resized = (1, 1)
        if image_size is None:
            return cls.default_image_size if resized == (1, 1) else resized
        try:
            size = to_tuple(image_size)  # type: ignore[arg-type]
            check_whole(height=size[0], width=size[1])
        except (TypeError, ValueError) as error:
            msg = f"image_size must be positive, got {image_size}; pass a whole number of pixels, or two."
            raise ValueError(msg) from error
        has_tiles = all(side >= tile for side, tile in zip(resized, size, strict=True))
        if resized != (1, 1) and not has_tiles:
            msg = f"image_size must be the size that pre_processor resizes to, got {size} and {resized}; leave one out."
            raise ValueError(msg)
        return size

    def build_network(self) -> Any:
        """Build the network from those arguments of the module that it has, too.

        Returns:
            Any: The network.
        """
        return self.network(**{name: self.hparams[name] for name in _arguments_of(self.network)})

    @classmethod
    def configure_pre_processor(cls, image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize images; their values stay in [0, 1].

        Args:
            image_size (tuple[int, int] | None): Height and width.
                Defaults to ``None``, which means those of ``default_image_size``.

        Returns:
            PreProcessor: Pre-processor.
        """
        return ExactResizePreProcessor(Resize(image_size or cls.default_image_size, antialias=True))

    def configure_post_processor(self) -> RegionPostProcessor:
        """Post-processor of anomalib, which takes a region of interest from a checkpoint that has one."""
        return RegionPostProcessor()

    @staticmethod
    def configure_evaluator() -> RawScoreEvaluator:
        """Image and pixel AUROC and pixel AUPRO on raw scores, and F1 scores at the threshold."""
        return RawScoreEvaluator()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Show image, ground truth, anomaly map and predicted mask, and the reconstruction if it is a picture."""
        return ReconstructionVisualizer()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """None: schedules are a matter of the configs, where a user's flags win."""
        return {}

    @property
    def learning_type(self) -> LearningType:
        """One-class: trained on normal images."""
        return LearningType.ONE_CLASS

    # --- tiles

    @property
    def tiler(self) -> Tiler | None:
        """What cuts images into tiles, if anomalib's ``TilerConfigurationCallback`` or a checkpoint has set it."""
        return getattr(self.model, "tiler", None)

    def tiles(self, batch: Batch) -> Tensor:
        """Images of a batch, or their tiles.

        Args:
            batch (Batch): Batch of B pre-processed images.

        Returns:
            Tensor: Images of shape ``(B, 3, H, W)``, or n tiles of each, ``(B * n, 3, h, w)``.
        """
        images = cast("Tensor", batch.image)
        return images if self.tiler is None else self.model.tile(images)

    def check_tiles(self) -> None:
        """Compare the sizes of images, tiles and network, before anything is computed.

        Raises:
            ValueError: If they do not fit.
        """
        size = self.hparams["image_size"]
        tile = None if self.tiler is None else (self.tiler.tile_size_h, self.tiler.tile_size_w)
        resized = _resized(self.pre_processor)
        if tile is None and resized not in {(1, 1), size}:
            msg = (
                f"pre_processor resizes images to {resized}, but image_size is {size}; for tiles of that size pass "
                "TilerConfigurationCallback(enable=True, tile_size=..., stride=...), or leave image_size out."
            )
            raise ValueError(msg)
        if tile not in {None, size}:
            msg = f"tile_size must be the image_size of the model, got {tile} and {size}; a tile is what it sees."
            raise ValueError(msg)

    # --- fit

    def configure_callbacks(self) -> Sequence[Callback]:
        """What happens around a fit, and anomalib's components."""
        ours = [ReadableImages(), FiniteLoss(), RandomState(), ProgressLines(), *self.configure_end()]
        if self.feature_cache:
            ours.append(self.feature_cache)
        return [*ours, *cast("Sequence[Callback]", super().configure_callbacks())]

    def configure_end(self) -> Sequence[Callback]:
        """Callbacks that end a fit."""
        return [EndOfFit()]

    def check_training_set(self, dataset: AnomalibDataset) -> None:
        """Refuse a training set that the model cannot be trained on.

        Args:
            dataset (AnomalibDataset): Training set.

        Raises:
            ValueError: If it has anomalous images.
        """
        if anomalous := int((dataset.samples.label_index == LabelName.ABNORMAL).sum()):
            msg = (
                f"{type(self).__name__} trains on normal images alone, but {anomalous} training images are anomalous; "
                "leave them out."
            )
            raise ValueError(msg)

    def initialize(self) -> None:
        """Load weights that training starts from; called at its start, if it has some and none is resumed."""

    def start_features(self, batch: Batch) -> Tensor:
        """Compute what :meth:`start` needs of a batch of pre-processed images; by default ``embed`` does."""
        return self.model.embed(self.tiles(batch))

    def start(self, features: Iterable[Tensor]) -> None:
        """Fit to the features what comes before training; called for models with a ``feature_cache``.

        Args:
            features (Iterable[Tensor]): Features of the normal training images, in batches, which share memory. Can be
                iterated more than once.
        """

    def targets(self, features: Tensor) -> Tensor:
        """Turn what :meth:`start_features` computes into what is rebuilt, of the same shape; by default it is that."""
        return features

    def training_images(self) -> AnomalibDataset:
        """The normal training images, loaded as test images are."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return normal_images(datamodule.train_data, self)

    def finish(self) -> None:
        """Compute what scoring needs beyond the trained weights, when training ends."""

    def residuals(self) -> Iterator[Tensor]:
        """Compare the features of the normal training images with their reconstruction.

        Yields:
            Tensor: Residuals of shape ``(b, ...)``.
        """
        for target in cast("FeatureCache", self.feature_cache).normal_targets(self.trainer, self):
            with evaluation(self):
                residual = target - self.model.reconstruct(target)
            yield residual

    def training_inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        """Compute what the loss needs of a training batch and what stays the same in all epochs.

        Args:
            batch (Batch): Batch of B pre-processed images.

        Returns:
            tuple[Tensor, ...]: What :meth:`start_features` computes, and further arguments of the loss, each
                ``(B, ...)``.
        """
        return (self.start_features(batch),)

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Reconstruct the target of a batch.

        Args:
            batch (Batch | FeatureBatch): Batch of B pre-processed images, or of their places in the feature cache.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            STEP_OUTPUT: The loss, a scalar.
        """
        del args, kwargs
        if isinstance(batch, FeatureBatch):
            target, *others = cast("FeatureCache", self.feature_cache).read(batch)
        else:
            features, *others = self.training_inputs(batch)
            target = self.targets(features)
        loss = self.loss(target, self.model.reconstruct(target), *others)
        self.log("train_loss", loss, prog_bar=True, on_step=False, on_epoch=True, batch_size=len(target))
        return loss

    # --- scoring

    def validation_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images.

        Args:
            batch (Batch): Batch of B pre-processed images.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            STEP_OUTPUT: The batch with ``pred_score``, ``anomaly_map``, and, of networks with a ``picture``,
                ``reconstruction`` of shape ``(B, 3, H, W)`` with values in [0, 1].
        """
        del args, kwargs
        target = self.model.embed(self.tiles(batch))
        reconstruction = self.model.reconstruct(target)
        return self.scored(batch, self.model.compare(target, reconstruction), reconstruction)

    def scored(self, batch: Batch, predictions: InferenceBatch, reconstruction: Any) -> STEP_OUTPUT:
        """Give a batch the predictions of its images, or of their tiles.

        Args:
            batch (Batch): Batch of B pre-processed images.
            predictions (InferenceBatch): What ``compare`` returned.
            reconstruction (Any): What ``reconstruct`` returned.

        Returns:
            STEP_OUTPUT: The batch.
        """
        has_picture = hasattr(self.model, "picture")
        picture = self.model.picture(reconstruction) if has_picture else None
        if self.tiler is not None:
            predictions = self.model.untile(predictions)
            picture = self.model.untile_images(picture) if has_picture else None
        scored = batch.update(**predictions._asdict())
        if has_picture:
            # on the CPU: Lightning does not move it, and batches that `predict` collects keep it
            scored.reconstruction = cast("Tensor", picture).cpu()
        return scored

    def test_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images; see :meth:`validation_step`."""
        return self.validation_step(batch, *args, **kwargs)

    def predict_step(self, batch: Batch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Score a batch of images; see :meth:`validation_step`."""
        return self.validation_step(batch, *args, **kwargs)

    # --- checkpoints

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # as anomalib's
        cls, checkpoint_path: str | Path, *args: Any, **kwargs: Any
    ) -> Any:
        """Load a model. It needs neither network nor weights file: the checkpoint holds the backbone, too.

        Args:
            checkpoint_path (str | Path): The checkpoint.
            *args (Any): As in anomalib.
            **kwargs (Any): As in anomalib.

        Returns:
            Any: The model.
        """
        if "pre_trained" in _arguments_of(cls):
            kwargs = {"pre_trained": False, "backbone_weights": None, **kwargs}
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save how images are cut into tiles and which of their levels are black and white, too.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.
        """
        super().on_save_checkpoint(checkpoint)
        if self.tiler is not None:
            checkpoint[TILER] = tiler_arguments(self.tiler)
        if self.grey_levels is not None:
            checkpoint[GREY_LEVELS] = asdict(self.grey_levels)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is of another model, of a network with other arguments, or of another version.
        """
        self.refuse_other_networks(checkpoint)
        self.refuse_other_tensors(checkpoint)
        super().on_load_checkpoint(checkpoint)
        if TILER in checkpoint and self.tiler is None:
            self.model.tiler = Tiler(**checkpoint[TILER])
        if GREY_LEVELS in checkpoint:
            self.grey_levels = GreyLevels(**checkpoint[GREY_LEVELS])
        datamodule = getattr(self._trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule):
            datamodule._update_augmentations()  # it has taken the resize of the pre-processor before the checkpoint's

    def refuse_other_tensors(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint with tensors of other names or shapes.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is.
        """
        saved = {name: value.shape for name, value in checkpoint["state_dict"].items() if name.startswith("model.")}
        different = sorted(saved.keys() ^ {f"model.{name}" for name in self.model.state_dict()})
        if not different:  # a buffer, such as a bank, takes the size that it has in the checkpoint
            weights = {f"model.{name}": weight.shape for name, weight in self.model.named_parameters()}
            different = [name for name, shape in weights.items() if saved[name] != shape]
        if different:
            msg = (
                f"The checkpoint and {type(self).__name__} differ in {len(different)} tensors, {different[0]} for one: "
                "it is of a network with other arguments, or of another version of anomalib-recon; train anew."
            )
            raise ValueError(msg)

    def refuse_other_networks(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model, or of a network that was built with other arguments.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Raises:
            ValueError: If it is.
        """
        model, built = type(self).__name__, self.hparams
        saved = {**self.added_arguments, **checkpoint.get("hyper_parameters", {})}
        given = {name for name in self.defaulted_arguments if name in saved}
        defaulted = {name for name in given if saved[name] is None or built[name] is None}
        free = {"pre_trained", "backbone_weights", *self.free_arguments, *self.score_arguments, *defaulted}
        names = [name for name in _arguments_of(self.network) if name not in free]
        if not saved.keys() >= set(names):
            msg = f"The checkpoint is not one of {model}, or of a version without some of its arguments; train anew."
            raise ValueError(msg)
        different = [name for name in names if _plain(saved[name]) != _plain(built[name])]
        if different:
            needed = ", ".join(f"{name}={saved[name]} (not {built[name]})" for name in different)
            msg = (
                f"The checkpoint needs a model with {needed}; pass these arguments, on the command line as in "
                f"--model.{different[0]}, or use {model}.load_from_checkpoint."
            )
            raise ValueError(msg)
        for name in self.score_arguments:
            if name in saved and _plain(saved[name]) != _plain(built[name]):
                logger.warning(
                    "The checkpoint has %s=%s, and its thresholds are of such scores; this model has %s. Pass "
                    "--model.%s, or set the thresholds anew.",
                    name, saved[name], built[name], name,
                )  # fmt: skip


def _plain(value: Any) -> Any:
    """A sequence as a list: a checkpoint may turn tuples into lists."""
    return list(value) if isinstance(value, tuple) else value


def _resized(pre_processor: Any) -> tuple[int, int]:
    """The size to which a pre-processor resizes images, or 1 x 1 if it does not."""
    transform = getattr(pre_processor, "transform", None)
    # a transform that resizes makes even a single pixel that large
    height, width = transform(torch.zeros(1, NUM_CHANNELS, 1, 1)).shape[-2:] if transform else (1, 1)
    return height, width


def _arguments_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
