# SPDX-License-Identifier: Apache-2.0

"""The same seed gives the same figures, and no number becomes NaN or infinite without a word."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from anomalib_recon.models.components import CachedBatch
from tests.conftest import save, write_stripes

from .conftest import build, data, engine_in


def test_the_same_seed_gives_the_same_figures(name: str, stripes: Path, tmp_path: Path) -> None:
    figures, states = [], []
    for attempt in ("first", "second"):
        model = build(name)
        figures.append(engine_in(tmp_path / attempt, max_epochs=2).train(model, datamodule=data(stripes)))
        states.append(model.state_dict())
    assert figures[0] == figures[1]
    assert all(torch.equal(states[1][key], value) for key, value in states[0].items())


def assert_finite(state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        assert value.isfinite().all(), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])  # which Lightning turns into the former on a CPU
def test_mixed_precision_trains_and_tests(name: str, stripes: Path, tmp_path: Path, precision: str) -> None:
    model = build(name)
    [metrics] = engine_in(tmp_path, precision=precision).train(model, datamodule=data(stripes))
    assert_finite(model.state_dict())
    assert all(0 <= value <= 1 for value in metrics.values())


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0], ids=["black", "grey", "white"])
def test_images_of_one_colour(name: str, tmp_path: Path, level: float) -> None:
    root = write_stripes(tmp_path / "data")
    for path in (root / "stripes").rglob("good/*.png"):
        save(np.full((64, 64), level), path)
    model = build(name)
    engine = engine_in(tmp_path / "results")
    engine.fit(model, datamodule=data(root))
    assert_finite(model.state_dict())
    for batch in engine.predict(model, datamodule=data(root)):
        assert batch.pred_score.isfinite().all()
        assert batch.anomaly_map.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_loss_stops_the_training_and_keeps_the_last_checkpoint(
    name: str, stripes: Path, tmp_path: Path, value: float
) -> None:
    class Break(Callback):
        """Breaks images, or the features that are kept of them, in the second epoch."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if trainer.current_epoch == 1 and batch_idx == 1:
                broken = batch.inputs[0] if isinstance(batch, CachedBatch) else batch.image
                broken[:] = value

    model = build(name)
    engine = engine_in(tmp_path, max_epochs=3, callbacks=[Break()])
    with pytest.raises(RuntimeError, match=r"^The loss is \w+ in epoch 1; lower learning_rate \(0\.00\d\) or use"):
        engine.fit(model, datamodule=data(stripes))
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == 0
    # without the thresholds, which are set when a training ends
    assert_finite({key: value for key, value in saved["state_dict"].items() if key.startswith("model.")})
    assert_finite(dict(model.named_parameters()))
