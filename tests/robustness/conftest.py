# SPDX-License-Identifier: Apache-2.0

"""Tiny models of all four kinds on tiny data, for what must hold for every model."""

from pathlib import Path

import pytest
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import seed_everything

from anomalib_recon import models

# without pictures, whose drawing takes longer than the rest
TINY = {
    "InTra": {
        "image_size": 64, "patch_size": 8, "window_size": 5, "embed_dim": 16, "depth": 2, "num_heads": 2,
        "windows_per_image": 10, "windows_per_step": 64, "learning_rate": 2e-3, "visualizer": False,
    },
    "ADTR": {
        "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 64,
        "feature_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32, "learning_rate": 2e-3,
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
}  # fmt: skip


def build(name: str, **arguments) -> AnomalibModule:
    """The same tiny model on every call."""
    seed_everything(0)
    return getattr(models, name)(**{**TINY[name], **arguments})


def data(root: Path, **arguments) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **arguments})


def engine_in(folder: Path, **trainer) -> Engine:
    defaults = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, **{**defaults, **trainer})


def checkpoint_of(engine: Engine) -> str:
    return engine.trainer.checkpoint_callback.best_model_path


@pytest.fixture(scope="session", params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    """Each of the models in turn."""
    return request.param


@pytest.fixture(scope="session")
def trained(name: str, stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AnomalibModule, str]:
    """A model after one epoch, and its checkpoint."""
    model = build(name)
    engine = engine_in(tmp_path_factory.mktemp(name))
    engine.fit(model, datamodule=data(stripes))
    return model, checkpoint_of(engine)
