# SPDX-License-Identifier: Apache-2.0

"""Checkpoints that explain themselves, and continue a run as if it had not been interrupted."""

from pathlib import Path
from typing import Any

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


def load_checkpoint(path: str | Path, argument: str, model_class: type[AnomalibModule] | None = None) -> dict[str, Any]:
    """Load a checkpoint, which may come from a stranger: plain data alone, on the CPU.

    Args:
        path (str | Path): The checkpoint.
        argument (str): The argument that names it, for the error.
        model_class (type[AnomalibModule] | None): Model whose types may be in it, beside plain data.
            Defaults to ``None``.

    Returns:
        dict[str, Any]: What it holds.

    Raises:
        ValueError: If it is not a checkpoint.
    """
    types = model_class.checkpoint_safe_globals() if model_class else ()
    try:
        return dict(AnomalibCheckpointIO(types).load_checkpoint(path, map_location="cpu"))
    except FileNotFoundError as error:
        msg = f"{argument}={path} is not a file; pass a checkpoint of anomalib."
        raise ValueError(msg) from error
    except Exception as error:  # torch fails in as many ways as files can be broken
        msg = f"{argument}={path} is not a checkpoint of anomalib, or not a whole one; pass another file."
        raise ValueError(msg) from error


def checkpoint_files(callback: ModelCheckpoint) -> set[Path]:
    """Find the checkpoints that a callback has kept.

    Args:
        callback (ModelCheckpoint): The callback.

    Returns:
        set[Path]: The best, the last and the next best ones, as far as they are there. Lightning keeps no list of
            others, such as those of ``save_top_k=-1`` without ``monitor``.
    """
    paths = {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
    return {Path(path).resolve() for path in paths if path and Path(path).is_file()}


class RandomState(Callback):
    """Let a resumed run draw the random numbers that it would have drawn without the interruption.

    Processes are seeded alike, so that the state of the first one holds for all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._saved: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """Save the state of the random number generators."""
        generators = _generators()
        return {"cpu": torch.get_rng_state(), "accelerator": [generators.get_rng_state()] if generators else []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the run starts."""
        self._saved = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue with the saved state, which is that of the process that has saved it."""
        del trainer, pl_module
        saved, self._saved = self._saved, {}
        if saved:
            torch.set_rng_state(saved["cpu"].cpu())
            if (states := saved.get("accelerator")) and (generators := _generators()):
                generators.set_rng_state(states[0].cpu())


def _generators() -> Any:
    """The random number generators of the accelerator, if there is one of any kind."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator and torch.get_device_module(accelerator)
