# SPDX-License-Identifier: Apache-2.0

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback

from anomalib_recon.models import InTra
from anomalib_recon.training import HeldOutImages
from tests.conftest import write_stripes

TINY = {
    "image_size": 64, "patch_size": 8, "window_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2,
    "windows_per_image": 20, "windows_per_step": 64, "learning_rate": 2e-3, "visualizer": False,
}  # fmt: skip
TRAINER = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def data(root: Path) -> MVTecAD:
    return MVTecAD(root=root, category="stripes", train_batch_size=5, eval_batch_size=4, num_workers=0)


def build(seed: int = 0, **arguments) -> InTra:
    seed_everything(seed)
    return InTra(**{**TINY, **arguments})


def train(
    root: Path, folder: Path, model: InTra | None = None, ckpt_path: Path | None = None, **trainer
) -> tuple[InTra, HeldOutImages, Engine]:
    model = model or build()
    engine = Engine(default_root_dir=folder, **{**TRAINER, **trainer})
    engine.fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model, held_out_in(engine), engine


def held_out_in(engine: Engine) -> HeldOutImages:
    [callback] = (callback for callback in engine.trainer.callbacks if isinstance(callback, HeldOutImages))
    return callback


def checkpoint_in(folder: Path) -> Path:
    [checkpoint] = folder.rglob("model.ckpt")
    return checkpoint


class Watch(Callback):
    """Notes the images of each training batch, and the weights at the end of each epoch."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.paths += batch.image_path
        if trainer.is_last_batch:
            self.weights.append(pl_module.model.head.weight.detach().clone())


class Interrupt(Callback):
    """Ends a run at a moment."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.moment == "in the middle of an epoch" and trainer.current_epoch == 2 and batch_idx == 1:
            raise KeyError(self.moment)

    def on_validation_start(self, trainer, pl_module) -> None:
        if self.moment == "while finishing":
            raise KeyError(self.moment)

    def on_train_start(self, trainer, pl_module) -> None:
        if self.moment == "before the first step":
            raise KeyError(self.moment)


def test_held_out_images_are_normal_and_not_trained_on(stripes: Path, tmp_path: Path) -> None:
    watch = Watch()
    _, held_out, engine = train(stripes, tmp_path, build(held_out_fraction=0.3), callbacks=[watch])
    images = {str(path) for path in (stripes / "stripes" / "train" / "good").iterdir()}
    assert len(held_out.paths) == 4
    assert set(held_out.paths) < images
    assert set(watch.paths) == images - set(held_out.paths)
    assert len(watch.paths) == 4 * 8  # epochs, images
    assert len(held_out.losses) == 4
    assert float(engine.trainer.callback_metrics["held_out_loss"]) == pytest.approx(held_out.losses[-1])


@pytest.mark.parametrize(
    ("fraction", "most", "count"), [(0.001, 20, 1), (0.25, 20, 3), (0.9, 2, 2), (0.9, 20, 11)], ids=str
)
def test_count_is_a_fraction_and_has_bounds(
    stripes: Path, tmp_path: Path, fraction: float, most: int, count: int
) -> None:
    model = build(held_out_fraction=fraction, max_held_out=most)
    _, held_out, _ = train(stripes, tmp_path, model, max_epochs=1, limit_val_batches=0)
    assert len(set(held_out.paths)) == count


def test_which_images_depends_on_the_seed_alone(stripes: Path, tmp_path: Path) -> None:
    def draw(**arguments) -> list[str]:
        model = build(held_out_fraction=0.3, **arguments)  # the weights of other networks take other random numbers
        return train(stripes, tmp_path, model, max_epochs=1, limit_val_batches=0)[1].paths

    paths = draw()
    assert draw(image_size=32) == draw(embed_dim=32, depth=3) == draw(augment=False) == paths
    assert any(set(draw(seed=seed)) != set(paths) for seed in (1, 2))


def test_best_epoch_is_restored(stripes: Path, tmp_path: Path) -> None:
    class Spoil(Callback):
        """Makes the last epoch worse than the one before."""

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            if trainer.current_epoch == 2:
                torch.nn.init.zeros_(pl_module.model.head.weight)

    watch = Watch()
    model, held_out, _ = train(stripes, tmp_path, callbacks=[watch, Spoil()], max_epochs=3)
    assert held_out.losses.index(min(held_out.losses)) == 1
    assert torch.equal(model.model.head.weight, watch.weights[1])
    saved = torch.load(checkpoint_in(tmp_path), weights_only=True)
    assert torch.equal(saved["state_dict"]["model.head.weight"], watch.weights[1])


def test_training_stops_without_a_lower_loss(stripes: Path, tmp_path: Path) -> None:
    model = build(learning_rate=1e-12, patience=2)
    torch.nn.init.zeros_(model.model.head.weight)
    _, held_out, engine = train(stripes, tmp_path, model, max_epochs=50)
    assert engine.trainer.current_epoch < 10
    assert len(held_out.losses) == held_out.losses.index(min(held_out.losses)) + 3
    assert float(model.model.normal_difference.sum()) > 0


