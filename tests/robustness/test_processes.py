# SPDX-License-Identifier: Apache-2.0

"""Two processes train, fit and test to the figures of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.conftest import write_stripes

from .conftest import TINY, build, data, engine_in

# What differs between one process with all images in a batch and two with half of them each is nothing but random
# numbers, so there are none; what InTra draws does not move its weights.
WITHOUT_CHANCE = {
    "InTra": {"learning_rate": 1e-30, "held_out_fraction": 0.01},
    "ADTR": {"dropout": 0.0},
    "SAAE": {},
    "PatchAE": {"defect_probability": 0.0, "coreset_ratio": 1.0},
}
# of the way that the weights have gone, of the spread of the bank, of thresholds and of metrics of pixels; SAAE and
# PatchAE normalise by the statistics of a batch, which each process has its own of
TOLERANCE = {"InTra": 1e-3, "ADTR": 1e-2, "SAAE": 0.2, "PatchAE": 0.2}
SCRIPT = """
import sys
from pathlib import Path
from tests.robustness.test_processes import TINY, train

even, uneven, folder = map(Path, sys.argv[1:])
for name in TINY:
    train(name, even, folder / name / "even", devices=2, strategy="ddp", batch_size=6)
    # of 11 images, one is there twice: 4 and 2 in each process
    train(name, uneven, folder / name / "uneven", devices=2, strategy="ddp", batch_size=4)
"""


class Write(Callback):
    """Writes what a process has come to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def on_fit_end(self, trainer, pl_module) -> None:
        torch.save(pl_module.state_dict(), self.folder / f"{trainer.global_rank}.pt")

    def on_test_end(self, trainer, pl_module) -> None:
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        (self.folder / f"{trainer.global_rank}.json").write_text(json.dumps(metrics))


def train(name: str, root: Path, folder: Path, batch_size: int, **trainer) -> None:
    engine = engine_in(folder / "results", callbacks=[Write(folder)], **trainer)
    engine.train(build(name, **WITHOUT_CHANCE[name]), datamodule=data(root, train_batch_size=batch_size))


@pytest.fixture(scope="module")
def two_processes(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with what two processes have come to, for all models."""
    folder = tmp_path_factory.mktemp("two")
    uneven = write_stripes(folder / "data", num_train=11)
    (folder / "script.py").write_text(SCRIPT)
    project = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, folder / "script.py", stripes, uneven, folder],
        check=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    return folder


def read_state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("model", TINY)
def test_two_processes_come_to_the_result_of_one(
    two_processes: Path, model: str, stripes: Path, tmp_path: Path
) -> None:
    train(model, stripes, tmp_path, batch_size=12)
    one, two = read_state(tmp_path / "0.pt"), read_state(two_processes / model / "even" / "0.pt")
    assert one.keys() == two.keys()
    start = build(model, **WITHOUT_CHANCE[model]).state_dict()
    moved, apart = 0.0, 0.0
    for key, value in one.items():
        if key == "model.bank.vectors":  # in another order, and all shifted alike, as are those to be compared
            vectors, others = value - value.mean(dim=0), two[key] - two[key].mean(dim=0)
            distances = torch.cdist(vectors, others, compute_mode="donot_use_mm_for_euclid_dist")
            spread = float(value.std(dim=0).norm())
            assert float(distances.amin(dim=0).max()) < TOLERANCE[model] * spread
            assert float(distances.amin(dim=1).max()) < TOLERANCE[model] * spread
        elif key.startswith("post_processor."):
            torch.testing.assert_close(two[key], value, rtol=TOLERANCE[model], atol=1e-5)
        elif key in start and value.is_floating_point():
            moved += float((value - start[key]).square().sum())
            apart += float((value - two[key]).square().sum())
    assert apart <= TOLERANCE[model] ** 2 * moved
    folders = tmp_path, two_processes / model / "even"
    metrics, other = (json.loads((folder / "0.json").read_text()) for folder in folders)
    for metric in ("pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"):  # ten images resolve no small difference
        assert other[metric] == pytest.approx(metrics[metric], abs=TOLERANCE[model])


@pytest.mark.parametrize("batches", ["even", "uneven"])
@pytest.mark.parametrize("model", TINY)
def test_two_processes_have_one_model(two_processes: Path, model: str, batches: str) -> None:
    first, second = (read_state(two_processes / model / batches / f"{rank}.pt") for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(second[key], value), key
        assert value.isfinite().all(), key
    metrics, others = ((two_processes / model / batches / f"{rank}.json").read_text() for rank in (0, 1))
    assert metrics == others
