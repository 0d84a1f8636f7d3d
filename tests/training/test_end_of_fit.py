# SPDX-License-Identifier: Apache-2.0

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from anomalib_recon import models
from anomalib_recon.metrics import AUROC, RawScoreEvaluator
from anomalib_recon.models import SAAE, InTra
from tests.tiny_models import demo_data

TINY: dict[str, dict[str, Any]] = {
    "InTra": {
        "image_size": 32, "patch_size": 8, "window_size": 3, "embed_dim": 8, "depth": 1, "num_heads": 1,
        "windows_per_image": 5, "windows_per_step": 64,
    },
    "SAAE": {
        "backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "image_size": 32, "latent_dim": 4,
    },
}  # fmt: skip
# a score that nothing reaches
UNREACHED = {"mode": "max", "min_delta": 2.0}


@pytest.fixture(params=TINY)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def build(name: str) -> InTra | SAAE:
    seed_everything(0)
    return getattr(models, name)(**TINY[name], learning_rate=2e-3, visualizer=False)


def data(root: Path, **arguments) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **sizes, **arguments)


def engine_in(folder: Path, *callbacks: Callback, **trainer) -> Engine:
    defaults = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, callbacks=[*callbacks], **{**defaults, **trainer})


class Watch(Callback):
    """Notes after how many epochs there is a validation, and whether the model is ready for it."""

    def __init__(self) -> None:
        self.validated: list[int] = []
        self.ready: list[bool] = []

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.validated.append(trainer.fit_loop.epoch_progress.current.ready)
            # InTra's mean difference is zero before it is known
            self.ready.append(not isinstance(pl_module, InTra) or bool(pl_module.model.normal_difference.any()))


def metric_of(model: InTra | SAAE, metric: str, datamodule: MVTecAD, folder: Path) -> Any:
    """A metric as a test of the model gives it, to compare with."""
    [metrics] = engine_in(folder / "test").test(model, datamodule=datamodule)
    return pytest.approx(metrics[metric], abs=1e-6)


def test_validation_runs_once_if_nobody_watches(name: str, stripes: Path, tmp_path: Path) -> None:
    watch, model = Watch(), build(name)
    engine = engine_in(tmp_path, watch, ModelCheckpoint(tmp_path, monitor="train_loss"))
    engine.fit(model, datamodule=data(stripes))
    assert watch.validated == [3]
    assert watch.ready == [True]
    assert bool(model.post_processor.image_threshold.isfinite())
    assert bool(model.post_processor.pixel_threshold.isfinite())
    assert engine.trainer.limit_val_batches == 1.0


def test_image_auroc_stops_training(name: str, demo: Path, tmp_path: Path) -> None:
    watch, model = Watch(), build(name)
    stop = EarlyStopping(monitor="image_AUROC", patience=1, **UNREACHED)
    engine = engine_in(tmp_path, watch, stop, max_epochs=9)
    engine.fit(model, datamodule=demo_data(demo))
    assert engine.trainer.current_epoch == 2
    # InTra is validated once more, with the weights of its best epoch
    assert watch.validated == ([1, 2] if name == "SAAE" else [1, 2, 2])
    assert all(watch.ready)
    score = float(engine.trainer.callback_metrics["image_AUROC"])
    assert score == metric_of(model, "image_AUROC", demo_data(demo), tmp_path)
    assert 0 < float(stop.best_score) < 1


def test_checkpoint_of_the_best_pixel_auroc_is_whole(name: str, demo: Path, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="pixel_AUROC", mode="max", save_top_k=-1, filename="{epoch}")
    watch = Watch()
    engine = engine_in(tmp_path, watch, best)
    engine.fit(build(name), datamodule=demo_data(demo))
    assert watch.validated == ([1, 2, 3] if name == "SAAE" else [1, 2, 3, 3])
    assert len(best.best_k_models) == 3
    for path, score in best.best_k_models.items():
        loaded = getattr(models, name).load_from_checkpoint(path)
        assert bool(loaded.post_processor.image_threshold.isfinite())
        assert float(score) == metric_of(loaded, "pixel_AUROC", demo_data(demo), tmp_path)


