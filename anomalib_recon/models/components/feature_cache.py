# SPDX-License-Identifier: Apache-2.0

"""What a frozen backbone makes of the training images, computed once instead of in each epoch.

The first epoch computes, in the batches of the training, and keeps; the others read, and neither decode an image nor
run the backbone. Nothing outlives the fit, so that no other backbone, image size or data can ever be read; a resumed
run computes anew. Each process keeps what its own sampler gives it.

Random numbers are drawn as without the cache. A trained model is the same to the last bit if the backbone rounds alike
in batches of all sizes that occur. Where it does not, an image keeps the rounding of the batch that it was first in,
while without the cache it depends on whether the image is in an epoch's smaller, last batch.
"""

import logging
import math
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import CenterCrop, Resize

from .image_size import flatten_transform

logger = logging.getLogger(__name__)

GIB = 2**30


@dataclass
class CachedBatch:
    """A training batch that stands for B images.

    Args:
        inputs (tuple[Tensor, ...]): What the model's ``features_and_targets`` made of the images, each ``(B, ...)``.
        image (None): For the pre-processor, which leaves it as it is.
        gt_mask (None): The same.
    """

    inputs: tuple[Tensor, ...]
    image: None = None
    gt_mask: None = None


class FeatureCache(Callback):
    """Give a model's ``training_step`` batches of :class:`CachedBatch` instead of images.

    The model has a method ``features_and_targets``, which turns a pre-processed batch of images into tensors
    ``(B, ...)`` that depend on nothing else. The cache is off where images change from epoch to epoch; the log says so.

    Args:
        feature_cache_gib (float): Most memory of a process for the cache, in GiB. A larger cache is a temporary file in
            the trainer's ``default_root_dir``. 0 switches the cache off.
        obstacle (str | None): Why the model cannot use the cache, if so.
            Defaults to ``None``.

    Raises:
        ValueError: If ``feature_cache_gib`` is negative.
    """

    def __init__(self, feature_cache_gib: float, obstacle: str | None = None) -> None:
        super().__init__()
        if feature_cache_gib < 0:
            msg = f"feature_cache_gib must be positive, or 0 for no cache, got {feature_cache_gib}."
            raise ValueError(msg)
        self._budget = feature_cache_gib * GIB
        self._obstacle = obstacle or ("feature_cache_gib=0" if feature_cache_gib == 0 else None)
        self._datamodule: Any = None
        self._kept: _KeptInputs | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the training dataloader, if features stay the same."""
        datamodule: Any = getattr(trainer, "datamodule", None)
        obstacle = self._obstacle or _find_obstacle(trainer, datamodule, pl_module)
        if obstacle is None:
            loader = datamodule.train_dataloader()
            kept = _KeptInputs(loader, trainer, pl_module)
            obstacle = kept.allocate(self._budget, Path(trainer.default_root_dir))
        if obstacle is not None:
            logger.info("Features are computed anew in each epoch: %s.", obstacle)
            return
        self._datamodule, self._kept = datamodule, kept
        warnings.filterwarnings("ignore", "The 'train_dataloader' does not have many workers")
        # a dataset of indices: no worker process has to load or to pass on anything
        datamodule.train_dataloader = lambda: DataLoader(
            range(len(loader.dataset)),  # type: ignore[arg-type]
            batch_size=loader.batch_size,
            sampler=loader.sampler,
            drop_last=loader.drop_last,
            generator=loader.generator,
            collate_fn=kept.read,
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget all, and leave the datamodule as it was."""
        del trainer, pl_module, stage
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same after an interrupted fit."""
        del trainer, pl_module, exception
        self._end()

    def _end(self) -> None:
        if self._kept is not None:
            del self._datamodule.train_dataloader
            self._kept.forget()
            self._datamodule = self._kept = None


class _KeptInputs:
    """Training inputs of images by index, each computed when it is first asked for.

    Args:
        loader (DataLoader): The training dataloader of images.
        trainer (Trainer): The trainer that is fitting.
        module (Any): The model.
    """

    def __init__(self, loader: DataLoader, trainer: Trainer, module: Any) -> None:
        self._loader = loader
        self._trainer = trainer
        self._module = module
        self._is_known = torch.zeros(len(loader.dataset), dtype=torch.bool)  # type: ignore[arg-type]
        self._parts: list[Tensor] = []

    def allocate(self, budget: float, root: Path) -> str | None:
        """Make room in memory, or beyond the budget in bytes in a file; if there is none, the result says so."""
        count, example = len(self._is_known), self._compute([0])
        size = count * sum(part.nbytes for part in example)
        folder = None if size <= budget else root
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            # writing to a mapped file on a full disk would kill the process
            if size * self._trainer.num_devices > shutil.disk_usage(folder).free:
                return f"{size / GIB:.1f} GiB a process are more than feature_cache_gib and the free space in {folder}"
        self._parts = [_allocate((count, *part.shape[1:]), part.dtype, folder) for part in example]
        place = f"a temporary file in {folder}" if folder else "memory"
        logger.info("Features of %d images are computed once and kept in %s: %.2f GiB.", count, place, size / GIB)
        return None

    def read(self, indices: list[int]) -> CachedBatch:
        """Collate a batch, and compute what is not known yet."""
        if missing := [index for index in indices if not self._is_known[index]]:
            for part, values in zip(self._parts, self._compute(missing), strict=True):
                part[missing] = values.cpu()
            self._is_known[missing] = True
        return CachedBatch(tuple(part[indices] for part in self._parts))

    def forget(self) -> None:
        """Free the memory or the file."""
        self._parts.clear()

    @torch.no_grad()
    def _compute(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Do with images what the trainer does between the dataloader and the loss."""
        precision, strategy = self._trainer.precision_plugin, self._trainer.strategy
        batch = self._loader.collate_fn([self._loader.dataset[index] for index in indices])
        batch = strategy.batch_to_device(precision.convert_input(batch))
        if self._module.pre_processor:
            self._module.pre_processor.on_train_batch_start(self._trainer, self._module, batch, 0)
        with precision.forward_context():
            return self._module.features_and_targets(batch)


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """Make an uninitialised tensor, in memory or mapped to a temporary file in a folder."""
    if folder is None:
        return torch.empty(shape, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    # the file has no name, or loses it, before anything is written: it goes with the tensor, however the run ends
    with TemporaryFile(dir=folder) as file:
        file.truncate(size)
        return torch.frombuffer(mmap(file.fileno(), size), dtype=dtype).view(shape)


def _find_obstacle(trainer: Trainer, datamodule: Any, module: Any) -> str | None:
    """Say why the features of an image may differ between epochs, or cannot be kept."""
    if not isinstance(datamodule, AnomalibDataModule):
        return "the training images do not come from a datamodule of anomalib"
    if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
        return "the dataloader changes between epochs"
    loader = datamodule.train_dataloader()
    if not isinstance(loader, DataLoader) or loader.batch_size is None:
        return "the training dataloader has a batch sampler of its own"
    augmentations = getattr(loader.dataset, "augmentations", None)
    transform = getattr(module.pre_processor, "transform", None)
    transforms = [*flatten_transform(augmentations), *flatten_transform(transform)]
    # with another resize, the size of an image could depend on the others in its batch
    if augmentations is None or not all(
        isinstance(part, Resize | CenterCrop) and len(part.size or ()) == 2 for part in transforms
    ):
        return "the training images are not only resized to a fixed height and width"
    return None
