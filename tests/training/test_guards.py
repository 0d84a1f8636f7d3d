# SPDX-License-Identifier: Apache-2.0

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD, PredictDataset
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from anomalib_recon.models import ADTR
from anomalib_recon.training.guards import STEPS_PER_LOOK
from tests.conftest import write_stripes
from tests.decodes import count_decodes
from tests.tiny_models import build as build_tiny

SMALL = {
    "backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 32, "feature_size": 4,
    "embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16, "pool_size": 8, "learning_rate": 2e-3,
    "visualizer": False,
}  # fmt: skip


def build(**arguments: Any) -> ADTR:
    seed_everything(0)
    return ADTR(**{**SMALL, **arguments})


def data(root: Path, **arguments: Any) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **arguments})


def engine_in(folder: Path, *callbacks: Callback, **trainer: Any) -> Engine:
    defaults = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    return Engine(default_root_dir=folder, callbacks=[*callbacks], **{**defaults, **trainer})


class Break(Callback):
    """Multiplies the loss of one step, after which all weights are broken."""

    def __init__(self, step: int, factor: float) -> None:
        self.step = step
        self.factor = factor

    def on_train_start(self, trainer, pl_module) -> None:
        pl_module.loss.register_forward_hook(
            lambda module, args, loss: loss * self.factor if trainer.global_step == self.step else loss
        )


def assert_finite_weights(path: Path) -> None:
    for name, value in torch.load(path, weights_only=True)["state_dict"].items():
        # thresholds are set when a training ends
        assert value.isfinite().all() or name.startswith("post_processor."), (path, name)


@pytest.mark.parametrize("name", ["FeatureInpainting", "InTra"])
@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_weights_in_other_precisions_are_refused(name: str, precision: str, stripes: Path, tmp_path: Path) -> None:
    engine = engine_in(tmp_path, precision=precision)
    with pytest.raises(ValueError, match=f"precision='{precision}' changes the weights themselves; pass bf16-mixed"):
        engine.fit(build_tiny(name), datamodule=data(stripes))


@pytest.mark.parametrize("step", [4, 5])
@pytest.mark.parametrize(
    "trainer",
    [{}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 1, "check_val_every_n_epoch": None}],
    ids=str,
)
def test_broken_weights_are_in_no_checkpoint(stripes: Path, tmp_path: Path, step: int, trainer: dict) -> None:
    each_step = ModelCheckpoint(tmp_path / "steps", save_top_k=-1, every_n_train_steps=1, filename="{step}")
    engine = engine_in(tmp_path, Break(step, torch.nan), each_step, num_sanity_val_steps=0, **trainer)
    with pytest.raises(
        RuntimeError, match=r"^The loss is \w+ in epoch 1; train anew with a lower learning_rate \(0.002\)"
    ):
        engine.fit(build(), datamodule=data(stripes))
    paths = sorted(tmp_path.rglob("*.ckpt"))
    assert {path.stem for path in paths} >= {f"step={number}" for number in range(1, step + 1)}
    for path in paths:
        assert_finite_weights(path)


@pytest.mark.parametrize("factor", [torch.nan, torch.inf])
def test_the_checkpoint_of_the_last_whole_epoch_stays(stripes: Path, tmp_path: Path, factor: float) -> None:
    with pytest.raises(RuntimeError, match="The last checkpoint is from before"):
        engine_in(tmp_path, Break(4, factor)).fit(build(), datamodule=data(stripes))
    [path] = tmp_path.rglob("*.ckpt")
    assert torch.load(path, weights_only=True)["epoch"] == 0
    assert_finite_weights(path)


class HostReads(TorchFunctionMode):
    """Counts what makes the host wait for a GPU: numbers of a loss, or what is derived from them, that it asks for."""

    READS = (Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__float__, Tensor.__int__)

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.count += function in self.READS
        return function(*args, **(kwargs or {}))


