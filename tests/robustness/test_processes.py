# SPDX-License-Identifier: Apache-2.0

"""Two processes train, fit and test to the figures of one."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.conftest import write_stripes

from .conftest import build, data, engine_in, needs_fork

pytestmark = needs_fork

# What differs between one process with all images in a batch and two with half of them each is nothing but random
# numbers, so there are none: what InTra draws does not move its weights.
WITHOUT_CHANCE = {
    "InTra": {"learning_rate": 1e-30, "held_out_fraction": 0.01},
    "ADTR": {"dropout": 0.0},
    "SAAE": {},
    "PatchAE": {"defect_probability": 0.0, "coreset_ratio": 1.0},
}


class Write(Callback):
    """Writes what a process has come to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer, pl_module) -> None:
        state = {key: value.cpu() for key, value in pl_module.state_dict().items()}
        torch.save(state, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")

    def on_test_end(self, trainer, pl_module) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        (self.folder / f"{trainer.world_size}-{trainer.global_rank}.json").write_text(json.dumps(metrics))


def train(name: str, root: Path, folder: Path, processes: int, batch_size: int) -> None:
    strategy = {"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}
    # the folder of results has the time of a second in its name
    engine = engine_in(folder / str(processes), callbacks=[Write(folder)], num_sanity_val_steps=0, **strategy)
    engine.train(build(name, **WITHOUT_CHANCE[name]), datamodule=data(root, train_batch_size=batch_size))


def test_two_processes_come_to_the_result_of_one(name: str, stripes: Path, tmp_path: Path) -> None:
    train(name, stripes, tmp_path, processes=1, batch_size=12)
    train(name, stripes, tmp_path, processes=2, batch_size=6)
    one, first, second = (torch.load(tmp_path / f"{run}.pt", weights_only=True) for run in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys()
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        if key == "model.bank.vectors":  # in another order
            distances = torch.cdist(value, first[key], compute_mode="donot_use_mm_for_euclid_dist")
            assert float(distances.amin(dim=0).max()) < 1e-4
            assert float(distances.amin(dim=1).max()) < 1e-4
        else:
            torch.testing.assert_close(first[key], value, rtol=1e-3, atol=1e-5)
    metrics, *others = (json.loads((tmp_path / f"{run}.json").read_text()) for run in ("1-0", "2-0", "2-1"))
    assert len(metrics) >= 5
    for other in others:
        assert {key: other[key] for key in metrics} == pytest.approx(metrics, abs=2e-3)


def test_batches_may_be_uneven(name: str, tmp_path: Path) -> None:
    root = write_stripes(tmp_path / "data", num_train=11)
    train(name, root, tmp_path, processes=2, batch_size=4)  # 4 and 2 of 6 images, one of which is there twice
    first, second = (torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(second[key], value), key
        assert value.isfinite().all(), key
