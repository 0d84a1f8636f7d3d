# SPDX-License-Identifier: Apache-2.0

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from sklearn.decomposition import PCA
from torchvision.transforms.v2 import Compose, Normalize, Resize

from anomalib_recon.data import DemoAD
from anomalib_recon.models import SAAE
from anomalib_recon.pre_processing import ExactResizePreProcessor

SMALL = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": 64}
SCHEDULE = {"learning_rate": 2e-3, "explained_variance": 0.95}


def data(root: Path, **kwargs) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **kwargs})


def train(
    root: Path, folder: Path, seed: int = 0, ckpt_path: str | None = None, model: SAAE | None = None, **trainer
) -> tuple[SAAE, Engine]:
    seed_everything(seed)
    model = model or SAAE(**SMALL, **SCHEDULE)
    trainer = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, "barebones": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model, engine


class Probe(Callback):
    """Notes what happens in training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.validations = 0
        self.trained: set[str] = set()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.trained = {name for name, weight in pl_module.named_parameters() if weight.grad is not None}

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.validations += 1


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SAAE, Engine, Probe]:
    probe = Probe()
    model, engine = train(stripes, tmp_path_factory.mktemp("results"), callbacks=[probe])
    return model, engine, probe


def test_reconstruction_improves(trained: tuple[SAAE, Engine, Probe]) -> None:
    assert trained[2].losses[-1] < 0.9 * trained[2].losses[0]


def test_only_the_autoencoder_is_trained(trained: tuple[SAAE, Engine, Probe]) -> None:
    model, _, probe = trained
    assert probe.trained == {name for name, _ in model.named_parameters() if name.startswith("model.autoencoder.")}


def test_validation_runs_once_and_sets_the_thresholds(trained: tuple[SAAE, Engine, Probe]) -> None:
    model, _, probe = trained
    assert probe.validations == 1
    assert bool(model.post_processor.image_threshold.isfinite())
    assert bool(model.post_processor.pixel_threshold.isfinite())


def test_latent_width_is_that_of_a_pca_of_all_training_images(
    trained: tuple[SAAE, Engine, Probe], stripes: Path
) -> None:
    model = trained[0]
    datamodule = data(stripes)
    datamodule.prepare_data()
    datamodule.setup("fit")
    batches = [model.pre_processor.transform(batch.image) for batch in datamodule.train_dataloader()]
    features = model.model.extract_features(torch.cat(batches))
    vectors = features.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    expected = PCA(n_components=0.95, svd_solver="full").fit(vectors).n_components_
    assert model.hparams["latent_dim"] == model.model.autoencoder.latent_dim == expected
    assert expected > 1


def test_metrics_of_a_test(trained: tuple[SAAE, Engine, Probe], stripes: Path) -> None:
    model, engine, _ = trained
    results = engine.test(model, datamodule=data(stripes))[0]
    assert {"image_AUROC", "pixel_AUROC", "pixel_AUPRO"} <= results.keys()
    assert all(0 <= value <= 1 for value in results.values())


def test_a_vision_transformer_trains(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    model = SAAE("vit_small_patch16_dinov3_qkvb", pre_trained=False, image_size=(64, 80), patch_size=1, **SCHEDULE)
    train(stripes, tmp_path, model=model, callbacks=[probe])
    assert probe.losses[-1] < probe.losses[0]
    assert model.model.feature_extractor.grid_size == (4, 5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"transformer": False, "latent_dim": 8},
        {"distance": "mse", "patch_size": 2, "mlp_ratio": 2, "depth": 2, "num_heads": 2, "latent_dim": 8},
    ],
)
def test_ablations_train(stripes: Path, tmp_path: Path, arguments: dict) -> None:
    probe = Probe()
    train(stripes, tmp_path, model=SAAE(**SMALL, learning_rate=2e-3, **arguments), callbacks=[probe])
    assert probe.losses[-1] < probe.losses[0]


def test_bf16_mixed_precision_trains(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    model, _ = train(stripes, tmp_path, precision="bf16-mixed", callbacks=[probe])
    assert probe.losses[-1] < probe.losses[0]
    assert bool(model.post_processor.image_threshold.isfinite())


def test_trainer_flags_win(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    _, engine = train(stripes, tmp_path, max_steps=2, max_epochs=-1, callbacks=[probe])
    assert engine.trainer.global_step == 2
    assert probe.validations == 1


def test_killed_run_resumes_to_the_same_result(stripes: Path, tmp_path: Path) -> None:
    class Kill(Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.current_epoch == 2:
                raise KeyError

    whole, _ = train(stripes, tmp_path / "whole")
    with pytest.raises(KeyError):
        train(stripes, tmp_path / "killed", callbacks=[Kill()])
    checkpoint = next((tmp_path / "killed").rglob("model.ckpt"))
    resumed, _ = train(stripes, tmp_path / "killed", seed=123, ckpt_path=str(checkpoint))
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_resumed_run_keeps_the_latent_width_of_its_checkpoint(
    trained: tuple[SAAE, Engine, Probe], stripes: Path, tmp_path: Path
) -> None:
    first, engine, _ = trained
    arguments = {**SMALL, "learning_rate": 2e-3, "explained_variance": 0.5}
    afresh, _ = train(stripes, tmp_path, model=SAAE(**arguments), max_epochs=1)
    assert afresh.hparams["latent_dim"] != first.hparams["latent_dim"]
    model = SAAE(**arguments)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    train(stripes, tmp_path, model=model, ckpt_path=checkpoint, max_epochs=4)
    assert model.hparams["latent_dim"] == first.hparams["latent_dim"]
    assert model.model.autoencoder.latent_dim == first.hparams["latent_dim"]


def test_two_processes_find_one_latent_width_and_train_one_model(
    trained: tuple[SAAE, Engine, Probe], stripes: Path, tmp_path: Path
) -> None:
    script = tmp_path / "ddp.py"
    script.write_text(
        "import sys, json\n"
        "from pathlib import Path\n"
        "from tests.saae.test_training import train\n"
        "root, folder = map(Path, sys.argv[1:])\n"
        "model, engine = train(root, folder, devices=2, strategy='ddp', max_epochs=1)\n"
        "numbers = [model.hparams['latent_dim'], float(model.post_processor.image_threshold),\n"
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
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == trained[0].hparams["latent_dim"]


def test_an_untrained_backbone_finds_the_defects_of_the_demo_data(tmp_path: Path) -> None:
    seed_everything(0)
    # the features of random weights have most of their variance in a few components, so more of it is kept
    model = SAAE("vit_tiny_patch16_224", pre_trained=False, image_size=128, explained_variance=0.99, learning_rate=1e-3)
    engine = Engine(default_root_dir=tmp_path, max_epochs=8, accelerator="cpu", enable_progress_bar=False)
    datamodule = DemoAD(root=tmp_path / "demo", category="grid")
    engine.fit(model, datamodule=datamodule)
    assert engine.test(model, datamodule=datamodule)[0]["pixel_AUROC"] > 0.9


def test_anomalous_training_images_are_refused(stripes: Path, tmp_path: Path) -> None:
    class Mixed(Folder):
        def _setup(self, stage: str | None = None) -> None:
            super()._setup(stage)
            samples = self.train_data.samples
            samples.loc[samples.index[:4], "label_index"] = 1

    root = stripes / "stripes"
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/hole"}
    datamodule = Mixed("stripes", root=root, **folders, num_workers=0)
    with pytest.raises(ValueError, match="SAAE trains on normal images alone, but 4 training images are not"):
        Engine(default_root_dir=tmp_path, accelerator="cpu").fit(SAAE(**SMALL), datamodule=datamodule)


def test_without_a_datamodule_the_latent_width_must_be_given(stripes: Path, tmp_path: Path) -> None:
    datamodule = data(stripes)
    datamodule.prepare_data()
    datamodule.setup("fit")
    loaders = {"train_dataloaders": datamodule.train_dataloader(), "val_dataloaders": datamodule.val_dataloader()}
    arguments = {"default_root_dir": tmp_path, "accelerator": "cpu", "max_epochs": 1, "enable_progress_bar": False}
    with pytest.raises(ValueError, match="latent_dim must be given when training without a datamodule"):
        Engine(**arguments).fit(SAAE(**SMALL), **loaders)
    model = SAAE(**SMALL, latent_dim=6)
    Engine(**arguments).fit(model, **loaders)
    assert bool(model.post_processor.image_threshold.isfinite())


@pytest.mark.parametrize(("resized", "expected"), [((40, 48), (40, 48)), ((10, 10), (384, 384))])
def test_image_size_follows_the_pre_processor(resized: tuple[int, int], expected: tuple[int, int]) -> None:
    model = SAAE(**{**SMALL, "image_size": None}, pre_processor=SAAE.configure_pre_processor(resized))
    assert model.model.image_size == model.hparams["image_size"] == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"explained_variance": 1.5}, "explained_variance must be above 0 and at most 1, got 1.5"),
        ({"pre_processor": SAAE.configure_pre_processor((32, 32))}, "image_size must be the size that pre_processor"),
        (
            {"pre_processor": ExactResizePreProcessor(Compose([Resize((64, 64)), Normalize([0.5] * 3, [0.5] * 3)]))},
            "pre_processor must leave images in",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SAAE(**{**SMALL, **arguments})
