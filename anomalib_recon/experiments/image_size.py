# SPDX-License-Identifier: Apache-2.0

"""Choose the image size of InTra by the rule of section 4.1.

Each size is trained for a fixed number of epochs, and the best held-out losses (averaged over the five epochs before
and after) are compared: the next larger size is taken only while it is better by at least 1e-4. All sizes hold out the
same images. Further arguments are those of `anomalib train` for model, data and trainer, such as --data MVTecAD
--data.category screw. Prints the losses, and writes a config for `anomalib train --config`. An interrupted call
continues: what is finished is not trained again. One device is used unless --trainer.devices says otherwise.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_recon.files import write_whole
from anomalib_recon.training import HeldOutImages

from .training import check_settings, run_once, train

MIN_IMPROVEMENT = 1e-4
EPOCHS_AROUND_BEST = 5


def best_held_out_loss(losses: Sequence[float]) -> float:
    """Loss of the best epoch, averaged over the ``EPOCHS_AROUND_BEST`` epochs before and after it.

    Args:
        losses (Sequence[float]): Held-out loss of each epoch.

    Returns:
        float: Averaged loss.
    """
    best = min(range(len(losses)), key=losses.__getitem__)
    around = losses[max(0, best - EPOCHS_AROUND_BEST) : best + EPOCHS_AROUND_BEST + 1]
    return sum(around) / len(around)


def choose(sizes: Sequence[int], loss_of: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """Take the next larger size while its loss is lower by at least ``MIN_IMPROVEMENT``.

    Args:
        sizes (Sequence[int]): Image sizes, the smallest first.
        loss_of (Callable[[int], float]): Trains a size, and returns its loss.

    Returns:
        tuple[int, dict[int, float]]: The size, and the losses of those that were trained.
    """
    chosen, losses = sizes[0], {}
    for size in sizes:
        losses[size] = loss_of(size)
        if size != chosen and losses[chosen] - losses[size] < MIN_IMPROVEMENT:
            break
        chosen = size
    return chosen, losses


def read_config(arguments: Sequence[str]) -> dict[str, Any]:
    """Read arguments of ``anomalib train`` as a config, and refuse those that model or data cannot take.

    Args:
        arguments (Sequence[str]): The arguments.

    Returns:
        dict[str, Any]: ``model``, ``data`` and ``trainer`` as plain data.
    """
    cli = AnomalibCLI(["train", *arguments], run=False)
    text = cli.subcommand_parsers["train"].dump(cli.config["train"], skip_none=True, skip_default=True)
    config = yaml.safe_load(text)
    return {key: config[key] for key in ("model", "data", "trainer") if key in config}


def train_size(arguments: Sequence[str], epochs: int, folder: Path, seed: int) -> dict[str, list[float]]:
    """Train one size.

    Args:
        arguments (Sequence[str]): Arguments of ``anomalib train``.
        epochs (int): Number of epochs.
        folder (Path): Folder of this training alone.
        seed (int): Seed.

    Returns:
        dict[str, list[float]]: ``held_out_losses``, that of each epoch.
    """
    schedule = [f"--trainer.max_epochs={epochs}", f"--model.patience={epochs}"]
    without_thresholds = "--trainer.limit_val_batches=0"
    trained = train([*arguments, *schedule, without_thresholds], folder, seed)
    callbacks = trained.engine.trainer.callbacks  # type: ignore[attr-defined]
    [held_out] = (callback for callback in callbacks if isinstance(callback, HeldOutImages))
    return {"held_out_losses": held_out.losses}


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    assert __doc__
    parser = argparse.ArgumentParser(
        "python -m anomalib_recon.experiments.image_size", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--image_sizes", type=int, nargs="+", default=[256, 320, 512], help="sizes in pixels (default: 256 320 512)"
    )
    parser.add_argument("--epochs", type=int, default=200, help="epochs of training for each size (default: 200)")
    parser.add_argument("--output", type=Path, default=Path("results/intra_image_size"), help="folder of all results")
    parser.add_argument("--seed", type=int, default=0, help="seed of each training (default: 0)")
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Train the sizes, print their losses and the choice, and write its config.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Returns:
        int: The chosen image size, in pixels.

    Raises:
        ValueError: If a size does not fit the model, or ``--output`` holds trainings with other settings.
    """
    options, further = build_parser().parse_known_args(args)
    sizes = sorted(set(options.image_sizes))
    arguments = {size: ["--model", "InTra", *further, f"--model.image_size={size}"] for size in sizes}
    configs = {size: read_config(arguments[size]) for size in sizes}
    settings = {size: {**configs[size], "epochs": options.epochs, "seed": options.seed} for size in sizes}
    for size in sizes:  # refused before hours of training, not after
        check_settings(options.output / str(size), settings[size])

    def loss_of(size: int) -> float:
        folder = options.output / str(size)
        run = partial(train_size, arguments[size], options.epochs, folder, options.seed)
        return best_held_out_loss(run_once(folder, settings[size], run)["held_out_losses"])

    chosen, losses = choose(sizes, loss_of)
    print("image size  held-out loss")
    for size, loss in losses.items():
        print(f"{size:>10}  {loss:.6f}{'  <- chosen' if size == chosen else ''}")
    path = options.output / "intra.yaml"
    write_whole(path, yaml.safe_dump(configs[chosen], sort_keys=False).encode())
    print(f"anomalib train --config {path}")
    return chosen


if __name__ == "__main__":
    main(sys.argv[1:])
