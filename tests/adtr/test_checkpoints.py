# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import timm
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Padim
from lightning import Trainer, seed_everything

from anomalib_recon.models import ADTR

SMALL = {
    "backbone": "resnet18", "layers": ["layer1", "layer2"], "image_size": 64, "feature_size": 8, "embed_dim": 16,
    "depth": 1, "num_heads": 2, "mlp_dim": 32,
}  # fmt: skip


def data(root: Path) -> MVTecAD:
    return MVTecAD(root=root, category="stripes", eval_batch_size=4, num_workers=0)


def save(model: ADTR | Padim, path: Path) -> dict:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ADTR, str]:
    """A model that was trained with a file of weights, and its checkpoint; the file is gone."""
    folder = tmp_path_factory.mktemp("results")
    seed_everything(0)
    file = folder / "weights.pth"
    torch.save(timm.create_model("resnet18", zero_init_last=False).state_dict(), file)
    model = ADTR(**SMALL, backbone_weights=file)
    engine = Engine(default_root_dir=folder, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=data(stripes))
    file.unlink()
    return model.eval(), engine.trainer.checkpoint_callback.best_model_path


def test_engine_exports_a_checkpoint(trained: tuple[ADTR, str], tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu")
    untrained = ADTR(**SMALL, pre_trained=False)
    path = engine.export(untrained, ExportType.TORCH, export_root=tmp_path, ckpt_path=trained[1])
    exported = torch.load(path, weights_only=False)["model"].eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(exported(images).pred_score, trained[0](images).pred_score)


@pytest.mark.parametrize(
    ("start", "words"),
    [
        (lambda: Padim(backbone="resnet18", pre_trained=False), r"^normal_checkpoint=.*\.ckpt .* not one of ADTR"),
        (
            lambda: ADTR(**{**SMALL, "mlp_dim": 16}, pre_trained=False),
            r"^normal_checkpoint=.*\.ckpt .* mlp_dim=16 \(not 32\)",
        ),
    ],
)
def test_adtr_plus_refuses_to_start_from_another_network(stripes: Path, tmp_path: Path, start, words: str) -> None:
    save(start(), tmp_path / "start.ckpt")
    model = ADTR(
        **SMALL, pre_trained=False, labels="pixel", confetti=0.5, normal_checkpoint=tmp_path / "start.ckpt"
    )  # fmt: skip
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=words):
        engine.fit(model, datamodule=data(stripes))
    assert not list(tmp_path.rglob("model.ckpt"))