def test_a_run_that_has_stopped_trains_on_with_more_patience_alone(stripes: Path, tmp_path: Path) -> None:
    model = build(learning_rate=1e-12, patience=2)
    torch.nn.init.zeros_(model.model.head.weight)
    _, first, _ = train(stripes, tmp_path / "first", model, max_epochs=50)
    checkpoint = checkpoint_in(tmp_path / "first")
    same, second, _ = train(stripes, tmp_path / "second", build(patience=2), checkpoint, max_epochs=60)
    assert second.losses == first.losses
    for name, value in model.model.state_dict().items():
        assert torch.equal(same.model.state_dict()[name], value), name
    _, third, _ = train(stripes, tmp_path / "third", build(learning_rate=1e-12, patience=4), checkpoint, max_epochs=60)
    assert len(third.losses) > len(first.losses)


@pytest.mark.parametrize("moment", ["in the middle of an epoch", "while finishing"])
def test_interrupted_run_resumes_to_the_same_result(stripes: Path, tmp_path: Path, moment: str) -> None:
    whole, of_whole, _ = train(stripes, tmp_path / "whole")
    with pytest.raises(KeyError, match=moment):
        train(stripes, tmp_path / "killed", callbacks=[Interrupt(moment)])
    checkpoint = checkpoint_in(tmp_path / "killed")
    resumed, of_resumed, _ = train(stripes, tmp_path / "rest", build(seed=123), checkpoint)
    assert of_resumed.paths == of_whole.paths
    assert of_resumed.losses == of_whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_finished_run_goes_on_with_more_epochs(stripes: Path, tmp_path: Path) -> None:
    _, first, _ = train(stripes, tmp_path / "first", max_epochs=3)
    checkpoint = checkpoint_in(tmp_path / "first")
    _, second, _ = train(stripes, tmp_path / "second", build(seed=1), checkpoint, max_epochs=4)
    assert second.paths == first.paths
    assert second.losses[:3] == first.losses
    assert len(second.losses) == 4


def test_run_goes_on_though_its_images_have_moved(stripes: Path, tmp_path: Path) -> None:
    train(stripes, tmp_path / "first", max_epochs=2)
    moved = Path(shutil.copytree(stripes, tmp_path / "moved"))
    _, held_out, _ = train(moved, tmp_path / "second", build(), checkpoint_in(tmp_path / "first"), max_epochs=3)
    assert [Path(path).parents[3] for path in held_out.paths] == [moved]
    assert len(held_out.losses) == 3


def test_next_fit_begins_afresh(stripes: Path, tmp_path: Path) -> None:
    model, _, _ = train(stripes, tmp_path / "first", max_epochs=2)
    _, held_out, _ = train(stripes, tmp_path / "second", model, max_epochs=1)
    assert len(held_out.losses) == 1
    loaded = InTra.load_from_checkpoint(checkpoint_in(tmp_path / "first"))
    _, held_out, _ = train(stripes, tmp_path / "third", loaded, max_epochs=1)
    assert len(held_out.losses) == 1
    assert bool(loaded.post_processor.image_threshold.isfinite())


@pytest.mark.parametrize(
    ("moment", "max_epochs"),
    [
        ("never", 4),
        ("never", 0),
        ("before the first step", 4),
        ("in the middle of an epoch", 4),
        ("while finishing", 4),
    ],
)
def test_datamodule_is_as_before(stripes: Path, tmp_path: Path, moment: str, max_epochs: int) -> None:
    datamodule = data(stripes)
    datamodule.prepare_data()
    datamodule.setup()
    before = datamodule.train_data.samples.image_path.tolist()
    engine = Engine(default_root_dir=tmp_path, callbacks=[Interrupt(moment)], **{**TRAINER, "max_epochs": max_epochs})
    with nullcontext() if moment == "never" else pytest.raises(KeyError, match=moment):
        engine.fit(build(), datamodule=datamodule)
    assert datamodule.train_data.samples.image_path.tolist() == before
    assert len(datamodule.train_dataloader().dataset) == len(before) == 12


def test_dataloaders_that_are_made_anew_are_refused(stripes: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"InTra .* leave out reload_dataloaders_every_n_epochs"):
        train(stripes, tmp_path, reload_dataloaders_every_n_epochs=1)


def test_one_image_cannot_be_held_out_and_trained_on(tmp_path: Path) -> None:
    write_stripes(tmp_path, num_train=1)
    with pytest.raises(ValueError, match=r"1 normal images, of which 1 would be held out .* add images"):
        train(tmp_path, tmp_path / "results")


def test_without_a_datamodule_there_are_no_images_to_hold_out(stripes: Path, tmp_path: Path) -> None:
    datamodule = data(stripes)
    datamodule.prepare_data()
    datamodule.setup()
    loaders = {"train_dataloaders": datamodule.train_dataloader(), "val_dataloaders": datamodule.val_dataloader()}
    with pytest.raises(ValueError, match="InTra holds out training images, which needs a datamodule; pass datamodule"):
        Engine(default_root_dir=tmp_path, **TRAINER).fit(build(), **loaders)


def test_broken_loss_stops_the_training_and_keeps_the_last_checkpoint(stripes: Path, tmp_path: Path) -> None:
    class Break(Callback):
        """Breaks a weight after the last step of the second epoch, whose training loss is still finite."""

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            if trainer.current_epoch == 1 and trainer.is_last_batch:
                pl_module.model.head.bias.data[0] = math.nan

    with pytest.raises(
        RuntimeError, match=r"The held-out loss is nan after epoch 1; train anew with a lower learning_rate \(0.002\)"
    ):
        train(stripes, tmp_path, callbacks=[Break()])
    saved = torch.load(checkpoint_in(tmp_path), weights_only=True)
    assert saved["epoch"] == 0
    assert bool(saved["state_dict"]["model.head.bias"].isfinite().all())
