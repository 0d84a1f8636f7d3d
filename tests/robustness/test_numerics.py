# SPDX-License-Identifier: Apache-2.0

"""No number becomes NaN or infinite without a word."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.models import AnomalibModule
from torch import Tensor, nn

from tests.conftest import save, write_stripes
from tests.tiny_models import CLOSED_FORM, build, engine_in

from .conftest import data


def assert_finite(state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        assert value.isfinite().all(), key


def assert_one_colour_is_scored(model: AnomalibModule, level: float, folder: Path) -> None:
    root = write_stripes(folder / "data")
    for path in (root / "stripes").rglob("good/*.png"):
        save(np.full((64, 64), level), path)
    engine = engine_in(folder / "results")
    engine.fit(model, datamodule=data(root))
    assert_finite(model.state_dict())
    for batch in engine.predict(model, datamodule=data(root)):
        assert batch.pred_score.isfinite().all()
        assert batch.anomaly_map.isfinite().all()


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0], ids=["black", "grey", "white"])
def test_images_of_one_colour(name: str, tmp_path: Path, level: float) -> None:
    assert_one_colour_is_scored(build(name), level, tmp_path)


@pytest.mark.parametrize(("kind", "arguments"), [("InTra", {}), ("ADTR", {}), ("SAAE", {"latent_dim": 8})])
def test_images_of_one_colour_by_mahalanobis(kind: str, arguments: dict, tmp_path: Path) -> None:
    assert_one_colour_is_scored(build(kind, distance="mahalanobis", **arguments), 0.5, tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_loss_stops_the_training_and_keeps_the_last_checkpoint(
    name: str, stripes: Path, tmp_path: Path, value: float
) -> None:
    if name in CLOSED_FORM:
        pytest.skip("has no second epoch")
    model = build(name)

    def break_in_second_epoch(loss: nn.Module, arguments: tuple, result: Tensor) -> Tensor:
        return result * value if model.current_epoch == 1 else result

    model.loss.register_forward_hook(break_in_second_epoch)
    engine = engine_in(tmp_path, max_epochs=3)
    with pytest.raises(
        RuntimeError, match=r"^The loss is \w+ in epoch 1; train anew with a lower learning_rate \(0\.00\d\)"
    ):
        engine.fit(model, datamodule=data(stripes))
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["epoch"] == 0
    # without the thresholds, which are set when a training ends
    assert_finite({key: weight for key, weight in saved["state_dict"].items() if key.startswith("model.")})
