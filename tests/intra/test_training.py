# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, timer
from PIL import Image
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform

from anomalib_recon.models import InTra
from anomalib_recon.models.intra import lightning_model
from anomalib_recon.models.intra.augmentation import rotate_and_flip
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.pre_processing import ExactResizePreProcessor
from anomalib_recon.training import HeldOutImages
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
    trainer = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model, engine


def held_out_in(engine: Engine) -> HeldOutImages:
    [callback] = (callback for callback in engine.trainer.callbacks if isinstance(callback, HeldOutImages))
    return callback


class Probe(Callback):
    """Notes what happens in training."""

    def __init__(self) -> None:
        self.windows: list[int] = []

    def on_train_start(self, trainer, pl_module) -> None:
        def count(_loss, args) -> None:
            if args[1].requires_grad:
                self.windows.append(len(args[1]))

        pl_module.loss.register_forward_pre_hook(count)


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InTra, Engine, Probe]:
    probe = Probe()
    model, engine = train(stripes, tmp_path_factory.mktemp("results"), callbacks=[probe], max_epochs=6)
    return model, engine, probe


def test_reconstruction_improves(trained: tuple[InTra, Engine, Probe]) -> None:
    _, engine, _ = trained
    losses = held_out_in(engine).losses
    assert min(losses) < 0.5 * losses[0]
    assert float(engine.trainer.callback_metrics["train_loss"]) < losses[0]
    assert "windows_per_second" in engine.trainer.callback_metrics


def test_every_training_image_yields_its_windows(trained: tuple[InTra, Engine, Probe]) -> None:
    _, engine, probe = trained
    assert sum(probe.windows) == 6 * 11 * 40  # epochs, images that are not held out, windows per image
    assert max(probe.windows) == 64
    assert engine.trainer.global_step == len(probe.windows)


def test_each_window_trains_all_its_covered_patches(stripes: Path, tmp_path: Path) -> None:
    model = InTra(**SMALL, **SCHEDULE, readout="token", train_covered=6)
    probe = Probe()
    _, engine = train(stripes, tmp_path, model=model, callbacks=[probe])
    assert sum(probe.windows) == 4 * 6 * 11 * 40  # epochs, patches, images that are not held out, windows per image
    assert engine.trainer.global_step == len(probe.windows)
    assert model.model.covered.shape == (64, 1)  # inference covers one patch of each window
    losses = held_out_in(engine).losses
    assert min(losses) < 0.5 * losses[0]


