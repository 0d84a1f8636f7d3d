# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from sklearn.decomposition import PCA

from anomalib_recon.data import DemoAD
from anomalib_recon.models import SAAE

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
    trainer = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False, **trainer}
    engine = Engine(default_root_dir=folder, **trainer)
    engine.fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model, engine


class Probe(Callback):
    """Notes what happens in training."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.trained: set[str] = set()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        self.trained = {name for name, weight in pl_module.named_parameters() if weight.grad is not None}


def components_of(features: torch.Tensor, explained_variance: float) -> int:
    vectors = features.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    return PCA(n_components=explained_variance, svd_solver="full").fit(vectors).n_components_


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


def test_latent_width_is_that_of_a_pca_of_all_training_images(
    trained: tuple[SAAE, Engine, Probe], stripes: Path
) -> None:
    model = trained[0]
    datamodule = data(stripes)
    datamodule.prepare_data()
    datamodule.setup("fit")
    batches = [model.pre_processor.transform(batch.image) for batch in datamodule.train_dataloader()]
    expected = components_of(model.model.embed(torch.cat(batches)), SCHEDULE["explained_variance"])
    assert model.hparams["latent_dim"] == model.model.autoencoder.latent_dim == expected
    assert expected > 1


@pytest.mark.parametrize("feature_cache_gib", [0.0, 2.0])
def test_latent_width_is_that_of_images_as_seen_in_a_test(
    mixed_stripes: Path, tmp_path: Path, feature_cache_gib: float
) -> None:
    model = SAAE(**SMALL, **SCHEDULE, feature_cache_gib=feature_cache_gib)
    _, engine = train(mixed_stripes, tmp_path, model=model, max_epochs=1)
    # one image at a time, and so none resized to the size of another
    batches = engine.predict(model, data_path=mixed_stripes / "stripes" / "train" / "good")
    features = model.model.embed(torch.cat([batch.image for batch in batches]))
    assert model.hparams["latent_dim"] == components_of(features, SCHEDULE["explained_variance"])


def test_a_vision_transformer_trains(stripes: Path, tmp_path: Path) -> None:
    probe = Probe()
    model = SAAE("vit_small_patch16_dinov3_qkvb", pre_trained=False, image_size=(64, 80), patch_size=1, **SCHEDULE)
    train(stripes, tmp_path, model=model, callbacks=[probe])
    assert probe.losses[-1] < probe.losses[0]
    assert model.model.backbone.grid_size == (4, 5)


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


def test_an_untrained_backbone_finds_the_defects_of_the_demo_data(drawn: Path, tmp_path: Path) -> None:
    seed_everything(0)
    # the features of random weights have most of their variance in a few components, so more of it is kept
    model = SAAE("vit_tiny_patch16_224", pre_trained=False, image_size=128, explained_variance=0.99, learning_rate=1e-3)
    engine = Engine(default_root_dir=tmp_path, max_epochs=8, accelerator="cpu", enable_progress_bar=False)
    datamodule = DemoAD(root=drawn, category="grid")
    engine.fit(model, datamodule=datamodule)
    assert engine.test(model, datamodule=datamodule)[0]["pixel_AUROC"] > 0.9


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


@pytest.mark.parametrize("explained_variance", [0.0, 1.5])
def test_explained_variance_out_of_range_is_refused(explained_variance: float) -> None:
    words = f"explained_variance must be above 0 and at most 1, got {explained_variance}"
    with pytest.raises(ValueError, match=words):
        SAAE(**SMALL, explained_variance=explained_variance)
