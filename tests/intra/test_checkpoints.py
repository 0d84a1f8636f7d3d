# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import torch
from anomalib.models import Padim
from lightning import Trainer

from anomalib_recon.models import InTra

SMALL = {"image_size": 64, "patch_size": 8, "window_size": 3, "embed_dim": 16, "depth": 2, "num_heads": 2}


def save(model: InTra | Padim, path: Path) -> dict:
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_checkpoints_hold_plain_data(tmp_path: Path) -> None:
    checkpoint = save(InTra(**SMALL), tmp_path / "intra.ckpt")
    assert checkpoint["hyper_parameters"]["image_size"] == (64, 64)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save(Padim(backbone="resnet18", pre_trained=False), tmp_path / "padim.ckpt")
    with pytest.raises(ValueError, match="The checkpoint is not one of InTra"):
        InTra.load_from_checkpoint(tmp_path / "padim.ckpt")


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint = save(InTra(**SMALL), tmp_path / "intra.ckpt")
    with pytest.raises(ValueError, match=r"needs a model with depth=2 \(not 3\); pass these arguments"):
        InTra(**{**SMALL, "depth": 3}).on_load_checkpoint(checkpoint)
