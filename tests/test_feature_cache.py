# SPDX-License-Identifier: Apache-2.0

import logging
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib_recon.models.components import CachedBatch
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_recon.data import LabelledFolder
from anomalib_recon.models import ADTR, SAAE
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor
from anomalib_recon.pre_processing import ExactResizePreProcessor

ARGUMENTS: dict[type[ADTR | SAAE], dict[str, Any]] = {
    ADTR: {
        "backbone": "resnet18", "layers": ["layer1", "layer2"], "image_size": 32, "feature_size": 4, "embed_dim": 16,
        "depth": 1, "num_heads": 2, "mlp_dim": 16, "pool_size": 8,
    },
    SAAE: {
        "backbone": "vit_tiny_patch16_224", "layers": ["patch_embed", "blocks.0"], "image_size": 64, "latent_dim": 6,
    },
}  # fmt: skip
# GiB, about one byte
A_BYTE = 1e-9


def build(model_class: type[ADTR | SAAE], **arguments: Any) -> ADTR | SAAE:
    seed_everything(0)
    common = {"pre_trained": False, "learning_rate": 2e-3, "visualizer": False}
    return model_class(**{**ARGUMENTS[model_class], **common, **arguments})


def data(root: Path, **arguments: Any) -> MVTecAD:
    """Twelve training images in batches of 5, 5 and 2."""
    sizes = {"train_batch_size": 5, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **arguments})


def labelled_data(root: Path) -> LabelledFolder:
    """Twelve normal training images and three with holes."""
    return LabelledFolder(
        name="stripes", root=root / "stripes", normal_dir="train/good", normal_test_dir="test/good",
        abnormal_dir="test/hole", mask_dir="ground_truth/hole", train_abnormal_dir="test/hole",
        train_mask_dir="ground_truth/hole", num_train_abnormal=3, train_batch_size=5, num_workers=0,
    )  # fmt: skip


class Watch(Callback):
    """Notes for each training batch whether it came from the cache, and whether a file of the run is mapped."""

    def __init__(self) -> None:
        self.cached: list[bool] = []
        self.mapped: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.cached.append(isinstance(batch, CachedBatch))
        self.mapped.append(is_mapped(trainer.default_root_dir))


class Kill(Callback):
    """Ends a run in the middle of its third epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.current_epoch == 2 and batch_idx == 1:
            raise KeyError


class AfterFirstEpoch(Callback):
    """Calls a function when the first epoch is over."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch == 0:
            self.function()


def is_mapped(folder: Path | str) -> bool:
    """Whether a file in a folder is mapped to memory; on Linux."""
    maps = Path("/proc/self/maps")
    return maps.exists() and str(folder) in maps.read_text()


