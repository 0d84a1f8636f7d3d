# SPDX-License-Identifier: Apache-2.0

"""How time and memory of the models grow with the images, with their number, and with the bank of normal features.

``python -m benchmarks.scale --output scale``

1. ``image_size``: time to score an image, and the extra memory at the peak, over the side of the image.
2. ``num_images``: time of a fit of one epoch, from its start to the finished model, and the extra memory at its peak,
   over the number of training images.
3. ``bank``: time to find the nearest vectors of an image's 32 x 32 cells over the size of the bank, for PatchAE and
   for anomalib's PatchCore.

Small networks by default, with random weights (``--backbone`` chooses another), on noise, in fp32. Features are kept in
up to 0.1 GiB, and PatchAE's bank is selected from 20 000 of them, so that many images need no more memory than few. By
default, models keep features in 2 or 4 GiB, and PatchAE selects from all. Times are CPU seconds, in one thread unless
told otherwise; they hold on a machine that others use. Linux only. Writes the figures of each part as JSON and its plot
as PNG, under the name of the part.
"""

import argparse
import ctypes
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning import seed_everything
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from anomalib_recon import models
from anomalib_recon.files import write_whole
from anomalib_recon.models.patch_ae.normal_bank import NormalBank
from benchmarks.feature_cache import write_pictures
from benchmarks.patch_ae_search import GRID, build_patchcore, extra_memory

# as the recommended recipes have them
DISTANCE = {"feature_scale": "whiten", "distance": "mahalanobis"}
CACHE = {"feature_cache_gib": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "InTra": {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "windows_per_image": 10}
    | {"readout": "token", "covered_per_window": 9},
    "FeatureInpainting": CACHE,
    "ADTR": {"embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_dim": 128} | DISTANCE | CACHE,
    "SAAE": {"feature_stride": 16, "latent_dim": 20} | DISTANCE | CACHE,
    "PatchAE": {"embed_dim": 64, "coreset_ratio": 0.05, "coreset_candidates": 20_000},
}
PARTS = ("image_size", "num_images", "bank")
BANK_SIZE = 10_000
# of the bank whose size varies
WIDTH = 512


def build(name: str, image_size: int, backbone: str) -> AnomalibModule:
    seed_everything(0, verbose=False)
    arguments: dict[str, Any] = {**MODELS[name], "image_size": image_size, "visualizer": False}
    if name != "InTra":
        arguments |= {"backbone": backbone, "pre_trained": False}
    module = getattr(models, name)(**arguments)
    # what training would do
    if name == "PatchAE":
        module.model.bank.fill(torch.rand(BANK_SIZE, MODELS[name]["embed_dim"]))
    elif name == "FeatureInpainting":
        module.model.fit([module.model.backbone(torch.rand(4, 3, image_size, image_size))])
    return module


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def score_one(name: str, image_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Score an image; ``extra_mib`` is the peak over what is held before, in the first time."""
    model: Any = build(name, image_size, args.backbone).model.eval()
    image = torch.rand(1, 3, image_size, image_size)
    ctypes.CDLL(None).malloc_trim(0)  # memory of earlier rows would not be counted when it is used again
    with torch.inference_mode():
        extra = extra_memory(lambda: model(image))
        times = [cpu_seconds(lambda: model(image)) for _ in range(args.turns)]
    return {"model": name, "x": image_size, "extra_mib": round(extra), "seconds": statistics.median(times)}


def train(name: str, num_images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Fit a model for one epoch; ``extra_mib`` is the peak over what is held before."""
    with TemporaryDirectory() as folder:
        write_pictures(Path(folder) / "good", num_images, args.train_size)
        datamodule = Folder(
            name="noise", root=folder, normal_dir="good", normal_test_dir="good", train_batch_size=16, num_workers=0
        )
        engine = Engine(
            default_root_dir=folder, max_epochs=1, accelerator="cpu", limit_val_batches=0, logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model = build(name, args.train_size, args.backbone)
        ctypes.CDLL(None).malloc_trim(0)
        start = time.process_time()
        extra = extra_memory(lambda: engine.fit(model, datamodule=datamodule))
        return {"model": name, "x": num_images, "extra_mib": round(extra), "seconds": time.process_time() - start}


@torch.inference_mode()
def search(num_vectors: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    vectors, features = torch.randn(num_vectors, WIDTH), torch.randn(1, WIDTH, *GRID)
    bank = NormalBank(vectors_per_chunk=4096)
    bank.fill(vectors)
    searches = {"PatchAE": bank, "PatchCore": build_patchcore(vectors)}
    turns = [{name: cpu_seconds(lambda s=s: s(features)) for name, s in searches.items()} for _ in range(args.turns)]
    return [
        {"model": name, "x": num_vectors, "seconds": statistics.median(turn[name] for turn in turns)}
        for name in searches
    ]


def plot(path: Path, rows: list[dict[str, Any]], x_label: str, y_labels: dict[str, str]) -> None:
    """Draw a line for each model; a panel for each key in ``y_labels``, of which seconds are logarithmic."""
    figure = Figure(figsize=(3.6 * len(y_labels) + 1.4, 2.7), layout="constrained")
    for axes, (key, y_label) in zip(figure.subplots(1, len(y_labels), squeeze=False)[0], y_labels.items(), strict=True):
        for name in dict.fromkeys(row["model"] for row in rows):
            points = [(row["x"], row[key]) for row in rows if row["model"] == name]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
        axes.set(yscale="log") if key == "seconds" else axes.set(ylim=(0, None))
        axes.set_xticks(sorted({row["x"] for row in rows}), minor=False)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--backbone", default="resnet18", help="CNN of timm for all but InTra")
    parser.add_argument("--image_sizes", type=int, nargs="+", default=[128, 256, 384, 512])
    parser.add_argument("--num_images", type=int, nargs="+", default=[1250, 2500, 5000, 10_000])
    parser.add_argument("--train_size", type=int, default=64, help="side of the training images, in pixels")
    parser.add_argument("--bank_sizes", type=int, nargs="+", default=[1000, 3000, 10_000, 30_000, 100_000])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    parts: dict[str, tuple[Callable[[], Iterable[dict[str, Any]]], str, dict[str, str]]] = {
        "image_size": (
            lambda: (score_one(name, size, args) for name in args.models for size in args.image_sizes),
            "side of the image, pixels",
            {"seconds": "CPU seconds per image", "extra_mib": "extra memory, MiB"},
        ),
        "num_images": (
            lambda: (train(name, count, args) for name in args.models for count in args.num_images),
            "training images",
            {"seconds": "CPU seconds of a fit", "extra_mib": "extra memory, MiB"},
        ),
        "bank": (
            lambda: (row for size in args.bank_sizes for row in search(size, args)),
            "vectors in the bank",
            {"seconds": "CPU seconds per image"},
        ),
    }
    for name in args.parts:
        measure, x_label, y_labels = parts[name]
        rows = []
        for row in measure():
            print(json.dumps(row), flush=True)
            rows.append(row)
        figures = {
            "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
            "arguments": {key: str(value) for key, value in vars(args).items()},
            "rows": rows,
        }
        write_whole(args.output / f"{name}.json", json.dumps(figures, indent=2).encode())
        plot(args.output / f"{name}.png", rows, x_label, y_labels)


if __name__ == "__main__":
    main()
