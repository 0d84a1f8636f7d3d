# SPDX-License-Identifier: Apache-2.0

"""Throughput of SAAE's inference against that of its whole backbone.

``python -m benchmarks.saae_inference --threads 2 --latent_dim 200 --output saae_inference.json``

The default ViT-B/16 at 384 x 384 pixels, random weights, fp32. SAAE runs four of its twelve blocks, and the
autoencoder. The two are timed in turns, so that the ratio holds on a machine whose speed drifts. Writes the figures as
JSON and prints them.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch

from anomalib_recon.files import write_whole
from anomalib_recon.layers import BackboneNormalize
from anomalib_recon.models.saae.torch_model import DEFAULT_BACKBONE, DEFAULT_IMAGE_SIZE, SAAEModel


def seconds(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(batch_size: int, latent_dim: int, turns: int, device: torch.device) -> dict[str, float | int]:
    torch.manual_seed(0)
    model = SAAEModel(pre_trained=False, latent_dim=latent_dim).eval().to(device)
    backbone = timm.create_model(DEFAULT_BACKBONE, pretrained=False)
    whole = torch.nn.Sequential(BackboneNormalize(DEFAULT_BACKBONE), backbone).eval().to(device)
    images = torch.rand(batch_size, 3, *DEFAULT_IMAGE_SIZE, device=device)
    with torch.inference_mode():
        # the first turn warms up
        rows = [
            (seconds(lambda: model(images), device), seconds(lambda: whole(images), device)) for _ in range(turns + 1)
        ][1:]
    ours, theirs = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "batch_size": batch_size,
        "latent_dim": latent_dim,
        "frames_per_second": batch_size / ours,
        "frames_per_second_of_the_whole_backbone": batch_size / theirs,
        "ratio": statistics.median(row[1] / row[0] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--latent_dim", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else f"{args.threads} threads"
    figures = {
        "machine": f"{platform.machine()}, {name}, torch {torch.__version__}",
        "image_size": DEFAULT_IMAGE_SIZE,
        "batches": [measure(size, args.latent_dim, args.turns, args.device) for size in args.batch_sizes],
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        write_whole(args.output, text.encode())


if __name__ == "__main__":
    main()
