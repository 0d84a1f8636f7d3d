# SPDX-License-Identifier: Apache-2.0

"""Throughput and memory of InTra's inference: all windows in chunks, against one forward for each patch.

``python tests/benchmarks/intra_inference.py --threads 2 --image_size 256 --output intra_inference.json``

The default network, random weights, fp32, one image. The two are timed in turns with the rate of a large matrix
product, so that the ratios hold on a machine whose speed drifts. Writes the figures as JSON and prints them.
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from anomalib_recon.models.intra.torch_model import InTraModel, TokenLinear

MATRIX_SIZE = 4096


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def inpaint_one(model: InTraModel, patches: torch.Tensor, tokens: torch.Tensor, covered: torch.Tensor) -> torch.Tensor:
    """Inpaint one patch by a forward of its own: embed the window's patches, then block after block.

    This is how InTra is usually written, with PyTorch's linear layers.

    Args:
        model (InTraModel): Network with long residuals, global positions and the mean as readout.
        patches (torch.Tensor): Patches of the image, shape ``(N * M, K * K * 3)``.
        tokens (torch.Tensor): The patches of the window, shape ``(L * L,)``.
        covered (torch.Tensor): The covered one.
    """
    sequence = model.patch_embedding(patches[tokens])
    sequence[covered] = model.inpaint_token
    sequence = (sequence + model.position_embedding[tokens])[None]
    depth, early = len(model.blocks), []
    for index, block in enumerate(model.blocks):
        if index >= depth - depth // 2:
            sequence = sequence + early.pop()
        sequence = block(sequence)
        if index < depth // 2:
            early.append(sequence)
    return model.output(model.head(sequence.mean(dim=1)))


def measure(image_size: int, threads: int, turns: int, patches_timed: int) -> dict[str, float | int | str]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = InTraModel(image_size=(image_size, image_size)).eval()
    image = torch.rand(1, 3, image_size, image_size)
    matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE)
    num_windows = len(model.tokens)
    patches = model.patchify(image)[0]
    usual = copy.deepcopy(model)
    for module in usual.modules():
        if isinstance(module, TokenLinear):
            module.__class__ = torch.nn.Linear

    def one_by_one() -> None:
        for tokens, covered in zip(model.tokens[:patches_timed], model.covered[:patches_timed], strict=True):
            inpaint_one(usual, patches, tokens, covered)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            inpaint_one(usual, patches, model.tokens[0], model.covered[0])
        flops = counter.get_total_flops()
        model.reconstruct(image)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        one_by_one()
        rows = [
            (
                seconds(lambda: model.reconstruct(image)) / num_windows,
                seconds(one_by_one) / patches_timed,
                2 * MATRIX_SIZE**3 / seconds(lambda: matrix @ matrix),
            )
            for _ in range(turns)
        ]
    ours, single, rate = (statistics.median(column) for column in zip(*rows, strict=True))
    return {
        "machine": f"{platform.machine()}, {threads} threads, torch {torch.__version__}",
        "image_size": image_size,
        "windows_per_image": num_windows,
        "ms_per_window": 1e3 * ours,
        "ms_per_window_one_by_one": 1e3 * single,
        "speed_up": statistics.median(row[1] / row[0] for row in rows),
        "matrix_product_gflops": rate / 1e9,
        "share_of_matrix_product_rate": statistics.median(flops / row[0] / row[2] for row in rows),
        "extra_memory_mb": (after - before) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--patches_timed", type=int, default=64)
    parser.add_argument("--output", type=Path)
    args = vars(parser.parse_args())
    output = args.pop("output")
    figures = measure(**args)
    text = json.dumps(figures, indent=2)
    print(text)
    if output:
        output.write_text(text)


if __name__ == "__main__":
    main()