class CountReads(Callback):
    """Counts the host's reads from a loss to its backward pass, for each step."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def on_train_start(self, trainer, pl_module) -> None:
        mode, backward = HostReads(), pl_module.backward

        def start(*call: Any) -> None:
            mode.count = 0
            mode.__enter__()

        def stop(*args: Any, **kwargs: Any) -> None:
            mode.__exit__(None, None, None)
            self.reads.append(mode.count)
            backward(*args, **kwargs)

        pl_module.loss.register_forward_hook(start)
        pl_module.backward = stop


def test_the_host_looks_at_the_loss_now_and_then(tmp_path: Path) -> None:
    root = write_stripes(tmp_path / "data", size=(32, 32), num_train=2 * STEPS_PER_LOOK + 10)
    count = CountReads()
    engine = engine_in(tmp_path, count, max_epochs=1, limit_val_batches=0)
    engine.fit(build(), datamodule=data(root, train_batch_size=1))
    assert len(count.reads) == 2 * STEPS_PER_LOOK + 10
    looks = [step for step, reads in enumerate(count.reads) if reads]
    assert looks == [0, STEPS_PER_LOOK, 2 * STEPS_PER_LOOK]


@pytest.fixture
def own_stripes(stripes: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(stripes, tmp_path / "data"))


def test_a_test_decodes_each_image_and_each_mask_once(stripes: Path, tmp_path: Path) -> None:
    folder = stripes / "stripes"
    engine = engine_in(tmp_path)
    with count_decodes() as decodes:
        engine.test(build(), datamodule=data(stripes), verbose=False)
    paths = [*(folder / "test").rglob("*.png"), *(folder / "ground_truth").rglob("*.png")]
    assert decodes == dict.fromkeys(map(str, paths), 1)
    assert len(paths) == 10 + 6


def test_a_prediction_decodes_each_image_once(stripes: Path, tmp_path: Path) -> None:
    folder = stripes / "stripes" / "test"
    paths = [str(path) for path in folder.rglob("*.png")]
    with count_decodes() as decodes:
        batches = engine_in(tmp_path).predict(build(), data_path=folder)
    assert len(batches) == 10
    assert decodes == dict.fromkeys(paths, 1)


def test_several_dataloaders_are_looked_at(own_stripes: Path, tmp_path: Path) -> None:
    good, hole = (own_stripes / "stripes" / "test" / name for name in ("good", "hole"))
    (hole / "009.png").write_text("no image")
    loaders = [
        DataLoader(dataset, collate_fn=dataset.collate_fn) for dataset in (PredictDataset(good), PredictDataset(hole))
    ]
    with pytest.raises(ValueError, match=r"The image .*009.png cannot be read"):
        engine_in(tmp_path).predict(build(), dataloaders=loaders)


def test_half_weights_are_refused_in_use_too(stripes: Path, tmp_path: Path) -> None:
    engine = engine_in(tmp_path, precision="bf16-true")
    with pytest.raises(ValueError, match="precision='bf16-true' changes the weights themselves; pass bf16-mixed or 32"):
        engine.test(build_tiny("FeatureInpainting"), datamodule=data(stripes))


def test_a_cycle_without_an_end_is_refused(stripes: Path, tmp_path: Path) -> None:
    for name in ("InTra", "SAAE"):
        engine = engine_in(tmp_path, EarlyStopping("train_loss"), max_epochs=-1)
        with pytest.raises(ValueError, match="use_one_cycle needs a fit that ends: pass max_epochs, max_steps or"):
            engine.fit(build_tiny(name, use_one_cycle=True), datamodule=data(stripes))


def test_scaled_gradients_need_no_weights(stripes: Path, tmp_path: Path) -> None:
    """As with precision 16-mixed on a GPU: FeatureInpainting has no optimiser."""
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    engine = engine_in(tmp_path, max_epochs=1, plugins=[plugin])
    model = build_tiny("FeatureInpainting")
    engine.fit(model, datamodule=data(stripes))
    assert engine.trainer.global_step == engine.trainer.num_training_batches
    assert model.post_processor.image_threshold.isfinite()
