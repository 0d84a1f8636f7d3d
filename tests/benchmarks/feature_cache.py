# SPDX-License-Identifier: Apache-2.0

"""Time of an epoch of ADTR and SAAE with features computed once, against features computed anew.

``python tests/benchmarks/feature_cache.py --threads 2 --output feature_cache.json``

The default networks with the paper's batches, 16 images of 256 x 256 pixels for ADTR and 32 of 384 x 384 for SAAE, on
pictures of noise, fp32. The first epoch, which fills the cache, is left out of the medians, and so is what anomalib
does between epochs. Without ``--backbone_weights`` the weights are random. CPU seconds are those of all threads, but
not of worker processes; they hold on a machine that others use. Writes the figures as JSON and prints them.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torchvision.io import encode_png, write_file

from anomalib_recon.models import ADTR, SAAE

MODELS: dict[str, type[ADTR | SAAE]] = {"ADTR": ADTR, "SAAE": SAAE}
BATCH_SIZES = {"ADTR": 16, "SAAE": 32}


class EpochTimer(Callback):
    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._start = time.perf_counter(), time.process_time()

    # after the last batch, and before checkpoints are written
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.is_last_batch:
            self.wall.append(time.perf_counter() - self._start[0])
            self.cpu.append(time.process_time() - self._start[1])


def write_pictures(folder: Path, count: int, side: int) -> None:
    folder.mkdir(parents=True)
    for index in range(count):
        write_file(str(folder / f"{index:03d}.png"), encode_png(torch.randint(256, (3, side, side), dtype=torch.uint8)))


def time_epochs(name: str, gib: float, args: argparse.Namespace, root: Path) -> dict[str, list[float]]:
    """Train; the results are the seconds of the epochs, the first one first."""
    seed_everything(0)
    arguments: dict[str, Any] = {"feature_cache_gib": gib, "pre_trained": False, "visualizer": False}
    if args.backbone:
        arguments["backbone"] = args.backbone
    if args.backbone_weights:
        arguments["backbone_weights"] = args.backbone_weights
    if name == "SAAE":
        arguments["latent_dim"] = args.latent_dim
    datamodule = Folder(
        name="noise", root=root, normal_dir="good", normal_test_dir="good",
        train_batch_size=BATCH_SIZES[name], num_workers=args.num_workers,
    )  # fmt: skip
    timer = EpochTimer()
    Engine(
        default_root_dir=root / "results", max_epochs=args.epochs, limit_val_batches=0, callbacks=[timer],
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(MODELS[name](**arguments), datamodule=datamodule)  # fmt: skip
    return {"wall": timer.wall, "cpu": timer.cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backbone", help="the model's own if not given")
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--num_images", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--latent_dim", type=int, default=200, help="of SAAE")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--feature_cache_gib", type=float, default=2.0)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    with TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "good", args.num_images, args.side)
        for name in args.models:
            anew, once = (time_epochs(name, gib, args, Path(folder)) for gib in (0.0, args.feature_cache_gib))
            ratios = {key: statistics.median(anew[key][1:]) / statistics.median(once[key][1:]) for key in anew}
            figures[name] = {"seconds_anew": anew, "seconds_once": once, "ratios": ratios}
            print(name, json.dumps(figures[name]), flush=True)
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