def test_best_checkpoint_survives_a_stop(name: str, stripes: Path, tmp_path: Path) -> None:
    class Spoil(Callback):
        """Makes all but the first epoch bad."""

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            if trainer.current_epoch > 0:
                for weight in pl_module.model.parameters():
                    weight.data.zero_()

    best = ModelCheckpoint(tmp_path, monitor="pixel_AUROC", mode="max", filename="{epoch}")
    stop = EarlyStopping(monitor="image_AUROC", patience=2, **UNREACHED)
    engine = engine_in(tmp_path, Spoil(), best, stop, max_epochs=9)
    engine.fit(build(name), datamodule=data(stripes))
    assert engine.trainer.current_epoch == 3
    loaded = getattr(models, name).load_from_checkpoint(best.best_model_path)
    assert float(best.best_model_score) == metric_of(loaded, "pixel_AUROC", data(stripes), tmp_path)


def test_each_validation_within_an_epoch_is_of_a_finished_model(stripes: Path, tmp_path: Path) -> None:
    finished: list[int] = []

    class Finishing(SAAE):
        def finish(self) -> None:
            finished.append(self.trainer.global_step)

    model = Finishing(**TINY["SAAE"], visualizer=False)
    stop = EarlyStopping(monitor="image_AUROC", mode="max", patience=9)
    engine_in(tmp_path, stop, max_epochs=2, val_check_interval=1).fit(model, datamodule=data(stripes))
    assert [step for step in finished if step] == [1, 2, 3, 4, 5, 6]


def test_without_validation_images_a_model_is_trained_and_saved(
    name: str, stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    model, engine = build(name), engine_in(tmp_path, max_epochs=1)
    engine.fit(model, datamodule=data(stripes, val_split_mode="none"))
    [told] = [message for message in caplog.messages if message.startswith("There are no validation images")]
    assert "FalsePositiveRatePostProcessor" in told
    assert engine.trainer.limit_val_batches == 1.0
    loaded = type(model).load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key].isnan(), value.isnan()), key
    # without thresholds, labels would mean nothing
    engine.test(loaded, datamodule=data(stripes, val_split_mode="none"), verbose=False)
    assert caplog.messages[-1].startswith("The model has no thresholds")


@pytest.mark.parametrize("trainer", [{"check_val_every_n_epoch": 2}, {"val_check_interval": "00:00:00:01"}], ids=str)
def test_checkpoints_that_wait_for_validations_without_images_are_refused(
    stripes: Path, tmp_path: Path, trainer: dict
) -> None:
    engine = engine_in(tmp_path, **trainer)
    with pytest.raises(ValueError, match="have Lightning save after validations, and there are no validation images"):
        engine.fit(build("SAAE"), datamodule=data(stripes, val_split_mode="none"))
    assert engine.trainer.global_step == 0


def test_validation_within_epochs_without_a_watcher(stripes: Path, tmp_path: Path) -> None:
    watch = Watch()
    engine_in(tmp_path, watch, max_epochs=2, val_check_interval=1).fit(build("SAAE"), datamodule=data(stripes))
    assert watch.validated == [1, 1, 1, 2, 2, 2]


def test_validation_every_second_epoch(name: str, stripes: Path, tmp_path: Path) -> None:
    watch, model = Watch(), build(name)
    best = ModelCheckpoint(tmp_path, monitor="pixel_AUROC", mode="max", save_top_k=-1, filename="{epoch}")
    engine = engine_in(tmp_path, watch, best, check_val_every_n_epoch=2)
    engine.fit(model, datamodule=data(stripes))
    assert watch.validated == [2, 3]  # and at the end
    assert all(watch.ready)
    assert len(best.best_k_models) == 2
    score = float(engine.trainer.callback_metrics["pixel_AUROC"])
    assert score == metric_of(model, "pixel_AUROC", data(stripes), tmp_path)


