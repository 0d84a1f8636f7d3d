# SPDX-License-Identifier: Apache-2.0

"""What a frozen backbone makes of the training images, computed once at the start of a fit.

Features are kept in half precision. Training then neither decodes an image nor runs the backbone, and a model that fits
something to its features before training does so without another pass. Nothing outlives the fit, so that no other
backbone, image size or data can ever be read; a resumed run computes anew. Each process keeps all features.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, AnomalibDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import CenterCrop, Resize
from tqdm.auto import tqdm

from anomalib_recon.layers import check_not_negative
from anomalib_recon.pre_processing import ExactResizePreProcessor, flatten_transform

from .images import evaluation, map_images, normal_images, normal_indices

logger = logging.getLogger(__name__)

GIB = 2**30
LARGEST = torch.finfo(torch.float16).max
# features read at a time when a model looks at all of them
IMAGES_PER_READ = 16


@dataclass
class FeatureBatch:
    """A training batch of cached features.

    Attributes:
        index (Tensor): Places of B images in the cache, shape ``(B,)``.
    """

    index: Tensor


class FeatureCache(Callback):
    """Compute the training inputs of a model once, and give its ``training_step`` a :class:`FeatureBatch` each time.

    The model has a method ``training_inputs(batch)``, which turns a pre-processed batch of images into tensors of shape
    ``(B, ...)``, features first, and a method ``start(features)``, which gets the features of the normal training
    images in batches, before training, from the cache or by ``start_features(batch)``. Its ``targets(features)`` then
    become what is kept. Where images change from epoch to epoch or the features do not fit, each epoch computes them
    anew; the log says so.

    Args:
        feature_cache_gib (float): Most memory of a process for the cache, in GiB. 0 switches it off.
        obstacle (str | None): Why the model cannot use the cache, if so.
            Defaults to ``None``.

    Raises:
        ValueError: If ``feature_cache_gib`` is negative.
    """

    def __init__(self, feature_cache_gib: float, obstacle: str | None = None) -> None:
        super().__init__()
        check_not_negative(feature_cache_gib=feature_cache_gib)
        self._budget = feature_cache_gib * GIB
        self._obstacle = obstacle or ("feature_cache_gib=0" if feature_cache_gib == 0 else None)
        self._parts: list[_Part] = []

    @property
    def num_bytes(self) -> int:
        """Memory of the features that are kept; 0 where they are computed anew in each epoch."""
        return sum(part.values.nbytes for part in self._parts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fill the cache, and let the model look at the features.

        Lightning restores the checkpoint of a resumed run after this, the backbone included.

        Raises:
            ValueError: If the model needs the normal training images, and there is no datamodule to have them from.
        """
        module: Any = pl_module
        datamodule: Any = getattr(trainer, "datamodule", None)
        if stage == "fit" and datamodule is None and module.needs_datamodule:
            msg = (
                f"{type(module).__name__}, with these arguments, takes statistics of the normal training images, which "
                "dataloaders do not tell from others; pass a datamodule."
            )
            raise ValueError(msg)
        # a fit that no epoch is left for leaves the model as it is; other weights of the backbone may be loaded later.
        # `trainer.ckpt_path` would be that of an earlier run here
        if stage != "fit":
            return
        if _has_ended(trainer):
            logger.warning(
                "An earlier fit of this trainer has trained all max_epochs=%s, so nothing is trained; use a new "
                "Engine, or raise max_epochs.",
                trainer.max_epochs,
            )
        elif not module.loads_start:
            self._begin(trainer, module, datamodule)

    def _begin(self, trainer: Trainer, module: Any, datamodule: Any) -> None:
        """Fill the cache, and let the model look at the features."""
        self._prepare(trainer, module, datamodule)
        if datamodule is not None:
            module.start(_NormalFeatures(lambda: self._normal_features(trainer, module)))
            self._keep_targets(module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the trainer load places in the cache instead of images.

        A resumed run and a model with weights from elsewhere fill the cache now; what their model has seen in the
        features comes with these.
        """
        module: Any = pl_module
        is_resumed = trainer.ckpt_path is not None
        starts = module.loads_start and not is_resumed and not _has_ended(trainer)
        if starts:
            module.initialize()
        if is_resumed or starts:
            self._prepare(trainer, module, getattr(trainer, "datamodule", None))
            self._keep_targets(module)
        if not self._parts:
            return
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        # numbers need no worker processes
        replaced = {"train_data": _Places(len(datamodule.train_data)), "num_workers": 0, "external_collate_fn": None}
        kept = {name: getattr(datamodule, name) for name in replaced}
        try:
            for name, value in replaced.items():
                setattr(datamodule, name, value)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
                trainer.fit_loop.setup_data()  # the trainer would do so later, when it makes other dataloaders, too
        finally:
            for name, value in kept.items():
                setattr(datamodule, name, value)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free the memory."""
        del trainer, pl_module
        self._parts = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same after an interrupted fit."""
        del exception
        self.on_fit_end(trainer, pl_module)

    def read(self, batch: FeatureBatch) -> tuple[Tensor, ...]:
        """Read the training inputs of a batch.

        Args:
            batch (FeatureBatch): Places of B images.

        Returns:
            tuple[Tensor, ...]: The targets, and what else the model's ``training_inputs`` made of the images. They
                share memory with what the next call returns.
        """
        return tuple(part.read(batch.index) for part in self._parts)

    def normal_targets(self, trainer: Trainer, module: Any) -> Iterator[Tensor]:
        """Targets of the normal training images, from memory if they are kept.

        Args:
            trainer (Trainer): Trainer that is fitting the model.
            module (Any): The model, whose ``targets`` they are.

        Yields:
            Tensor: Batches of shape ``(b, ...)``, which share memory.
        """
        for features in self._normal_features(trainer, module):
            yield features if self._parts else module.targets(features)

    def _keep_targets(self, module: Any) -> None:
        """Turn the features in memory into targets, which then need not be computed in each step."""
        if not self._parts:
            return
        features = self._parts[0]
        with evaluation(module):
            for index in torch.arange(len(features.values)).split(IMAGES_PER_READ):
                features.values[index] = module.targets(features.read(index)).to(features.values)

    def _prepare(self, trainer: Trainer, module: Any, datamodule: Any) -> None:
        self._parts = []
        tiles = None if module.tiler is None else "images are cut into tiles"
        obstacle = self._obstacle or tiles or _find_obstacle(trainer, datamodule, module)
        if obstacle is None:
            module.to(trainer.strategy.root_device)
            obstacle = self._fill(trainer, module, datamodule.train_data)
        if obstacle is not None:
            logger.info("Features are computed anew in each epoch: %s.", obstacle)

    def _fill(self, trainer: Trainer, module: Any, dataset: AnomalibDataset) -> str | None:
        """Compute all features, unless they are too many or too large; the result then says so."""
        count, start = len(dataset), 0
        batches = map_images(trainer, module, dataset, module.training_inputs)
        for inputs in tqdm(batches, "Features", delay=10, leave=False, disable=not trainer.is_global_zero):
            if start == 0:
                size = sum(count * value[0].numel() * _kept_type(value).itemsize for value in inputs)
                if size > self._budget:
                    return f"{size / GIB:.1f} GiB are more than feature_cache_gib={self._budget / GIB:g}"
                device = _device_with_room(trainer.strategy.root_device, size)
                self._parts = [_Part(count, value, device) for value in inputs]
                logger.info("Features of %d images are kept on %s: %.2f GiB.", count, device, size / GIB)
            for part, value in zip(self._parts, inputs, strict=True):
                if value.is_floating_point() and value.abs().max() > LARGEST:
                    self._parts = []
                    return f"features up to {value.abs().max():.3g} are beyond half precision"
                part.values[start : start + len(value)] = value
            start += len(inputs[0])
        return None

    def _normal_features(self, trainer: Trainer, module: Any) -> Iterator[Tensor]:
        dataset: AnomalibDataset = trainer.datamodule.train_data  # type: ignore[attr-defined]
        if self._parts:
            for index in torch.tensor(normal_indices(dataset)).split(IMAGES_PER_READ):
                yield self._parts[0].read(index)
            return
        module.to(trainer.strategy.root_device)
        normal = normal_images(dataset, module)
        yield from map_images(trainer, module, normal, module.start_features)


class _NormalFeatures:
    """Features of the normal training images, batch by batch; can be iterated more than once."""

    def __init__(self, read: Callable[[], Iterator[Tensor]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Tensor]:
        return self._read()


class _Part:
    """One of the tensors that training needs of each image.

    Args:
        count: Number of images.
        example: The tensor of a batch, of shape ``(B, ...)``.
        device: Where to keep all.
    """

    def __init__(self, count: int, example: Tensor, device: torch.device) -> None:
        self.values = torch.empty(count, *example.shape[1:], dtype=_kept_type(example), device=device)
        self._dtype, self._device = example.dtype, example.device
        self._half = torch.empty(0)
        self._full = torch.empty(0)

    def read(self, index: Tensor) -> Tensor:
        """Values of the images ``index``, in a buffer that is used again: fresh memory of that size costs more time."""
        shape = (len(index), *self.values.shape[1:])
        if len(self._half) < len(index):
            self._half = torch.empty(shape, dtype=self.values.dtype, device=self.values.device)
            self._full = torch.empty(shape, dtype=self._dtype, device=self._device)
        half, full = self._half[: len(index)], self._full[: len(index)]
        torch.index_select(self.values, 0, index.to(self.values.device), out=half)
        return full.copy_(half)


class _Places(Dataset):
    """The training images as numbers.

    Args:
        count: Number of images.
    """

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index

    @staticmethod
    def collate_fn(places: list[int]) -> FeatureBatch:
        return FeatureBatch(torch.tensor(places))


def _has_ended(trainer: Trainer) -> bool:
    """Whether an earlier fit of the trainer has trained all epochs."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    return 1 <= (trainer.max_epochs or -1) <= progress.processed


def _kept_type(values: Tensor) -> torch.dtype:
    return torch.float16 if values.is_floating_point() else values.dtype


def _device_with_room(device: torch.device, size: int) -> torch.device:
    """An accelerator of which the features take less than half of the free memory, or else the CPU."""
    if device.type == "cpu":
        return device
    memory = getattr(torch.get_device_module(device), "mem_get_info", None)
    return device if memory and size < memory(device)[0] / 2 else torch.device("cpu")


def _find_obstacle(trainer: Trainer, datamodule: Any, module: Any) -> str | None:
    """Say why the features of an image may differ between epochs, or cannot be kept."""
    if not isinstance(datamodule, AnomalibDataModule):
        return "the training images do not come from a datamodule of anomalib"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return "the dataloader changes between epochs"
    if type(datamodule).train_dataloader is not AnomalibDataModule.train_dataloader:
        return "the datamodule has a training dataloader of its own"
    if module.pre_processor is not None and not isinstance(module.pre_processor, ExactResizePreProcessor):
        return "the pre-processor is not an ExactResizePreProcessor"
    transforms = [
        *flatten_transform(getattr(datamodule.train_data, "augmentations", None)),
        *flatten_transform(getattr(module.pre_processor, "transform", None)),
    ]
    # with another resize, the size of an image could depend on the others in its batch
    if not transforms or not all(
        isinstance(part, Resize | CenterCrop) and len(part.size or ()) == 2 for part in transforms
    ):
        return "the training images are not only resized to a fixed height and width"
    return None
