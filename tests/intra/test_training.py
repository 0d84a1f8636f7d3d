# SPDX-License-Identifier: Apache-2.0

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib_recon.models.intra.training_images import rotate_and_flip
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping
from PIL import Image

from anomalib_recon.models import InTra
from anomalib_recon.models.intra import lightning_model
from tests.conftest import images_in, write_stripes

SMALL = {"image_size": 64, "patch_size": 8, "window_size": 5, "embed_dim": 32, "depth": 3, "num_heads": 2}
SCHEDULE = {"windows_per_image": 40, "windows_per_step": 64, "learning_rate": 2e-3}


def data(root: Path, **kwargs) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **kwargs})


def train(
    root: Path, folder: Path, seed: int = 0, ckpt_path: str | None = None, model: InTra | None = None, **trainer
) -> tuple[InTra, Engine]:
    seed_everything(seed)
    model = model or InTra(**SMALL, **SCHEDULE)
    trainer = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, "barebones": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model, engine


class Probe(Callback):
    """Notes what happens in training."""

    def __init__(self) -> None:
        self.weights: list[torch.Tensor] = []
        self.windows: list[int] = []
        self.validations = 0

    def on_train_start(self, trainer, pl_module) -> None:
        def count(_loss, args) -> None:
            if args[0].requires_grad:
                self.windows.append(len(args[0]))

        pl_module.loss.register_forward_pre_hook(count)

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        if trainer.is_last_batch:
            self.weights.append(pl_module.model.head.weight.detach().clone())

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.validations += 1


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InTra, Engine, Probe]:
    probe = Probe()
    model, engine = train(stripes, tmp_path_factory.mktemp("results"), callbacks=[probe], max_epochs=6)
    return model, engine, probe


def test_held_out_reconstruction_improves(trained: tuple[InTra, Engine, Probe]) -> None:
    model, engine, _ = trained
    assert len(model.held_out_losses) == 6
    assert min(model.held_out_losses) < 0.5 * model.held_out_losses[0]
    assert float(engine.trainer.callback_metrics["held_out_loss"]) == pytest.approx(model.held_out_losses[-1])
    assert float(engine.trainer.callback_metrics["train_loss"]) < model.held_out_losses[0]
    assert "windows_per_second" in engine.trainer.callback_metrics


def test_every_training_image_yields_its_windows(trained: tuple[InTra, Engine, Probe]) -> None:
    _, engine, probe = trained
    assert sum(probe.windows) == 6 * 11 * 40  # epochs, images that are not held out, windows per image
    assert max(probe.windows) == 64
    assert engine.trainer.global_step == len(probe.windows)


def test_each_window_trains_all_its_covered_patches(stripes: Path, tmp_path: Path) -> None:
    model = InTra(**{**SMALL, "window_size": 4, "readout": "token"}, **SCHEDULE, covered_per_window=4)
    probe = Probe()
    model, engine = train(stripes, tmp_path, model=model, callbacks=[probe])
    assert sum(probe.windows) == 4 * 4 * 11 * 40  # epochs, patches, images that are not held out, windows per image
    assert engine.trainer.global_step == len(probe.windows)
    assert min(model.held_out_losses) < 0.5 * model.held_out_losses[0]


def test_validation_images_are_inpainted_once(trained: tuple[InTra, Engine, Probe]) -> None:
    model, _, probe = trained
    assert probe.validations == 1
    assert bool(model.post_processor.image_threshold.isfinite())
    assert bool(model.post_processor.pixel_threshold.isfinite())


def test_normal_difference_is_the_mean_over_the_normal_training_images(
    trained: tuple[InTra, Engine, Probe], stripes: Path
) -> None:
    model = trained[0].model.eval()
    images = images_in(stripes / "stripes" / "train" / "good")
    with torch.no_grad():
        expected = model.anomaly_map_generator.difference(images, model.reconstruct(images)).mean(0, keepdim=True)
    torch.testing.assert_close(model.normal_difference, expected)