def test_every_second_epoch_is_validated_without_a_watcher(name: str, stripes: Path, tmp_path: Path) -> None:
    watch = Watch()
    engine_in(tmp_path, watch, check_val_every_n_epoch=2).fit(build(name), datamodule=data(stripes))
    assert watch.validated == [2, 3]
    assert all(watch.ready)


@pytest.mark.parametrize(("mode", "warned"), [("same_as_test", True), ("from_test", True), ("synthetic", False)])
def test_choosing_on_test_images_is_told(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, warned: bool
) -> None:
    stop = EarlyStopping(monitor="image_AUROC", mode="max")
    datamodule = data(stripes, val_split_mode=mode)
    engine_in(tmp_path, stop, max_epochs=1).fit(build("SAAE"), datamodule=datamodule)
    lines = [message for message in caplog.messages if "test images" in message]
    expected = (
        "The validation set holds test images (val_split_mode), so what monitors image_AUROC chooses on test images."
    )
    assert lines == ([expected] if warned else [])


def test_nothing_is_told_without_a_watcher(stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    engine_in(tmp_path, max_epochs=1).fit(build("SAAE"), datamodule=data(stripes))
    assert not [message for message in caplog.messages if "test images" in message]


@pytest.mark.parametrize(
    "saving",
    [
        {"every_n_epochs": 2, "filename": "{epoch}"},
        {"every_n_train_steps": 5},  # of nine: amid the second epoch
        {"every_n_train_steps": 9},  # at the last step, before the end
        {"monitor": "train_loss", "mode": "max"},  # that of the first epoch
    ],
    ids=str,
)
def test_a_checkpoint_from_before_the_end_is_completed(name: str, stripes: Path, tmp_path: Path, saving: dict) -> None:
    saved = ModelCheckpoint(tmp_path, **saving)
    engine = engine_in(tmp_path, saved, max_epochs=4 if "every_n_epochs" in saving else 3)
    model = build(name)
    engine.fit(model, datamodule=data(stripes))
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    if "every_n_epochs" in saving:
        assert Path(saved.best_model_path).name == "epoch=3.ckpt"
        assert checkpoint["epoch"] == 3
    loaded = type(model).load_from_checkpoint(saved.best_model_path)
    assert bool(loaded.post_processor.image_threshold.isfinite())
    assert bool(loaded.post_processor.pixel_threshold.isfinite())
    assert name != "InTra" or bool(loaded.model.normal_difference.any())
    if checkpoint["global_step"] == engine.trainer.global_step:
        for key, value in model.state_dict().items():
            assert torch.equal(checkpoint["state_dict"][key], value), key


def test_a_checkpoint_that_is_completed_is_not_saved_as_the_last_one(stripes: Path, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_epochs=2, filename="{epoch}")
    engine = engine_in(tmp_path, saved, check_val_every_n_epoch=2)
    engine.fit(build("SAAE"), datamodule=data(stripes))
    [path] = tmp_path.glob("*.ckpt")
    assert str(path) == saved.best_model_path
    checkpoint = torch.load(path, weights_only=True)
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 6)
    assert checkpoint["state_dict"]["post_processor._image_threshold"].isfinite()


def test_a_checkpoint_without_the_optimiser_stays_one(stripes: Path, tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=9, save_weights_only=True)
    engine_in(tmp_path, saved).fit(build("SAAE"), datamodule=data(stripes))
    checkpoint = torch.load(saved.best_model_path, weights_only=True)
    assert "optimizer_states" not in checkpoint
    assert checkpoint["state_dict"]["post_processor._image_threshold"].isfinite()


