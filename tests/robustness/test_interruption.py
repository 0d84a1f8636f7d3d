# SPDX-License-Identifier: Apache-2.0

"""Runs that are killed, or whose disk is full: nothing broken is left to be read, and going on loses nothing."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.models import AnomalibModule
from lightning.pytorch.callbacks import Callback

from tests.tiny_models import CLOSED_FORM, build, engine_in

from .conftest import data

EPOCHS = 3
# Its processes are copies of one that has only imported. Copies of this one would have what threads of other tests
# have left behind.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.robustness.conftest"])


def run_in_child(work: Callable[..., None], *args: object) -> int:
    """Run something in a process of its own; return the signal that killed it, or 0 if it came to its end."""
    child = SERVER.Process(target=work, args=args)
    child.start()
    child.join(timeout=300)
    return -child.exitcode


class KillAt(Callback):
    """Kills its process at the n-th of these moments of a training."""

    def __init__(self, moment: int) -> None:
        self.left = moment

    def _count(self, *args, **kwargs) -> None:
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1

    on_train_batch_start = on_before_backward = on_train_epoch_end = _count
    on_save_checkpoint = on_validation_batch_start = on_train_end = _count


class FullDisk(Callback):
    """From an epoch on, no file can become larger than 64 KB."""

    def __init__(self, epoch: int, kill: bool) -> None:
        self.epoch, self.kill = epoch, kill

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            # what the system sends to the process that writes on; Python ignores it, and gets an OSError
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.kill else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, resource.RLIM_INFINITY))


def train(name: str, root: Path, folder: Path, ckpt_path: str | None = None, **trainer) -> AnomalibModule:
    model = build(name)
    engine_in(folder, max_epochs=EPOCHS, **trainer).fit(model, datamodule=data(root), ckpt_path=ckpt_path)
    return model


def train_until_killed(name: str, root: Path, folder: Path, ckpt_path: str | None, moment: int) -> None:
    train(name, root, folder, ckpt_path, callbacks=[KillAt(moment)])


def train_until_the_disk_is_full(name: str, root: Path, folder: Path, kill: bool) -> None:
    with pytest.raises(OSError, match="File too large"):
        train(name, root, folder / "run", callbacks=[FullDisk(2, kill)])
    (folder / "told").touch()


@pytest.fixture(scope="module")
def whole(name: str, stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights, bank, thresholds and all else of a run without interruption."""
    if name in CLOSED_FORM:
        pytest.skip("has no epochs, and is saved once")
    return train(name, stripes, tmp_path_factory.mktemp("whole")).state_dict()


def test_a_run_that_is_killed_goes_on_to_the_same_result(
    name: str, stripes: Path, tmp_path: Path, whole: dict[str, torch.Tensor]
) -> None:
    # drawn anew for each model, the same on every run
    moments = np.random.default_rng(sorted(name.encode())).integers(9, 25, 2)
    checkpoint: str | None = None
    for attempt, moment in enumerate(moments):
        killed_by = run_in_child(train_until_killed, name, stripes, tmp_path, checkpoint, int(moment))
        assert killed_by == signal.SIGKILL or attempt  # what goes on may be finished before its moment comes
        found = sorted(tmp_path.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
        checkpoint = str(found[-1]) if found else None
        assert all("state_dict" in torch.load(path, weights_only=True) for path in found)
    assert checkpoint is not None
    resumed = train(name, stripes, tmp_path, checkpoint).state_dict()
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key


@pytest.mark.parametrize("name", ["SAAE"], indirect=True)  # what writes is Lightning, whatever the model
@pytest.mark.parametrize("kill", [True, False], ids=["killed", "disk full"])
def test_the_checkpoint_before_survives_a_write_that_breaks_off(
    name: str, stripes: Path, tmp_path: Path, whole: dict[str, torch.Tensor], kill: bool
) -> None:
    killed_by = run_in_child(train_until_the_disk_is_full, name, stripes, tmp_path, kill)
    assert killed_by == (signal.SIGXFSZ if kill else 0)
    assert (tmp_path / "told").exists() == (not kill)
    [checkpoint] = (tmp_path / "run").rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    resumed = train(name, stripes, tmp_path / "rest", str(checkpoint)).state_dict()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
