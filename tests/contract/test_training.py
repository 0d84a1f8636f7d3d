# SPDX-License-Identifier: Apache-2.0

"""Training, test and prediction with anomalib's engine, on demo data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.data.utils import read_image
from anomalib.models import AnomalibModule
from lightning.pytorch.callbacks import Callback
from PIL import Image

from anomalib_recon.data import DemoAD
from tests.tiny_models import CLOSED_FORM, EPOCHS, Trained, build, demo_data, engine_in, train

METRICS = {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO", "pixel_F1Score"}


def assert_same_state(model: AnomalibModule, other: AnomalibModule) -> None:
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(state[key], value), key


def test_the_loss_falls(name: str, trained: Trained) -> None:
    losses = trained.probe.losses
    if name in CLOSED_FORM:
        assert len(losses) == 1
        assert 0 < losses[0] < 1  # of whitened features, which would be 1 if nothing were predicted
        return
    assert len(losses) == EPOCHS
    assert losses[-1] < losses[0]


def test_validation_runs_once_and_sets_the_thresholds(trained: Trained) -> None:
    assert trained.probe.validations == 1
    for key, value in trained.model.post_processor.state_dict().items():
        assert value.isfinite(), key


def test_the_same_seed_gives_the_same_model(name: str, trained: Trained, demo: Path, tmp_path: Path) -> None:
    assert_same_state(train(build(name), demo, tmp_path).model, trained.model)


def test_an_interrupted_run_goes_on_to_the_same_model(name: str, trained: Trained, demo: Path, tmp_path: Path) -> None:
    if name in CLOSED_FORM:
        pytest.skip("there is no epoch to interrupt")

    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            if (trainer.current_epoch, batch_idx) == (EPOCHS - 1, 1):
                raise KeyError

    with pytest.raises(KeyError):
        train(build(name), demo, tmp_path, callbacks=[Interrupt()])
    [checkpoint] = tmp_path.rglob("*.ckpt")
    resumed = train(build(name, seed=1), demo, tmp_path / "rest", ckpt_path=str(checkpoint))
    assert len(resumed.probe.losses) == 1
    assert_same_state(resumed.model, trained.model)


def test_a_run_that_is_stopped_is_finished_and_saved(name: str, demo: Path, tmp_path: Path) -> None:
    stopped = train(build(name), demo, tmp_path, max_steps=1, max_epochs=-1)
    assert stopped.probe.validations == 1
    assert stopped.model.post_processor.image_threshold.isfinite()
    assert_same_state(type(stopped.model).load_from_checkpoint(stopped.checkpoint), stopped.model)


def test_the_loss_is_computed_without_autocast(name: str, demo: Path, tmp_path: Path) -> None:
    model = build(name)
    compared = []

    def compare(loss: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], result: torch.Tensor) -> None:
        if not torch.is_autocast_enabled("cpu"):
            return
        with torch.autocast("cpu", enabled=False):
            expected = loss.forward(*arguments, **keywords)
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)
        compared.append(float(result.detach()))

    model.loss.register_forward_hook(compare, with_kwargs=True)
    train(model, demo, tmp_path, max_epochs=1, precision="bf16-mixed")
    assert len(compared) >= 3
    [metrics] = engine_in(tmp_path, precision="bf16-mixed").test(model, datamodule=demo_data(demo))
    assert all(0 <= value <= 1 for value in metrics.values())


def test_anomalous_training_images_are_refused(name: str, demo: Path, tmp_path: Path) -> None:
    class Mixed(DemoAD):
        def _setup(self, _stage: str | None = None) -> None:
            super()._setup(_stage)
            samples = self.train_data.samples
            samples.loc[samples.index[:4], "label_index"] = 1

    with pytest.raises(ValueError, match=r"trains on normal images alone, but [^\n]*\b4\b[^\n]*$"):
        engine_in(tmp_path).fit(build(name), datamodule=Mixed(root=demo))


def test_what_a_test_and_a_prediction_give(trained: Trained, demo: Path, tmp_path: Path) -> None:
    model = type(trained.model).load_from_checkpoint(trained.checkpoint)
    model.visualizer = model.configure_visualizer()
    engine = engine_in(tmp_path / "tested")
    [metrics] = engine.test(model, datamodule=demo_data(demo))
    assert metrics.keys() == METRICS
    assert all(0 <= value <= 1 for value in metrics.values())
    check_pictures(tmp_path / "tested", model, with_ground_truth=True)

    folder = demo_data(demo).root / "grid" / "test"
    model.visualizer = model.configure_visualizer()  # anomalib's keeps its folder
    engine = engine_in(tmp_path / "predicted")
    batches = engine.predict(model, dataset=PredictDataset(folder))
    assert len(batches) == 14
    model.eval()
    for batch in batches:
        with torch.no_grad():
            expected = model(read_image(batch.image_path[0], as_tensor=True)[None])
        torch.testing.assert_close(batch.pred_score, expected.pred_score, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(batch.anomaly_map[:, None], expected.anomaly_map, atol=1e-4, rtol=1e-4)
    check_pictures(tmp_path / "predicted", model, with_ground_truth=False)


def check_pictures(folder: Path, model: AnomalibModule, with_ground_truth: bool) -> None:
    """There is one for each image: image, ground truth, reconstruction if it is a picture, map, and predicted mask."""
    pictures = list(folder.rglob("*.png"))
    assert len(pictures) == 14
    panels = 4 + with_ground_truth + hasattr(model.model, "picture")
    assert {Image.open(path).size for path in pictures} == {(panels * 256, 256)}


def test_an_engine_trains_a_new_model_after_it_has_tested_a_checkpoint(
    name: str, trained: Trained, demo: Path, tmp_path: Path
) -> None:
    engine = engine_in(tmp_path, max_epochs=EPOCHS)
    engine.test(build(name), datamodule=demo_data(demo), ckpt_path=trained.checkpoint, verbose=False)
    model = build(name)
    engine.fit(model, datamodule=demo_data(demo))
    assert_same_state(model, trained.model)
