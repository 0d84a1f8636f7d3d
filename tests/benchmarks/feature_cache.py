# SPDX-License-Identifier: Apache-2.0

"""Time of an epoch of ADTR and SAAE with features computed once, against features computed anew.

``python tests/benchmarks/feature_cache.py --threads 2 --precision 32 bf16-mixed --output feature_cache.json``

The default networks with the paper's batches, 16 images of 256 x 256 pixels for ADTR and 32 of 384 x 384 for SAAE, on
pictures of noise. Without ``--backbone_weights`` the weights are random. Three trainings are timed:

- ``usual``: features anew, and validation after each epoch, as anomalib trains a model that asks for nothing else;
- ``anew``: features anew, and validation once, at the end, as with ``feature_cache_gib=0``;
- ``once``: the default.

An epoch is all that ``Engine.fit`` does from its start to that of the next one, checkpoints included. The first epoch,
which fills the cache, is left out, and the last one, which nothing follows. CPU seconds are those of all threads, but
not of worker processes; they hold on a machine that others use. Prints the figures and writes them as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from anomalib_recon.models.components import ValidationAtEnd
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torchvision.io import encode_png, write_file

from anomalib_recon.files import write_whole
from anomalib_recon.models import ADTR, SAAE

MODELS: dict[str, type[ADTR | SAAE]] = {"ADTR": ADTR, "SAAE": SAAE}
BATCH_SIZES = {"ADTR": 16, "SAAE": 32}


class EpochTimer(Callback):
    """Notes wall and CPU seconds from the start of each epoch to that of the next one."""

    def __init__(self) -> None:
        self._starts: list[tuple[float, float]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._starts.append((time.perf_counter(), time.process_time()))

    @property
    def seconds(self) -> dict[str, list[float]]:
        wall, cpu = zip(*self._starts, strict=True)
        return {
            name: [end - start for start, end in pairwise(times)] for name, times in {"wall": wall, "cpu": cpu}.items()
        }


def write_pictures(folder: Path, count: int, side: int) -> None:
    """Write square RGB pictures of noise."""
    folder.mkdir(parents=True)
    for index in range(count):
        write_file(str(folder / f"{index:03d}.png"), encode_png(torch.randint(256, (3, side, side), dtype=torch.uint8)))


def write_masks(folder: Path, count: int, side: int) -> None:
    """Write masks with an anomalous square in the middle."""
    folder.mkdir(parents=True)
    mask = torch.zeros(1, side, side, dtype=torch.uint8)
    mask[:, side // 3 : side // 2, side // 3 : side // 2] = 255
    for index in range(count):
        write_file(str(folder / f"{index:03d}.png"), encode_png(mask))


def validate_after_each_epoch(model: AnomalibModule) -> None:
    callbacks = [part for part in model.configure_callbacks() if not isinstance(part, ValidationAtEnd)]
    model.configure_callbacks = lambda: callbacks


def time_epochs(name: str, training: str, precision: str, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Train; the results are the seconds of the epochs but the last, the first one first."""
    seed_everything(0)
    arguments: dict[str, Any] = {"pre_trained": False, "visualizer": False}
    if training != "once":
        arguments["feature_cache_gib"] = 0
    if args.backbone:
        arguments["backbone"] = args.backbone
    if args.backbone_weights:
        arguments["backbone_weights"] = args.backbone_weights
    if name == "SAAE":
        arguments["latent_dim"] = args.latent_dim
    model = MODELS[name](**arguments)
    if training == "usual":
        validate_after_each_epoch(model)
    datamodule = Folder(
        name="noise", root=root, normal_dir="good", normal_test_dir="good_test", abnormal_dir="bad_test",
        mask_dir="mask", train_batch_size=BATCH_SIZES[name], num_workers=args.num_workers,
    )  # fmt: skip
    timer = EpochTimer()
    Engine(
        default_root_dir=root / "results", max_epochs=args.epochs, precision=precision, accelerator="cpu",
        callbacks=[timer], enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, datamodule=datamodule)  # fmt: skip
    return timer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--trainings", nargs="+", choices=["usual", "anew", "once"], default=["usual", "anew", "once"])
    parser.add_argument("--precision", nargs="+", default=["32"], help="as the trainer's")
    parser.add_argument("--backbone", help="the model's own if not given")
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--num_images", type=int, default=32, help="for training")
    parser.add_argument("--num_test_images", type=int, default=16, help="for validation, half of them anomalous")
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--latent_dim", type=int, default=200, help="of SAAE")
    parser.add_argument("--epochs", type=int, default=4, help="at least 3")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "rows": [],
    }
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_pictures(root / "good", args.num_images, args.side)
        for name in ("good_test", "bad_test"):
            write_pictures(root / name, args.num_test_images // 2, args.side)
        write_masks(root / "mask", args.num_test_images // 2, args.side)
        for name in args.models:
            for precision in args.precision:
                for training in args.trainings:
                    seconds = time_epochs(name, training, precision, args, root)
                    row = {"model": name, "precision": precision, "training": training, "seconds": seconds}
                    row |= {f"median_{key}": round(statistics.median(values[1:]), 2) for key, values in seconds.items()}
                    figures["rows"].append(row)
                    print(json.dumps(row), flush=True)
                    if args.output:
                        write_whole(args.output, json.dumps(figures, indent=2).encode())
                _print_ratios(figures["rows"][-len(args.trainings) :])


def _print_ratios(rows: list[dict[str, Any]]) -> None:
    """Compare trainings of one model with the last of them."""
    last = rows[-1]
    for row in rows[:-1]:
        ratios = ", ".join(f"{key} {row[f'median_{key}'] / last[f'median_{key}']:.2f}" for key in ("wall", "cpu"))
        print(f"{row['model']}, {row['precision']}: {row['training']} / {last['training']}: {ratios}", flush=True)


if __name__ == "__main__":
    main()
