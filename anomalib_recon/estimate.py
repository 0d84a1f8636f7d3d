# SPDX-License-Identifier: Apache-2.0

"""How long will a training take here, and how much memory does it need? Answers from a few timed steps.

A config's model is trained for a few steps, twice, on synthetic pictures. What is done once for each image, such as
computing features, is taken to grow in proportion to the number of images; PatchAE's choice of its bank grows with its
square if coreset_ratio stays the same. Validation is that of four images. What InTra does after each epoch, the loss on
up to 20 held-out images, counts once. A training that max_time ends takes that time between its first and last step.
Further arguments are those of `anomalib train` for model and trainer, such as --trainer.accelerator cpu or
--model.pre_trained false.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import AnomalibDataset
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Timer

from anomalib_recon.experiments.training import hardware

GIB = 2**30
# batches of the two trials; the first step of each is to warm up
BATCHES = (2, 4)
VALIDATION_IMAGES = 4


class Clock(Callback):
    """Notes how long each part of a fit takes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.feature_bytes = 0
        self._step_began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start, before the features are computed."""
        del trainer, pl_module, stage
        self.began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what came before the first step, which begins with the loading of its images."""
        self._step_began = _now(trainer)
        self.seconds_before = self._step_began - self.began
        self.feature_bytes = getattr(getattr(pl_module, "feature_cache", None), "num_bytes", 0)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """End a step, and start the next one."""
        del args
        self.trained = _now(trainer)
        self.steps.append(self.trained - self._step_began)
        self._step_began = self.trained


@dataclass(frozen=True)
class Trial:
    """What a short training took.

    Attributes:
        num_images (int): Training images.
        before (float): Seconds before the first step.
        step (float): Seconds of a step, the loading of its images included, the median.
        after (float): Seconds after the last step: what the model computes at the end, validation of four images,
            checkpoint.
        feature_bytes (int): Memory of the features that were kept.
        peak_bytes (int): Most memory that the process has had.
    """

    num_images: int
    before: float
    step: float
    after: float
    feature_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Estimate:
    """What a training will take.

    Attributes:
        before (float): Seconds before the first step.
        steps (int): Number of steps, the most if something may stop the training.
        step (float): Seconds of a step.
        after (float): Seconds after the last step.
        peak_bytes (float): Most memory.
        features (str): What becomes of the features, in words; empty for models without a cache.
    """

    before: float
    steps: int
    step: float
    after: float
    peak_bytes: float
    features: str

    @property
    def seconds(self) -> float:
        """Time of the training."""
        return self.before + self.steps * self.step + self.after


def estimate(arguments: Sequence[str], num_images: int, batch_size: int = 32) -> tuple[Estimate, Trainer]:
    """Train a few steps, twice, and tell from them what a whole training will take.

    Args:
        arguments (Sequence[str]): Arguments of ``anomalib train`` for model and trainer.
        num_images (int): Number of training images.
        batch_size (int): Images of a training batch. Defaults to ``32``, as in anomalib's datamodules.

    Returns:
        tuple[Estimate, Trainer]: What it takes, and the trainer of the trials.

    Raises:
        ValueError: If a number is not positive, or nothing ends the training.
    """
    for name, value in (("images", num_images), ("batch_size", batch_size)):
        if value < 1:
            msg = f"{name} must be positive, got {value}."
            raise ValueError(msg)
    with tempfile.TemporaryDirectory() as folder:
        steps, seconds = _limits(_parse(arguments, Path(folder)), math.ceil(num_images / batch_size))
        counts = [batches * batch_size for batches in BATCHES]
        (small, _), (large, trainer) = (_try(arguments, count, batch_size, Path(folder)) for count in counts)
        features_gib = large.feature_bytes / large.num_images * num_images / GIB
        budget = getattr(getattr(trainer.lightning_module, "hparams", None), "feature_cache_gib", 0) or 0
        features = f"{features_gib:.2f} GiB, kept" if large.feature_bytes else ""
        if features_gib > budget:
            features = f"{features_gib:.2f} GiB, more than feature_cache_gib={budget:g}: computed anew in each epoch"
            anew = [*arguments, "--model.feature_cache_gib=0"]
            (small, _), (large, trainer) = (_try(anew, count, batch_size, Path(folder)) for count in counts)

    def at(name: str) -> float:
        first, second = getattr(small, name), getattr(large, name)
        slope = max(0.0, second - first) / (large.num_images - small.num_images)
        return second + slope * (num_images - large.num_images)

    before, after, peak = (max(0.0, at(name)) for name in ("before", "after", "peak_bytes"))
    return Estimate(before, int(min(steps, seconds / large.step)), large.step, after, peak, features), trainer


def _parse(arguments: Sequence[str], folder: Path) -> AnomalibCLI:
    return AnomalibCLI(["train", *arguments, "--default_root_dir", str(folder)], run=False)


def _limits(cli: AnomalibCLI, batches: int) -> tuple[float, float]:
    """Steps and seconds after which a training ends; infinite if it does not by them."""
    trainer = cli.config["train"]["trainer"]
    most = [trainer["max_epochs"] * batches] if (trainer["max_epochs"] or -1) > 0 else []
    most += [trainer["max_steps"]] if (trainer["max_steps"] or -1) > 0 else []
    seconds = Timer(trainer["max_time"]).time_remaining()
    if not most and seconds is None:
        msg = "Nothing ends the training: pass --trainer.max_epochs or --trainer.max_time, or set it in the config."
        raise ValueError(msg)
    return min(most, default=math.inf), math.inf if seconds is None else seconds


