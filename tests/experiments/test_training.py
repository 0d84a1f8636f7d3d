# SPDX-License-Identifier: Apache-2.0

"""Trainings of the experiments: what ends them, and what their time is."""

import time
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from anomalib_recon.experiments.training import train
from tests.tiny_models import TINY


class SlowStart(Callback):
    """Takes its time where models compute features, and notes when the fit began and ended."""

    seconds = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        SlowStart.began = time.monotonic()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        time.sleep(1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SlowStart.seconds = time.monotonic() - SlowStart.began


def config_of(name: str, root: Path, folder: Path, **trainer) -> list[str]:
    model = {"class_path": name, "init_args": TINY[name]}
    data = {"class_path": "MVTecAD", "init_args": {"root": str(root), "category": "stripes", "num_workers": 0}}
    common = {"accelerator": "cpu", "enable_progress_bar": False}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": model, "data": data, "trainer": {**common, **trainer}}))
    return ["--config", str(path)]


def test_a_training_ends_after_its_time(stripes: Path, tmp_path: Path) -> None:
    """As that of InTra in the comparison of models: without epochs, and with a rate that follows the time."""
    arguments = config_of("InTra", stripes, tmp_path, max_epochs=-1, max_time="00:00:00:03")
    trained = train([*arguments, "--model.use_one_cycle", "true", "--model.patience", "1000"], tmp_path, seed=0)
    timers = [callback for callback in trained.engine.trainer.callbacks if isinstance(callback, Timer)]
    assert [timer.time_remaining() is not None for timer in timers] == [True]
    assert 3 <= trained.seconds < 60
    [group] = trained.engine.trainer.optimizers[0].param_groups
    assert group["lr"] < 0.1 * TINY["InTra"]["learning_rate"]  # it has come to the end of its cycle


def test_the_time_of_a_training_begins_before_its_features(stripes: Path, tmp_path: Path) -> None:
    arguments = config_of("FeatureInpainting", stripes, tmp_path, max_epochs=1)
    callback = f"--trainer.callbacks+={SlowStart.__module__}.{SlowStart.__qualname__}"
    trained = train([*arguments, callback], tmp_path, seed=0)
    assert trained.seconds == pytest.approx(SlowStart.seconds, abs=0.5)
    assert trained.seconds > 1
