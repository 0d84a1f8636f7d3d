# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import timm
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from safetensors.torch import save_file

from anomalib_recon.models import SAAE

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SMALL = {"backbone": VIT, "image_size": 64, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SAAE, str]:
    """A model trained on a backbone from a file that is gone afterwards, and its checkpoint."""
    seed_everything(0)
    folder = tmp_path_factory.mktemp("results")
    weights = folder / "vit.safetensors"
    save_file(timm.create_model(VIT, pretrained=False).state_dict(), weights)
    model = SAAE(**SMALL, backbone_weights=weights, explained_variance=0.95)
    weights.unlink()
    datamodule = MVTecAD(root=stripes, category="stripes", train_batch_size=6, eval_batch_size=4, num_workers=0)
    engine = Engine(default_root_dir=folder, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
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


def test_a_checkpoint_of_another_latent_width_is_refused(trained: tuple[SAAE, str]) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    latent_dim = trained[0].hparams["latent_dim"]
    words = rf"needs a model with latent_dim={latent_dim} \(not {latent_dim + 1}\); pass it"
    with pytest.raises(ValueError, match=words):
        SAAE(**SMALL, pre_trained=False, latent_dim=latent_dim + 1).on_load_checkpoint(checkpoint)
