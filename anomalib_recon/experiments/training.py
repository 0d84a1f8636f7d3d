# SPDX-License-Identifier: Apache-2.0

"""Trainings that leave their result in a folder, and go on where they were interrupted."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from anomalib_recon.files import write_whole


class TrainingTime(Callback):
    """Time of a training, of which interrupted parts count as far as they are in the checkpoint.

    It begins before a model computes features. Lightning's own ``Timer`` begins later, and with one among the
    callbacks, a trainer leaves its ``max_time`` out.
    """

    def __init__(self) -> None:
        super().__init__()
        self._earlier = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Time so far."""
        return self._earlier + (0.0 if self._began is None else time.monotonic() - self._began)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        del trainer, pl_module
        if stage == "fit":
            self._began = time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop the clock."""
        del trainer, pl_module
        if stage == "fit":
            self._earlier, self._began = self.seconds, None

    def state_dict(self) -> dict[str, Any]:
        """Save the time so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Add the time of the parts before."""
        self._earlier = state_dict.get("seconds", 0.0)  # an older version kept others


@dataclass(frozen=True)
class Trained:
    """A trained model.

    Attributes:
        engine (Engine): Engine that has trained it.
        model (AnomalibModule): The model.
        datamodule (AnomalibDataModule): Its data.
        seconds (float): Time of training, features and what follows the last epoch included.
    """

    engine: Engine
    model: AnomalibModule
    datamodule: AnomalibDataModule
    seconds: float


def parse(arguments: Sequence[str], folder: Path) -> AnomalibCLI:
    """Parse the arguments of a training, and build what it needs.

    Args:
        arguments (Sequence[str]): Arguments of ``anomalib train`` for model, data and trainer.
        folder (Path): Folder of this training alone.

    Returns:
        AnomalibCLI: Engine, model and datamodule.

    Raises:
        SystemExit: If an argument is unknown.
        ValueError: If a value does not fit.
    """
    timer = f"--trainer.callbacks+={TrainingTime.__module__}.{TrainingTime.__qualname__}"
    one_device = "--trainer.devices=1"  # several would multiply the batch size
    return AnomalibCLI(["train", one_device, *arguments, timer, "--default_root_dir", str(folder)], run=False)


def train(
    arguments: Sequence[str], folder: Path, seed: int, prepare: Callable[[AnomalibCLI], None] | None = None
) -> Trained:
    """Train a model, from the last checkpoint in a folder if there is one, on one device unless told otherwise.

    Args:
        arguments (Sequence[str]): Arguments of ``anomalib train`` for model, data and trainer.
        folder (Path): Folder of this training alone.
        seed (int): Seed of all random numbers.
        prepare (Callable[[AnomalibCLI], None] | None): Called with the parsed arguments and the model before the
            training. Defaults to ``None``.

    Returns:
        Trained: The model, ready to be tested.
    """
    seed_everything(seed)  # `anomalib train` does not, whatever its argument of that name says
    cli = parse(arguments, folder)
    if prepare:
        prepare(cli)
    checkpoint = max(folder.rglob("*.ckpt"), key=os.path.getmtime, default=None)
    # `anomalib train --ckpt_path` would test that checkpoint in the end, and not what has become of it
    cli.engine.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint)
    callbacks = cli.engine.trainer.callbacks  # type: ignore[attr-defined]
    [seconds] = (callback.seconds for callback in callbacks if isinstance(callback, TrainingTime))
    return Trained(cli.engine, cli.model, cli.datamodule, seconds)


def hardware(trainer: Trainer) -> str:
    """What a trainer runs on, in words."""
    device = trainer.strategy.root_device
    if device.type != "cpu":
        name = getattr(torch.get_device_module(device), "get_device_name", lambda device: device.type)
        return f"{trainer.world_size} x {name(device)}"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a file written by :func:`write_json`, or ``None`` if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(content, indent=2).encode())


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to continue or to reuse a run that was started with other settings.

    Args:
        folder (Path): Folder of the run.
        settings (Mapping[str, Any]): All that its result depends on, as plain data.

    Raises:
        ValueError: If the folder holds a run with other settings, or one whose settings are not known.
    """
    # a run that failed at once, by a mistyped argument, may be corrected
    if not (folder / "result.json").exists() and not any(folder.rglob("*.ckpt")):
        return
    earlier, settings = read_json(folder / "settings.json") or {}, json.loads(json.dumps(settings))
    different = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
    if different:
        msg = (
            f"{folder} holds a run with other settings ({', '.join(different)}; see its settings.json): "
            "choose another --output, or remove that folder."
        )
        raise ValueError(msg)


def run_once(folder: Path, settings: Mapping[str, Any], run: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Read the result of a run, or do it if it has not been finished.

    Args:
        folder (Path): Folder of the run, with ``settings.json`` and, in the end, ``result.json``.
        settings (Mapping[str, Any]): All that the result depends on, as plain data.
        run (Callable[[], Mapping[str, Any]]): Does the run, and returns the result as plain data.

    Returns:
        dict[str, Any]: The result.

    Raises:
        ValueError: See :func:`check_settings`.
    """
    check_settings(folder, settings)
    result = read_json(folder / "result.json")
    if result is None:
        write_json(folder / "settings.json", settings)
        result = dict(run())
        write_json(folder / "result.json", result)
    return result
