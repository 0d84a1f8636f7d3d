# SPDX-License-Identifier: Apache-2.0

"""Choose the image size of InTra by the rule of section 4.1.

Each candidate size is trained, and the best held-out losses (averaged over the five epochs before and after) are
compared: the next larger size is taken only while it is better by at least 1e-4.

Example:
    ``python -m anomalib_recon.experiments.image_size --data MVTecAD --data.category screw``

    prints the table of losses and writes a config for ``anomalib train --config``. All arguments of ``anomalib train``
    for model, data and trainer are accepted. The same command continues an interrupted run.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
from lightning.pytorch import Trainer, seed_everything

from anomalib_recon.files import write_whole
from anomalib_recon.models import InTra

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


def next_is_better(loss: float, next_loss: float) -> bool:
    """Whether the loss of the next larger size is lower by at least ``MIN_IMPROVEMENT``."""
    return loss - next_loss >= MIN_IMPROVEMENT


def held_out_losses(config: Namespace, parser: ArgumentParser, image_size: int) -> list[float]:
    """Train one size, or read the losses of an earlier run that has finished it.

    Args:
        config (Namespace): Parsed arguments.
        parser (ArgumentParser): The parser that made them.
        image_size (int): Height and width, in pixels.

    Returns:
        list[float]: Held-out loss of each epoch.
    """
    folder = Path(config.output) / str(image_size)
    result = folder / "held_out_losses.json"
    if result.exists():
        return json.loads(result.read_text())

    seed_everything(config.seed_everything)
    objects = parser.instantiate_classes(with_image_size(config, image_size, patience=config.epochs))
    trainer_arguments = {key: value for key, value in objects.trainer.items() if value is not None}
    # the rule needs no thresholds
    trainer_arguments |= {"max_epochs": config.epochs, "limit_val_batches": 0, "default_root_dir": folder}
    checkpoints = sorted(folder.rglob("model.ckpt"), key=os.path.getmtime)
    engine = Engine(**trainer_arguments)
    engine.fit(objects.model, datamodule=objects.data, ckpt_path=checkpoints[-1] if checkpoints else None)

    write_whole(result, json.dumps(objects.model.held_out_losses).encode())
    return objects.model.held_out_losses


def with_image_size(config: Namespace, image_size: int, **init_args: int) -> Namespace:
    """Copy of the arguments with the image size, and other arguments, of the model set."""
    config = config.clone()
    config.model.init_args.update(Namespace(image_size=image_size, **init_args))
    return config


def build_parser() -> ArgumentParser:
    """Parser of the command."""
    parser = ArgumentParser(description="Choose the image size of InTra by its held-out loss.")
    parser.add_argument("-c", "--config", action=ActionConfigFile, help="Config file, as of `anomalib train`.")
    parser.add_argument("--image_sizes", type=list[int], default=[256, 320, 512], help="Candidate sizes, in pixels.")
    parser.add_argument("--epochs", type=int, default=200, help="Epochs of training for each size.")
    parser.add_argument("--output", type=Path, default=Path("results/intra_image_size"), help="Folder for all results.")
    parser.add_argument("--seed_everything", type=int, default=42, help="Seed.")
    parser.add_subclass_arguments(InTra, "model", required=False)
    parser.set_defaults(model={"class_path": "anomalib_recon.models.InTra"})
    parser.add_subclass_arguments(AnomalibDataModule, "data", required=True)
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, sub_configs=True)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Train the candidate sizes, print their losses and the choice, and write its config.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Returns:
        int: The chosen image size, in pixels.
    """
    parser = build_parser()
    config = parser.parse_args(args)
    sizes = sorted(config.image_sizes)
    for size in sizes:  # a size that does not fit the model is refused before the first is trained
        parser.instantiate_classes(with_image_size(config, size))

    chosen, losses = sizes[0], {}
    for size in sizes:
        losses[size] = best_held_out_loss(held_out_losses(config, parser, size))
        if size != chosen and not next_is_better(losses[chosen], losses[size]):
            break
        chosen = size

    print("image size  held-out loss")
    for size, loss in losses.items():
        print(f"{size:>10}  {loss:.6f}{'  <- chosen' if size == chosen else ''}")
    path = Path(config.output) / "intra.yaml"
    ready = with_image_size(config, chosen)
    for key in ("config", "image_sizes", "epochs", "output"):
        ready.pop(key, None)
    write_whole(path, parser.dump(ready, skip_none=True, skip_default=True, skip_check=True).encode())
    print(f"anomalib train --config {path}")
    return chosen


if __name__ == "__main__":
    main()