def test_best_epoch_is_restored(stripes: Path, tmp_path: Path) -> None:
    class Spoil(Callback):
        """Makes the last epoch worse than the one before."""

        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            if trainer.current_epoch == 2:
                torch.nn.init.zeros_(pl_module.model.head.weight)

    probe = Probe()
    model, _ = train(stripes, tmp_path, callbacks=[probe, Spoil()], max_epochs=3)
    assert model.held_out_losses.index(min(model.held_out_losses)) == 1
    assert torch.equal(model.model.head.weight, probe.weights[1])


def test_training_stops_without_a_lower_held_out_loss(stripes: Path, tmp_path: Path) -> None:
    model = InTra(**SMALL, **{**SCHEDULE, "learning_rate": 1e-12}, patience=2)
    torch.nn.init.zeros_(model.model.head.weight)
    _, engine = train(stripes, tmp_path, model=model, max_epochs=50)
    assert engine.trainer.current_epoch < 10
    assert float(model.model.normal_difference.sum()) > 0


def test_checkpoint_round_trip(trained: tuple[InTra, Engine, Probe], stripes: Path) -> None:
    model, engine, _ = trained
    loaded = InTra.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    images = images_in(stripes / "stripes" / "test" / "hole")
    with torch.no_grad():
        expected, result = model.eval()(images), loaded.eval()(images)
    assert loaded.hparams["image_size"] == (64, 64)
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("moment", ["in the middle of an epoch", "while finishing"])
def test_killed_run_resumes_to_the_same_result(stripes: Path, tmp_path: Path, moment: str) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if moment == "in the middle of an epoch" and trainer.current_epoch == 2 and args[-1] == 1:
                raise KeyError(moment)

        def on_validation_start(self, *args) -> None:
            raise KeyError(moment)

    whole, _ = train(stripes, tmp_path / "whole")
    with pytest.raises(KeyError, match=moment):
        train(stripes, tmp_path / "killed", callbacks=[Kill()])
    checkpoint = next((tmp_path / "killed").rglob("model.ckpt"))
    resumed, _ = train(stripes, tmp_path / "killed", seed=123, ckpt_path=str(checkpoint))
    assert resumed.held_out_losses == whole.held_out_losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_finished_run_goes_on_with_more_epochs(stripes: Path, tmp_path: Path) -> None:
    first, engine = train(stripes, tmp_path / "first", max_epochs=3)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    second, _ = train(stripes, tmp_path / "second", ckpt_path=checkpoint, max_epochs=4)
    assert second.held_out_losses[:3] == first.held_out_losses
    assert len(second.held_out_losses) == 4


def test_loaded_model_trains_afresh_on_new_data(
    trained: tuple[InTra, Engine, Probe], stripes: Path, tmp_path: Path
) -> None:
    loaded = InTra.load_from_checkpoint(trained[1].trainer.checkpoint_callback.best_model_path)
    train(stripes, tmp_path, model=loaded, max_epochs=1)
    assert len(loaded.held_out_losses) == 1
    assert bool(loaded.post_processor.image_threshold.isfinite())


