# SPDX-License-Identifier: Apache-2.0

"""What benchmarks share that train and test with anomalib's engine."""

import time
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch.trainer.states import TrainerFn

from benchmarks.rows import accuracy

# figures of different benchmarks are compared, so all have the same batches
BATCHES = {"train_batch_size": 16, "eval_batch_size": 16, "num_workers": 0}


def create_engine(folder: Path, precision: str, **arguments: Any) -> Engine:
    """anomalib's engine on the CPU, with neither logs nor progress bars.

    Args:
        folder (Path): Where checkpoints go.
        precision (str): Lightning's precision.
        **arguments (Any): Further arguments of Lightning's trainer.
    """
    return Engine(
        default_root_dir=folder, precision=precision, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, **arguments,
    )  # fmt: skip


def keep_training_images(datamodule: AnomalibDataModule, number: int, seed: int) -> None:
    """Keep so many training images, drawn with the seed, if there are more."""
    datamodule.setup(TrainerFn.FITTING)
    order = torch.randperm(len(datamodule.train_data), generator=torch.Generator().manual_seed(seed))
    datamodule.train_data = datamodule.train_data.subsample(sorted(order[:number].tolist()))


def fit_and_test(engine: Engine, model: AnomalibModule, datamodule: AnomalibDataModule) -> dict[str, Any]:
    """Train and test a model.

    Returns:
        dict[str, Any]: Accuracy on raw scores, the number of training images, and the seconds of the fit.
    """
    begun = time.time()
    engine.fit(model, datamodule=datamodule)
    seconds = time.time() - begun
    [metrics] = engine.test(model, datamodule=datamodule, verbose=False)
    return accuracy(metrics) | {"training images": len(datamodule.train_data), "fit, s": seconds}
