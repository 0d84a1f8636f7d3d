# SPDX-License-Identifier: Apache-2.0

"""Throughput of InTra's inference: windows in chunks, several patches at a time, and exported to OpenVINO.

``python -m benchmarks.intra_inference --rows plain covered openvino --output intra_inference.json``

The default network, with random weights or those of ``--checkpoint``, in fp32 and for one image at a time. ``plain``
times it beside one forward for each patch and the rate of a large matrix product, ``covered`` beside networks that
inpaint 4 and 9 patches at a time, ``openvino`` beside its exports, whose scores of pictures of DemoAD are compared too.
What is compared is timed in turns, so that the ratios hold on a machine whose speed drifts. Times are CPU seconds of
all threads by the number of threads: those of the clock, but for other work on the machine. Writes the figures as JSON
and prints them.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openvino
import torch
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from lightning import seed_everything
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from anomalib_recon.data import DemoAD
from anomalib_recon.files import write_whole
from anomalib_recon.models import InTra
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.models.intra.transformer import TokenLinear
from benchmarks.patch_ae_search import extra_memory

MATRIX_SIZE = 4096
# the compression of an export, and what OpenVINO is asked for: by default it takes bfloat16 where the CPU has it
EXPORTS: dict[str, tuple[CompressionType | None, dict[str, str]]] = {
    "fp32": (None, {"INFERENCE_PRECISION_HINT": "f32"}),
    "default": (None, {}),
    "int8": (CompressionType.INT8, {}),
    "int8_ptq": (CompressionType.INT8_PTQ, {}),
}


def clock() -> float:
    """Seconds, as if nothing else ran on the machine."""
    return time.process_time() / torch.get_num_threads()


def seconds(function: Callable[[], object]) -> float:
    start = clock()
    function()
    return clock() - start


def time_in_turns(functions: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of each function in each turn, after one to warm up."""
    rows = [[seconds(function) for function in functions.values()] for _ in range(turns + 1)][1:]
    return {name: list(column) for name, column in zip(functions, zip(*rows, strict=True), strict=True)}


def ratio(slow: list[float], fast: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(slow, fast, strict=True))


def with_usual_layers(model: InTraModel) -> InTraModel:
    """A copy of the network with PyTorch's linear layers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, TokenLinear):
            module.__class__ = torch.nn.Linear
    return model


def measure_plain(intra: InTra, image: Tensor, turns: int, patches_timed: int) -> dict[str, float]:
    model = intra.model
    matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE)
    num_windows = len(model.places)
    patches = model.embed(image)
    usual = with_usual_layers(model)
    extra = extra_memory(lambda: model.reconstruct(patches))
    windows = zip(patches[0, model.places], model.places, model.covered, strict=True)
    single = [tuple(part[None] for part in window) for window in windows][:patches_timed]
    with FlopCounterMode(display=False) as counter:
        usual.inpaint(*single[0])

    def one_by_one() -> None:
        for window in single:
            usual.inpaint(*window)

    times = time_in_turns(
        {"ours": lambda: model.reconstruct(patches), "single": one_by_one, "product": lambda: matrix @ matrix}, turns
    )
    flops = counter.get_total_flops() * num_windows
    return {
        "windows_per_image": num_windows,
        "ms_per_window": 1e3 * statistics.median(times["ours"]) / num_windows,
        "ms_per_window_one_by_one": 1e3 * statistics.median(times["single"]) / patches_timed,
        "speed_up": ratio(times["single"], times["ours"]) * num_windows / patches_timed,
        "matrix_product_gflops": 2 * MATRIX_SIZE**3 / statistics.median(times["product"]) / 1e9,
        "share_of_matrix_product_rate": ratio(times["product"], times["ours"]) * flops / (2 * MATRIX_SIZE**3),
        "extra_memory_mib": extra,
    }


def measure_covered(image: Tensor, turns: int) -> dict[str, dict[str, float]]:
    """Networks of random weights: the time is not that of the weights."""
    models = {
        str(count): InTraModel(tuple(image.shape[2:]), readout="token", covered_per_window=count) for count in (1, 4, 9)
    }
    functions = {name: lambda model=model: model(image) for name, model in models.items()}
    times = time_in_turns(functions, turns)
    return {
        name: {"windows": len(model.places), "times_as_fast": ratio(times["1"], times[name])}
        for name, model in models.items()
    }


def measure_openvino(
    intra: InTra, image: Tensor, turns: int, threads: int, num_pictures: int
) -> dict[str, dict[str, float]]:
    """Exports beside the network in torch, and by how much their raw scores deviate at most, in proportion."""
    datamodule = DemoAD(eval_batch_size=1)
    datamodule.setup("fit")
    count = len(datamodule.val_data)
    datamodule.val_data = datamodule.val_data.subsample(range(0, count, count // num_pictures))
    pictures = [item.image[None] for item in datamodule.val_data]
    core, paths, compiled = openvino.Core(), {}, {}
    with TemporaryDirectory() as folder:
        for name, (compression, config) in EXPORTS.items():
            if compression not in paths:
                paths[compression] = Engine(default_root_dir=folder, accelerator="cpu").export(
                    intra, ExportType.OPENVINO, export_root=Path(folder) / name, compression_type=compression,
                    datamodule=datamodule,
                )  # fmt: skip
            threads_too = config | {"INFERENCE_NUM_THREADS": str(threads)}
            compiled[name] = core.compile_model(paths[compression], "CPU", threads_too)
    intra.eval()
    scores = np.array([float(intra(picture).pred_score) for picture in pictures])
    functions = {"torch, fp32": lambda: intra(image)}
    functions |= {name: lambda model=model: model(image.numpy()) for name, model in compiled.items()}
    times = time_in_turns(functions, turns)
    figures = {}
    for name, model in compiled.items():
        exported = np.array([model(picture.numpy())["pred_score"].item() for picture in pictures])
        figures[name] = {
            "times_as_fast": ratio(times["torch, fp32"], times[name]),
            "largest_deviation": float(np.abs(exported / scores - 1).max()),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=["plain", "covered", "openvino"], default=["plain"])
    parser.add_argument("--checkpoint", type=Path, help="of InTra, with the mean as readout")
    parser.add_argument("--image_size", type=int, default=256, help="without a checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--patches_timed", type=int, default=64, help="one by one")
    parser.add_argument("--num_pictures", type=int, default=8, help="to calibrate with and to compare scores")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seed_everything(0)
    # raw scores are compared
    arguments: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    if args.checkpoint:
        intra = InTra.load_from_checkpoint(args.checkpoint, strict=False, **arguments).eval()
    else:
        intra = InTra(image_size=args.image_size, **arguments).eval()
    image = torch.rand(1, 3, *intra.model.image_size)
    figures: dict[str, Any] = {
        "machine": f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}",
        "arguments": {name: str(value) for name, value in vars(args).items()},
    }
    with torch.no_grad():
        if "plain" in args.rows:
            figures["plain"] = measure_plain(intra, image, args.turns, args.patches_timed)
        if "covered" in args.rows:
            figures["covered"] = measure_covered(image, args.turns)
        if "openvino" in args.rows:
            figures["openvino"] = measure_openvino(intra, image, args.turns, args.threads, args.num_pictures)
    text = json.dumps(figures, indent=2)
    print(text)
    if args.output:
        write_whole(args.output, text.encode())


if __name__ == "__main__":
    main()