class Rates(Callback):
    """Notes the learning rates."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def assert_rises_and_falls(rates: list[float]) -> None:
    highest = rates.index(max(rates))
    assert 0 < highest < len(rates) / 2
    assert rates == [*sorted(rates[:highest]), *sorted(rates[highest:], reverse=True)]
    assert 0.5 * SCHEDULE["learning_rate"] < max(rates) <= SCHEDULE["learning_rate"]
    assert rates[-1] < SCHEDULE["learning_rate"] / 10


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({"max_epochs": 4}, 36),  # of 5, 5 and 1 images an epoch, 40 windows of each, 64 a step
        ({"max_epochs": -1, "max_steps": 21}, 21),
    ],
)
def test_a_cycle_spans_the_fit(stripes: Path, tmp_path: Path, trainer: dict, count: int) -> None:
    probe, model = Rates(), InTra(**SMALL, **SCHEDULE, use_one_cycle=True, weight_decay=0.1)
    train(stripes, tmp_path, model=model, callbacks=[probe], **trainer)
    assert len(probe.rates) == count
    assert probe.rates[0] == pytest.approx(SCHEDULE["learning_rate"] / 25)
    assert_rises_and_falls(probe.rates)


def test_a_cycle_spans_the_time_and_ends_within_a_batch(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock(Rates):
        """A second for each optimiser step, on whatever machine."""

        def monotonic(self) -> int:
            return len(self.rates)

    clock = Clock()
    monkeypatch.setattr(timer, "time", clock)
    model = InTra(**SMALL, **{**SCHEDULE, "windows_per_image": 10**5}, use_one_cycle=True)
    _, engine = train(stripes, tmp_path, model=model, callbacks=[clock], max_time={"seconds": 25}, max_epochs=-1)
    assert len(clock.rates) == 25
    assert_rises_and_falls(clock.rates)
    assert len(held_out_in(engine).losses) == 1
    assert float(model.model.normal_difference.sum()) > 0  # the fit has been finished


def assert_normal_difference_is_of(model: InTraModel, images: torch.Tensor) -> None:
    with torch.no_grad():
        reconstruction = model.unpatchify(model.reconstruct(model.embed(images)))
        expected = model.anomaly_map_generator.difference(images, reconstruction).mean(0, keepdim=True)
    torch.testing.assert_close(model.normal_difference, expected)


def test_normal_difference_is_the_mean_over_the_normal_training_images(
    trained: tuple[InTra, Engine, Probe], stripes: Path
) -> None:
    assert_normal_difference_is_of(trained[0].model.eval(), images_in(stripes / "stripes" / "train" / "good"))


def test_defects_have_masks_and_good_images_low_maps(trained: tuple[InTra, Engine, Probe], stripes: Path) -> None:
    model, engine, _ = trained
    test = stripes / "stripes" / "test"
    predictions = {
        kind: [item for batch in engine.predict(model, data_path=test / kind) for item in batch.items]
        for kind in ("good", "hole")
    }
    assert len(predictions["hole"]) == 6
    shares = []
    for item in predictions["hole"]:
        name = f"{Path(str(item.image_path)).stem}_mask.png"
        drawn = np.asarray(Image.open(stripes / "stripes" / "ground_truth" / "hole" / name)) > 0
        found = np.asarray(item.pred_mask).astype(bool).squeeze()
        shares.append((found[drawn].mean(), found[~drawn].mean()))
    recalls, false_alarms = zip(*shares, strict=True)
    assert min(recalls) > 0.1
    assert max(false_alarms) < 0.05
    medians = [float(item.anomaly_map.median()) for item in predictions["good"]]
    assert max(medians) < 0.4  # 0.5 is the threshold


def test_training_images_of_several_sizes_are_seen_as_in_a_test(mixed_stripes: Path, tmp_path: Path) -> None:
    model = InTra(**SMALL, **SCHEDULE, held_out_fraction=0.3)
    _, engine = train(mixed_stripes, tmp_path, model=model, max_epochs=2)
    held_out = held_out_in(engine)
    # one image at a time, and so none resized to the size of another
    batches = engine.predict(model, data_path=mixed_stripes / "stripes" / "train" / "good")
    assert_normal_difference_is_of(model.model.eval(), torch.cat([batch.image for batch in batches]))
    patches = torch.cat([model.model.embed(batch.image) for batch in batches if batch.image_path[0] in held_out.paths])
    assert len(patches) == len(held_out.paths) == 4
    with torch.no_grad():
        loss = model.loss(*(model.model.pixels(values) for values in (patches, model.model.reconstruct(patches))))
    assert float(loss) == pytest.approx(min(held_out.losses), rel=1e-5)


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


def test_images_are_rotated_and_flipped_in_all_eight_ways() -> None:
    image = torch.rand(1, 3, 4, 4)
    images = rotate_and_flip(image.expand(400, -1, -1, -1), torch.Generator().manual_seed(0))
    turned = [torch.rot90(image[0], turns, (1, 2)) for turns in range(4)]
    ways = torch.stack([*turned, *(way.flip(-1) for way in turned)])
    counts = (images[:, None] == ways).all(dim=(2, 3, 4)).sum(dim=0)
    assert int(counts.sum()) == 400
    assert int(counts.min()) > 20


def test_not_square_images(tmp_path: Path) -> None:
    write_stripes(tmp_path, size=(40, 72))
    model = InTra(**{**SMALL, "image_size": (40, 72)}, **SCHEDULE)
    train(tmp_path, tmp_path / "results", model=model, max_epochs=1)
    assert model.model.normal_difference.shape == (1, 1, 40, 72)


def pre_processor(*transforms: Transform) -> ExactResizePreProcessor:
    return ExactResizePreProcessor(Compose([*transforms]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"windows_per_image": 0}, "windows_per_image must be at least 1, got 0"),
        ({"patch_size": 4}, "patch_size must be at least 6 for the SSIM in the loss, got 4"),
        ({"held_out_fraction": 1.0}, "held_out_fraction must lie between 0 and 1, got 1.0"),
        ({"in_channels": 2}, "in_channels must be 1 or 3, got 2: images of anomalib have three channels"),
        ({"patience": -1}, "patience must be at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative, got -0.1"),
        ({"train_covered": 0}, "train_covered must be at least 1, got 0"),
        ({"train_covered": 4}, "train_covered=4 needs readout='token', got readout='mean'"),
        ({"train_covered": 25, "readout": "token"}, "train_covered must be less than the 25 patches of a window"),
        ({"image_size": 60}, "image_size must be a multiple of patch_size, got 60 x 60 and 8"),
        ({"pre_processor": pre_processor(Resize((32, 32)))}, "image_size must be the size that pre_processor"),
        (
            {"pre_processor": pre_processor(Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3))},
            r"pre_processor must leave images in \[0, 1\], got one with Normalize",
        ),
        (
            {"image_size": None, "patch_size": 16, "pre_processor": pre_processor(Resize((300, 300)))},
            "image_size must be a multiple of patch_size, got 300 x 300 and 16; the nearest smaller one is 288 x 288",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InTra(**{**SMALL, **arguments})


# the second is how anomalib's tiled ensemble asks for an evaluator
@pytest.mark.parametrize(("resized", "expected"), [((40, 48), (40, 48)), ((10, 10), (256, 256))])
def test_image_size_follows_the_pre_processor(resized: tuple[int, int], expected: tuple[int, int]) -> None:
    model = InTra(**{**SMALL, "image_size": None}, pre_processor=InTra.configure_pre_processor(resized))
    assert model.model.image_size == model.hparams["image_size"] == expected
    assert len(model.evaluator.test_metrics) > 0