def train(
    model: ADTR | SAAE, datamodule: Any, folder: Path, ckpt_path: Path | None = None, seed: int = 1, **trainer: Any
) -> tuple[dict[str, Tensor], Watch]:
    """Train; the results are the weights, and what was seen."""
    seed_everything(seed)
    watch = Watch()
    callbacks = [watch, *trainer.pop("callbacks", [])]
    defaults = {"max_epochs": 4, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0}
    engine = Engine(default_root_dir=folder, callbacks=callbacks, **{**defaults, **trainer})
    engine.fit(model, datamodule=datamodule, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in model.model.state_dict().items()}, watch


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
@pytest.mark.parametrize(
    "trainer",
    [
        {},
        {"limit_train_batches": 2},
        {"overfit_batches": 2},
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_weights_are_those_without_the_cache(
    stripes: Path, tmp_path: Path, model_class: type[ADTR | SAAE], trainer: dict
) -> None:
    weights, watch = train(build(model_class, feature_cache_gib=0), data(stripes), tmp_path, **trainer)
    assert not any(watch.cached)
    for gib in (2.0, A_BYTE):
        same, seen = train(build(model_class, feature_cache_gib=gib), data(stripes), tmp_path, **trainer)
        assert all(seen.cached)
        assert len(seen.cached) == len(watch.cached)
        assert_same(weights, same)


def test_random_numbers_are_those_of_loading_in_worker_processes(stripes: Path, tmp_path: Path) -> None:
    weights, _ = train(build(ADTR, feature_cache_gib=0), data(stripes, num_workers=2), tmp_path)
    assert_same(weights, train(build(ADTR), data(stripes, num_workers=2), tmp_path)[0])


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_images_are_needed_in_the_first_epoch_only(
    stripes: Path, tmp_path: Path, model_class: type[ADTR | SAAE]
) -> None:
    root = Path(shutil.copytree(stripes, tmp_path / "data"))
    gone = AfterFirstEpoch(lambda: shutil.rmtree(root / "stripes" / "train"))
    weights, _ = train(build(model_class), data(root), tmp_path, callbacks=[gone])
    assert not list(root.glob("stripes/train/good/*"))
    assert_same(weights, train(build(model_class, feature_cache_gib=0), data(stripes), tmp_path)[0])


@pytest.mark.parametrize("labels", ["pixel", "image"])
def test_anomalies_are_learned_from_the_cache(stripes: Path, tmp_path: Path, labels: str) -> None:
    train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
    arguments = {"labels": labels, "alpha": 1.0, "top_k": 4, "normal_checkpoint": next(tmp_path.rglob("model.ckpt"))}
    weights, _ = train(build(ADTR, **arguments, feature_cache_gib=0), labelled_data(stripes), tmp_path)
    same, watch = train(build(ADTR, **arguments), labelled_data(stripes), tmp_path)
    assert all(watch.cached)
    assert_same(weights, same)
    other, _ = train(build(ADTR, **{**arguments, "alpha": 2.0}), labelled_data(stripes), tmp_path)
    assert not torch.equal(other["reduce.weight"], weights["reduce.weight"])


def test_interrupted_run_resumes_to_the_same_weights(stripes: Path, tmp_path: Path) -> None:
    weights, _ = train(build(ADTR), data(stripes), tmp_path / "whole")
    with pytest.raises(KeyError):
        train(build(ADTR), data(stripes), tmp_path / "killed", callbacks=[Kill()])
    checkpoint = next((tmp_path / "killed").rglob("model.ckpt"))
    resumed, watch = train(build(ADTR), data(stripes), tmp_path / "rest", ckpt_path=checkpoint, seed=9)
    assert watch.cached == 2 * 3 * [True]
    assert_same(weights, resumed)


@pytest.mark.parametrize("callbacks", [[], [Kill()]], ids=["whole", "interrupted"])
def test_nothing_is_left_of_the_cache(stripes: Path, tmp_path: Path, callbacks: list[Callback]) -> None:
    model, datamodule = build(SAAE, feature_cache_gib=A_BYTE), data(stripes)
    watch = Watch()
    with pytest.raises(KeyError) if callbacks else nullcontext():
        train(model, datamodule, tmp_path, callbacks=[watch, *callbacks])
    assert all(watch.mapped) == sys.platform.startswith("linux")
    assert not is_mapped(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".ckpt"}
    assert next(iter(datamodule.train_dataloader())).image.shape == (5, 3, 64, 64)


def test_a_second_fit_sees_new_images(stripes: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(stripes, tmp_path / "data"))
    paths = sorted((root / "stripes" / "train" / "good").iterdir())
    model, datamodule = build(ADTR), data(root)
    train(model, datamodule, tmp_path)
    for path in paths:
        Image.open(path).rotate(90).save(path)
    # the same weights to start from
    model.load_state_dict(build(ADTR).state_dict())
    weights, watch = train(model, datamodule, tmp_path)
    assert all(watch.cached)
    assert_same(weights, train(build(ADTR, feature_cache_gib=0), data(root), tmp_path)[0])


FLIP = RandomHorizontalFlip()
SIZE = Resize((32, 32), antialias=True)
AUGMENTED = "the training images are not only resized to a fixed height and width"


@pytest.mark.parametrize(
    ("model", "datamodule", "trainer", "reason"),
    [
        ({"feature_cache_gib": 0}, {}, {}, "feature_cache_gib=0"),
        ({}, {"train_augmentations": FLIP}, {}, AUGMENTED),
        ({}, {"augmentations": Compose([SIZE, FLIP])}, {}, AUGMENTED),
        ({"pre_processor": ExactResizePreProcessor(Compose([SIZE, FLIP]))}, {}, {}, AUGMENTED),
        ({"pre_processor": ExactResizePreProcessor(Resize(32))}, {}, {}, AUGMENTED),
        ({"pre_processor": False, "image_size": 64}, {}, {}, AUGMENTED),
        ({"labels": "pixel", "confetti": 0.5}, {}, {}, "confetti is drawn on images"),
        ({}, {}, {"reload_dataloaders_every_n_epochs": 1}, "the dataloader changes between epochs"),
    ],
)
def test_off_where_features_may_change(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    model: dict, datamodule: dict, trainer: dict, reason: str,
) -> None:  # fmt: skip
    if "labels" in model:
        train(build(ADTR), data(stripes), tmp_path, max_epochs=1)
        model = {**model, "normal_checkpoint": next(tmp_path.rglob("model.ckpt"))}
    caplog.clear()
    caplog.set_level(logging.INFO)
    _, watch = train(build(ADTR, **model), data(stripes, **datamodule), tmp_path, max_epochs=1, **trainer)
    assert not any(watch.cached)
    [line] = [message for message in caplog.messages if message.startswith("Features")]
    assert line == f"Features are computed anew in each epoch: {reason}."


def test_off_without_a_datamodule(stripes: Path, tmp_path: Path) -> None:
    datamodule = data(stripes, augmentations=SIZE)
    datamodule.setup()
    watch = Watch()
    engine = Engine(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False, callbacks=[watch]
    )
    loaders = {"train_dataloaders": datamodule.train_dataloader(), "val_dataloaders": datamodule.val_dataloader()}
    engine.fit(build(ADTR), **loaders)
    assert watch.cached == 3 * [False]


def test_off_where_the_disk_is_too_small(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # twelve images' (64 + 128) * 4 * 4 features in single precision need more
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=12 * 192 * 16 * 4 - 1))
    caplog.set_level(logging.INFO)
    _, watch = train(build(ADTR, feature_cache_gib=A_BYTE), data(stripes), tmp_path, max_epochs=1)
    assert not any(watch.cached)
    assert "more than feature_cache_gib and the free space" in caplog.text


@pytest.mark.parametrize(("gib", "place"), [(2.0, "memory"), (A_BYTE, "a temporary file in")])
def test_the_log_says_where_features_are(
    stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, gib: float, place: str
) -> None:
    caplog.set_level(logging.INFO)
    train(build(SAAE, feature_cache_gib=gib), data(stripes, augmentations=Resize((48, 48))), tmp_path, max_epochs=1)
    assert f"Features of 12 images are computed once and kept in {place}" in caplog.text


@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_a_negative_size_is_refused(model_class: type[ADTR | SAAE]) -> None:
    with pytest.raises(ValueError, match="feature_cache_gib must be positive, or 0 for no cache, got -1"):
        build(model_class, feature_cache_gib=-1)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("model_class", [ADTR, SAAE])
def test_thresholds_at_a_false_positive_rate_are_the_same(
    model_class: type[ADTR | SAAE], stripes: Path, tmp_path: Path, split: Literal["train", "val"]
) -> None:
    thresholds = []
    for feature_cache_gib in (0.0, 2.0):
        post_processor = FalsePositiveRatePostProcessor(pixel_fpr=0.1, image_fpr=0.2, split=split)
        model = build(model_class, feature_cache_gib=feature_cache_gib, post_processor=post_processor)
        _, watch = train(model, data(stripes), tmp_path / str(feature_cache_gib))
        assert any(watch.cached) == (feature_cache_gib > 0)
        thresholds.append((float(post_processor.image_threshold), float(post_processor.pixel_threshold)))
    assert thresholds[0] == thresholds[1]
