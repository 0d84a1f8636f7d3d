# SPDX-License-Identifier: Apache-2.0

"""A training step of attention in bfloat16: ours against torch's.

``python -m benchmarks.attention --output attention.json``

Times a forward and backward pass at the shapes of the models, in milliseconds: the median over ``--turns``, the two in
alternation. Writes the figures as JSON and prints them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from anomalib_recon.files import write_whole
from anomalib_recon.layers import attend

# (B, heads, T, d)
SHAPES = {
    "ADTR, the paper's": (16, 8, 256, 32),
    "ADTR, 512 pixels": (4, 8, 1024, 32),
    "SAAE, 384 pixels, V = 20": (32, 3, 576, 7),
    "SAAE, recommended": (16, 4, 256, 16),
}


def milliseconds(attention: Callable[[Tensor, Tensor, Tensor], Tensor], parts: list[Tensor]) -> float:
    """Time of a forward and backward pass."""
    start = time.perf_counter()
    mixed = attention(*parts)
    mixed.backward(torch.ones_like(mixed))
    return 1000 * (time.perf_counter() - start)


def measure(shape: tuple[int, ...], turns: int) -> dict[str, float]:
    parts = [torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    times: dict[str, list[float]] = {"torch": [], "ours": []}
    for _ in range(turns + 1):  # the first turn warms up
        times["torch"].append(milliseconds(functional.scaled_dot_product_attention, parts))
        times["ours"].append(milliseconds(attend, parts))
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {f"{name}, ms": round(value, 1) for name, value in medians.items()} | {
        "times as fast": round(medians["torch"] / medians["ours"], 2)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    figures = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        **{name: measure(shape, args.turns) for name, shape in SHAPES.items()},
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        write_whole(args.output, text.encode())


if __name__ == "__main__":
    main()
