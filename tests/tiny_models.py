# SPDX-License-Identifier: Apache-2.0

"""A tiny model of each kind, for what must hold for all. A further model is entered in ``TINY``, and nowhere else."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback

from anomalib_recon import models
from anomalib_recon.data import DemoAD
from tests.exports import read_images

# without pictures, whose drawing takes longer than the rest
TINY: dict[str, dict[str, Any]] = {
    "InTra": {
        "image_size": 64, "patch_size": 8, "window_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 2,
        "windows_per_image": 10, "windows_per_step": 64, "learning_rate": 2e-3, "visualizer": False,
    },
    "ADTR": {
        "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 64,
        "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "learning_rate": 2e-3,
        "pool_size": 8, "visualizer": False,
    },
    "SAAE": {
        "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 64,
        "explained_variance": 0.9, "learning_rate": 2e-3, "visualizer": False,
    },
    "PatchAE": {
        "backbone": "resnet18", "pre_trained": False, "image_size": 64, "embed_dim": 16, "learning_rate": 1e-3,
        "trained_stages": 1, "coreset_ratio": 0.25, "sigma": 2.0, "visualizer": False,
    },
    "FeatureInpainting": {
        "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 64,
        "context_dim": 8, "window_size": 5, "rank": 8, "num_units": 16, "visualizer": False,
    },
}  # fmt: skip

# fitted in one pass: there is no epoch in which the loss could fall or the run be interrupted
CLOSED_FORM = {"FeatureInpainting"}

OWN_SIZE = (64, 64)
EPOCHS = 3


class Probe(Callback):
    """Notes what happens in a training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations = 0

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.validations += 1


class Trained(NamedTuple):
    """A model, its checkpoint, and what happened in its training."""

    model: AnomalibModule
    checkpoint: str
    probe: Probe


def build(name: str, seed: int = 0, **arguments) -> AnomalibModule:
    """The same tiny model on every call."""
    seed_everything(seed)
    return getattr(models, name)(**{**TINY[name], **arguments})


def demo_data(root: Path) -> DemoAD:
    return DemoAD(root=root, train_batch_size=5, eval_batch_size=4)


def demo_images(root: Path, size: tuple[int, int]) -> np.ndarray:
    """All test images at a size, ``(14, 3, *size)`` with values in [0, 1]."""
    datamodule = demo_data(root)
    return read_images(datamodule.root / datamodule.category / "test", size)


def engine_in(folder: Path, **trainer) -> Engine:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, **{**defaults, **trainer})


def checkpoint_of(engine: Engine) -> str:
    return engine.trainer.checkpoint_callback.best_model_path


def train(model: AnomalibModule, demo: Path, folder: Path, ckpt_path: str | None = None, **trainer) -> Trained:
    """Train a model on demo data."""
    probe = Probe()
    engine = engine_in(folder, **{"max_epochs": EPOCHS, **trainer, "callbacks": [probe, *trainer.get("callbacks", [])]})
    engine.fit(model, datamodule=demo_data(demo), ckpt_path=ckpt_path)
    return Trained(model.eval(), checkpoint_of(engine), probe)