def test_all_checkpoints_of_the_training_loss_are_completed(stripes: Path, tmp_path: Path) -> None:
    """Not the best one alone: the last one, and the next best."""
    saved = ModelCheckpoint(tmp_path, monitor="train_loss", save_top_k=2, save_last=True, filename="{epoch}")
    model = SAAE(**TINY["SAAE"], distance="mahalanobis", visualizer=False)
    engine_in(tmp_path, saved, EarlyStopping("train_loss", patience=9)).fit(model, datamodule=data(stripes))
    paths = {saved.last_model_path, *saved.best_k_models}
    assert len(paths) == 3
    for path in paths:
        state = torch.load(path, weights_only=True)["state_dict"]
        [whitening] = [value for name, value in state.items() if name.endswith("whitening")]
        assert not torch.equal(whitening, torch.eye(whitening.shape[-1]).expand_as(whitening))
        assert state["post_processor._image_threshold"].isfinite()


def test_metrics_of_the_user_are_kept(stripes: Path, tmp_path: Path) -> None:
    model = build("SAAE")
    model.evaluator = RawScoreEvaluator(val_metrics=[AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_")])
    stop = EarlyStopping(monitor="image_AUROC", mode="max")
    engine_in(tmp_path, stop, max_epochs=1).fit(model, datamodule=data(stripes))
    assert [metric.name for metric in model.evaluator.val_metrics] == ["pixel_AUROC"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_monitored_metrics_are_gone_after_the_fit(stripes: Path, tmp_path: Path, interrupted: bool) -> None:
    class Interrupt(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            assert [metric.name for metric in pl_module.evaluator.val_metrics] == ["image_AUROC"]
            if interrupted:
                raise KeyError

    model, watch = build("SAAE"), Watch()
    stop = EarlyStopping(monitor="image_AUROC", mode="max")
    try:
        engine_in(tmp_path, stop, Interrupt(), max_epochs=1).fit(model, datamodule=data(stripes))
    except KeyError:
        assert interrupted
    assert len(model.evaluator.val_metrics) == 0
    engine_in(tmp_path, watch).fit(model, datamodule=data(stripes))
    assert watch.validated == [3]


def test_trainer_flags_win(name: str, stripes: Path, tmp_path: Path) -> None:
    watch = Watch()
    engine = engine_in(tmp_path / "steps", watch, max_steps=3, max_epochs=-1)
    engine.fit(build(name), datamodule=data(stripes))
    assert engine.trainer.global_step == 3
    assert len(watch.validated) == 1
    engine = engine_in(tmp_path / "batches", watch, max_epochs=1, limit_train_batches=1, num_sanity_val_steps=1)
    engine.fit(build(name), datamodule=data(stripes))
    assert engine.trainer.num_training_batches == 1
    assert len(watch.validated) == 2
    engine = engine_in(tmp_path / "none", watch, max_epochs=1, limit_val_batches=0)
    engine.fit(build(name), datamodule=data(stripes))
    assert len(watch.validated) == 2


def test_stop_by_another_callback_is_finished_and_saved(name: str, stripes: Path, tmp_path: Path) -> None:
    watch, model = Watch(), build(name)
    stop = EarlyStopping(monitor="train_loss", patience=1, min_delta=1e9)
    engine = engine_in(tmp_path, watch, stop, max_epochs=20)
    engine.fit(model, datamodule=data(stripes))
    assert engine.trainer.current_epoch == 2
    assert watch.validated == [2]
    loaded = type(model).load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert bool(loaded.post_processor.image_threshold.isfinite())


def test_an_engine_can_be_used_again_after_an_interruption(name: str, stripes: Path, tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if not hasattr(self, "done"):
                self.done = True
                raise ZeroDivisionError

    watch, model = Watch(), build(name)
    engine = engine_in(tmp_path, Interrupt(), watch)
    with pytest.raises(ZeroDivisionError):
        engine.fit(build(name), datamodule=data(stripes))
    assert engine.trainer.limit_val_batches == 1.0
    engine.fit(model, datamodule=data(stripes))
    assert len(watch.validated) == 1
    assert bool(model.post_processor.image_threshold.isfinite())


def test_a_fit_without_an_epoch_leaves_the_trainer_as_it_was(name: str, stripes: Path, tmp_path: Path) -> None:
    engine = engine_in(tmp_path, max_epochs=0)
    engine.fit(build(name), datamodule=data(stripes))
    assert engine.trainer.limit_val_batches == 1.0