def test_an_engine_can_be_used_again_after_an_interruption(stripes: Path, tmp_path: Path) -> None:
    class Interrupt(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if not hasattr(self, "done"):
                self.done = True
                raise ZeroDivisionError

    engine = Engine(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False, callbacks=[Interrupt()]
    )
    with pytest.raises(ZeroDivisionError):
        engine.fit(InTra(**SMALL, **SCHEDULE), datamodule=data(stripes))
    model = InTra(**SMALL, **SCHEDULE)
    engine.fit(model, datamodule=data(stripes))
    assert bool(model.post_processor.image_threshold.isfinite())


def test_trainer_flags_win(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    _, engine = train(stripes, tmp_path / "steps", max_steps=3, max_epochs=-1, callbacks=[probe])
    assert engine.trainer.global_step == 3
    assert probe.validations == 1
    _, engine = train(stripes, tmp_path / "batches", max_epochs=1, limit_train_batches=1, num_sanity_val_steps=1)
    assert engine.trainer.num_training_batches == 1


def test_stop_by_another_callback_is_finished_and_saved(stripes: Path, tmp_path: Path) -> None:
    stop = EarlyStopping(monitor="train_loss", patience=1, min_delta=1e9)
    model, engine = train(stripes, tmp_path, callbacks=[stop], max_epochs=20)
    assert len(model.held_out_losses) == 2
    loaded = InTra.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    assert float(loaded.model.normal_difference.sum()) > 0
    torch.testing.assert_close(loaded.post_processor.image_threshold, model.post_processor.image_threshold)


@pytest.mark.parametrize(
    ("trainer", "announced"),
    [
        ({"max_epochs": 10**8}, True),
        ({"max_epochs": 2}, False),
        ({"max_epochs": 10**8, "max_time": {"hours": 1}}, False),
    ],
)
def test_a_long_run_is_announced(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, trainer: dict, announced: bool
) -> None:
    class Stop(Callback):
        def on_train_epoch_start(self, trainer, pl_module) -> None:
            if trainer.current_epoch == 1:
                raise KeyError

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError):
        train(stripes, tmp_path, callbacks=[Stop()], **trainer)
    lines = [record.message for record in caplog.records if "hours" in record.message]
    assert len(lines) == announced
    assert all("anomalib_recon.quickstart" in line for line in lines)


def test_bf16_mixed_precision_trains(stripes: Path, tmp_path: Path) -> None:
    model, _ = train(stripes, tmp_path, precision="bf16-mixed", max_epochs=3)
    assert model.held_out_losses[-1] < model.held_out_losses[0]
    assert bool(model.post_processor.image_threshold.isfinite())


def test_parts_of_a_step_have_the_gradient_of_the_whole(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FirstStep(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            self.gradients = {name: weight.grad.clone() for name, weight in pl_module.named_parameters()}
            raise KeyError

    steps = {}
    for size in (64, 150):
        monkeypatch.setattr(lightning_model, "WINDOWS_PER_PASS", size)
        steps[size] = FirstStep()
        seed_everything(0)
        with pytest.raises(KeyError):
            train(stripes, tmp_path, model=InTra(**SMALL, windows_per_step=150), callbacks=[steps[size]])
    for name, gradient in steps[150].gradients.items():
        torch.testing.assert_close(steps[64].gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_two_processes_train_one_model(stripes: Path, tmp_path: Path) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        "import os, sys, json\n"
        "from pathlib import Path\n"
        "from tests.intra.test_training import train\n"
        "root, folder = map(Path, sys.argv[1:])\n"
        "model, engine = train(root, folder, devices=2, strategy='ddp', max_epochs=2)\n"
        "numbers = [*model.held_out_losses, float(model.post_processor.image_threshold),\n"
        "           float(model.model.normal_difference.mean()), engine.trainer.global_step,\n"
        "           sum(float(weight.double().sum()) for weight in model.parameters())]\n"
        "(folder / f'rank{engine.trainer.global_rank}.json').write_text(json.dumps(numbers))\n"
    )
    project = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, str(script), str(stripes), str(tmp_path)],
        check=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    first, second = (tmp_path / f"rank{rank}.json" for rank in (0, 1))
    assert first.read_text() == second.read_text()


def test_images_are_rotated_and_flipped_in_all_eight_ways() -> None:
    image = torch.rand(1, 3, 4, 4)
    images = rotate_and_flip(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    turned = [torch.rot90(image[0], turns, (1, 2)) for turns in range(4)]
    ways = torch.stack([*turned, *(way.flip(-1) for way in turned)])
    counts = (images[:, None] == ways).all(dim=(2, 3, 4)).sum(dim=0)
    assert int(counts.sum()) == 400
    assert int(counts.min()) > 20


@pytest.mark.parametrize("width", [4, 6])
def test_images_are_turned_as_by_choices_for_all_at_once(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = expected = torch.rand(50, 3, 4, width)
    for turn in (lambda batch: batch.flip(-1), lambda batch: batch.flip(-2), lambda batch: batch.transpose(-1, -2)):
        if turn(images).shape == images.shape:
            expected = torch.where(torch.rand(50, 1, 1, 1, generator=generator) < 0.5, turn(expected), expected)
    assert torch.equal(rotate_and_flip(images, torch.Generator().manual_seed(0)), expected)


def spoil_nothing_left(folder: Path) -> None:
    for path in sorted((folder / "train" / "good").glob("*.png"))[1:]:
        path.unlink()


def spoil_truncated(folder: Path) -> None:
    path = folder / "train" / "good" / "003.png"
    path.write_bytes(path.read_bytes()[:-200])


def spoil_text(folder: Path) -> None:
    (folder / "test" / "hole" / "001.png").write_text("not an image")


def spoil_16_bit(folder: Path) -> None:
    Image.fromarray(np.full((64, 64), 40000, dtype=np.uint16)).save(folder / "train" / "good" / "003.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_nothing_left, "1 normal images, of which 1 would be held out"),
        (spoil_truncated, r"003.png cannot be read .*; replace or remove it"),
        (spoil_text, r"001.png cannot be read"),
        (spoil_16_bit, r"003.png has pixels of mode I(;16)?,.*convert it to 8 bits"),
    ],
)
def test_bad_data_is_refused_before_training(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    write_stripes(tmp_path)
    spoil(tmp_path / "stripes")
    model = InTra(**SMALL, **SCHEDULE)
    with pytest.raises(ValueError, match=words):
        train(tmp_path, tmp_path / "results", model=model)
    assert model.held_out_losses == []


def test_empty_training_folder_is_refused(tmp_path: Path) -> None:
    write_stripes(tmp_path)
    shutil.rmtree(tmp_path / "stripes" / "train")
    with pytest.raises(ValueError, match="The training set has no normal image; check the root"):
        train(tmp_path, tmp_path / "results")


def test_grey_and_rgba_images_of_any_size_work(tmp_path: Path) -> None:
    write_stripes(tmp_path, size=(80, 70))
    for index, mode in enumerate(("RGBA", "P", "LA", "1")):
        path = tmp_path / "stripes" / "train" / "good" / f"{index:03d}.png"
        Image.open(path).convert(mode).save(path)
    model, _ = train(tmp_path, tmp_path / "results", max_epochs=1)
    assert bool(model.post_processor.image_threshold.isfinite())


def test_not_square_images(tmp_path: Path) -> None:
    write_stripes(tmp_path, size=(40, 72))
    model = InTra(**{**SMALL, "image_size": (40, 72)}, **SCHEDULE)
    train(tmp_path, tmp_path / "results", model=model, max_epochs=1)
    assert model.model.normal_difference.shape == (1, 1, 40, 72)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"windows_per_image": 0}, "windows_per_image must be at least 1, got 0"),
        ({"patch_size": 4}, "patch_size must be at least 6 for the SSIM in the loss, got 4"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between 0 and 1, got 1.0"),
        ({"patience": -1}, "patience must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"image_size": 60}, "image_size must be a multiple of patch_size, got 60 x 60 and 8"),
        ({"pre_processor": InTra.configure_pre_processor((32, 32))}, "image_size must be the size that pre_processor"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InTra(**{**SMALL, **arguments})


def test_image_size_follows_the_pre_processor() -> None:
    model = InTra(**{**SMALL, "image_size": None}, pre_processor=InTra.configure_pre_processor((40, 48)))
    assert model.model.image_size == (40, 48)
    assert model.hparams["image_size"] == (40, 48)
