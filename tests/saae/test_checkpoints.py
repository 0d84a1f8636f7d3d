# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import timm
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Padim, get_model
from lightning import Trainer, seed_everything
from safetensors.torch import save_file

from anomalib_recon.models import SAAE

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SMALL = {"backbone": VIT, "image_size": 64, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def datamodule(stripes: Path) -> MVTecAD:
    return MVTecAD(root=stripes, category="stripes", train_batch_size=6, eval_batch_size=4, num_workers=0)


def engine_in(folder: Path) -> Engine:
    return Engine(default_root_dir=folder, max_epochs=1, accelerator="cpu", enable_progress_bar=False)


@pytest.fixture(scope="module")
def trained(datamodule: MVTecAD, tmp_path_factory: pytest.TempPathFactory) -> tuple[SAAE, str]:
    """A model trained on a backbone from a file that is gone afterwards, and its checkpoint."""
    seed_everything(0)
    folder = tmp_path_factory.mktemp("results")
    weights = folder / "vit.safetensors"
    save_file(timm.create_model(VIT, pretrained=False).state_dict(), weights)
    model = SAAE(**SMALL, backbone_weights=weights, explained_variance=0.95)
    weights.unlink()
    engine = engine_in(folder)
    engine.fit(model, datamodule=datamodule)
    return model, engine.trainer.checkpoint_callback.best_model_path


def test_checkpoint_round_trip_needs_neither_data_nor_weights(trained: tuple[SAAE, str]) -> None:
    model, path = trained
    loaded = SAAE.load_from_checkpoint(path)
    assert loaded.hparams["latent_dim"] == model.model.autoencoder.latent_dim > 1
    images = torch.rand(3, 3, 100, 70)
    with torch.no_grad():
        expected, result = model.eval()(images), loaded.eval()(images)
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))


def test_checkpoints_hold_plain_data(trained: tuple[SAAE, str]) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    assert checkpoint["hyper_parameters"]["image_size"] == (64, 64)
    assert type(checkpoint["hyper_parameters"]["latent_dim"]) is int
    assert type(checkpoint["hyper_parameters"]["backbone_weights"]) is str


def test_a_new_model_is_tested_with_the_checkpoint(
    trained: tuple[SAAE, str], datamodule: MVTecAD, tmp_path: Path
) -> None:
    new = SAAE(**SMALL, pre_trained=False)
    by_path = engine_in(tmp_path).test(new, datamodule=datamodule, ckpt_path=trained[1])
    assert new.model.autoencoder.latent_dim == trained[0].hparams["latent_dim"]
    assert by_path == engine_in(tmp_path).test(trained[0], datamodule=datamodule)


def test_the_name_of_anomalib_is_known() -> None:
    assert isinstance(get_model("s_a_a_e", **SMALL, pre_trained=False), SAAE)


def save(model: SAAE | Padim, path: Path) -> dict:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint = save(Padim(backbone="resnet18", pre_trained=False), tmp_path / "padim.ckpt")
    with pytest.raises(ValueError, match="The checkpoint is not one of SAAE"):
        SAAE(**SMALL, pre_trained=False).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"mlp_ratio": 2}, r"needs a model with mlp_ratio=1 \(not 2\)"),
        ({"latent_dim": 5}, r"needs a model with latent_dim=7 \(not 5\)"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path, arguments: dict, words: str) -> None:
    checkpoint = save(SAAE(**SMALL, pre_trained=False, latent_dim=7), tmp_path / "saae.ckpt")
    with pytest.raises(ValueError, match=words):
        SAAE(**SMALL, pre_trained=False, **arguments).on_load_checkpoint(checkpoint)