def _try(arguments: Sequence[str], num_images: int, batch_size: int, folder: Path) -> tuple[Trial, Trainer]:
    """Train one epoch on synthetic pictures."""
    seed_everything(0)
    clock = f"--trainer.callbacks+={Clock.__module__}.{Clock.__qualname__}"
    schedule = ["--trainer.max_epochs=1", "--trainer.max_steps=-1", "--trainer.devices=1"]
    cli = _parse(
        [
            *arguments, *schedule, clock, "--trainer.enable_progress_bar=false", "--trainer.logger=false",
            "--trainer.enable_model_summary=false", f"--data.root={folder}", f"--data.train_batch_size={batch_size}",
        ],
        folder,
    )  # fmt: skip
    cli.datamodule.setup()
    cli.datamodule.train_data = _repeat(cli.datamodule.train_data, num_images)
    for name in ("val_data", "test_data"):
        setattr(cli.datamodule, name, _repeat(getattr(cli.datamodule, name), VALIDATION_IMAGES))
    cli.datamodule._is_setup = True  # fit would undo the above
    cli.engine.fit(cli.model, datamodule=cli.datamodule)
    trainer = cli.engine.trainer
    [clock_] = (callback for callback in trainer.callbacks if isinstance(callback, Clock))  # type: ignore[attr-defined]
    steps = clock_.steps[1:] or clock_.steps
    trial = Trial(
        num_images, clock_.seconds_before, statistics.median(steps), time.perf_counter() - clock_.trained,
        clock_.feature_bytes, _peak_bytes(trainer),
    )  # fmt: skip
    return trial, trainer


def _repeat(dataset: AnomalibDataset, count: int) -> AnomalibDataset:
    """As many images as asked for, some of them more than once."""
    samples = dataset.samples
    repeated = pd.concat([samples] * math.ceil(count / len(samples)), ignore_index=True)[:count]
    repeated.attrs = samples.attrs
    dataset = dataset.subsample(range(min(count, len(samples))))
    dataset.samples = repeated
    return dataset


def _now(trainer: Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
    return time.perf_counter()


def _peak_bytes(trainer: Trainer) -> int:
    device = trainer.strategy.root_device
    if peak := _accelerator_memory(device, "max_memory_reserved"):
        return peak(device)
    import resource  # noqa: PLC0415  # not on Windows, where the command says so

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _all_bytes(trainer: Trainer) -> int:
    device = trainer.strategy.root_device
    if free_and_all := _accelerator_memory(device, "mem_get_info"):
        return free_and_all(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _accelerator_memory(device: torch.device, name: str) -> Any:
    """A function of the accelerator's module, if it has a memory of its own and tells about it."""
    return None if device.type == "cpu" else getattr(torch.get_device_module(device), name, None)


def describe_time(seconds: float) -> str:
    """Say a time in words.

    Args:
        seconds (float): The time.

    Returns:
        str: Two units at most, such as ``2 h 5 min``.
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes / 1440:.1f} days"


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    assert __doc__
    parser = argparse.ArgumentParser("python -m anomalib_recon.estimate", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="config of the model, as configs/model/saae.yaml")
    parser.add_argument("--images", type=int, required=True, help="number of training images")
    parser.add_argument("--image_size", type=int, help="height and width in pixels (default: that of the config)")
    parser.add_argument("--batch_size", type=int, default=32, help="images of a training batch (default: 32)")
    return parser


def main(args: Sequence[str] | None = None) -> Estimate:
    """Estimate, and print what was found.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Returns:
        Estimate: What the training takes.

    Raises:
        ValueError: If an argument cannot work.
    """
    options, further = build_parser().parse_known_args(args)
    if sys.platform == "win32":
        msg = "python -m anomalib_recon.estimate asks the system for its memory in a way that Windows does not have."
        raise ValueError(msg)
    if not options.config.is_file():
        msg = f"config must be a file, got {options.config}; see configs/model."
        raise ValueError(msg)
    size = [f"--model.image_size={options.image_size}"] if options.image_size else []
    arguments = ["--config", str(options.config), "--data", "anomalib_recon.data.DemoAD", *size, *further]
    found, trainer = estimate(arguments, options.images, options.batch_size)
    module = trainer.lightning_module
    available = _all_bytes(trainer)
    rows = {
        "before the first step": describe_time(found.before),
        f"{found.steps} steps of {found.step:.3g} s": describe_time(found.steps * found.step),
        "after the last step": describe_time(found.after),
        "together": describe_time(found.seconds),
        "memory": f"{found.peak_bytes / GIB:.1f} of {available / GIB:.1f} GiB",
        **({"features": found.features} if found.features else {}),
    }
    print(f"\n{type(module).__name__}, {options.images} images in batches of {options.batch_size}, {hardware(trainer)}")
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    if found.peak_bytes > available:
        print("It needs more memory than there is: take a smaller --batch_size, image size or feature_cache_gib.")
    return found


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        build_parser().error(str(error))
