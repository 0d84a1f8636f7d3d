# SPDX-License-Identifier: Apache-2.0

"""Time of a training step of PatchAE by precision and by the memory format of its backbone.

``python -m benchmarks.patch_ae_training --backbones densenet169 resnet18 --output patch_ae_training.json``

Random weights and images; a step is what follows the artificial defects: network, loss, gradients, optimiser. All four
rows of a backbone are timed in turns, in CPU seconds of one thread unless told otherwise; they hold on a machine that
others use. Prints a Markdown table of medians and writes the figures as JSON.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from anomalib_recon.files import write_whole
from anomalib_recon.models import PatchAE

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def build_step(backbone: str, precision: str, memory_format: str, args: argparse.Namespace) -> Callable[[], float]:
    """A training step; the result is its loss."""
    torch.manual_seed(0)
    module = PatchAE(
        backbone=backbone, pre_trained=False, image_size=args.image_size, trained_stages=args.trained_stages,
        visualizer=False,
    )  # fmt: skip
    module.model.backbone.to(memory_format=FORMATS[memory_format])
    optimizer = module.configure_optimizers()
    images = torch.rand(args.batch_size, 3, args.image_size, args.image_size)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            reconstruction = module.model.reconstruct(module.model.embed(images))
        loss = module.loss(images, reconstruction)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def measure(backbone: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    keys = [(precision, memory_format) for precision in ("32", "bf16-mixed") for memory_format in FORMATS]
    steps = [build_step(backbone, *key, args) for key in keys]
    rows: list[dict[str, Any]] = [
        {"backbone": backbone, "precision": precision, "memory_format": memory_format, "losses": [], "turns": []}
        for precision, memory_format in keys
    ]
    for _ in range(args.turns + 1):
        for step, row in zip(steps, rows, strict=True):
            start = time.process_time()
            row["losses"].append(step())
            row["turns"].append(time.process_time() - start)
    for row in rows:
        row["seconds"] = statistics.median(row["turns"][1:])  # the first turn warms up
        speed_up = rows[0]["seconds"] / row["seconds"]
        print(f"| {backbone} | {row['precision']} | {row['memory_format']} | {row['seconds']:.2f} | {speed_up:.2f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["densenet169", "resnet18"])
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--trained_stages", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("| backbone | precision | memory format | CPU seconds per step | speed-up |\n|---|---|---|---|---|")
    figures = {
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "arguments": {name: str(value) for name, value in vars(args).items()},
        "rows": [row for backbone in args.backbones for row in measure(backbone, args)],
    }
    if args.output:
        write_whole(args.output, json.dumps(figures, indent=2).encode())


if __name__ == "__main__":
    main()
