# SPDX-License-Identifier: Apache-2.0

"""Time and peak memory of PatchAE's nearest-neighbour search, against that of anomalib's PatchCore.

``python -m benchmarks.patch_ae_search --vectors 100000 --chunks 1024 4096 100000 --output patch_ae_search.json``

The bank is random, of PatchAE's default width, and the queries are the grids of images of 256 x 256 pixels. Each row
has a process of its own: PatchAE in torch and in OpenVINO for each number of vectors in a chunk, and PatchCore's
``nearest_neighbors``. The extra memory is the peak of the first search over what was held before. Then the rows are
timed in turns, in CPU seconds of one thread unless told otherwise; they hold on a machine that others use. All in fp32.
Linux only. Prints a Markdown table and writes the figures as JSON.
"""

import argparse
import functools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import openvino
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel

from anomalib_recon.files import write_whole
from anomalib_recon.models.export import OPSET_VERSION
from anomalib_recon.models.patch_ae.normal_bank import NormalBank

GRID = (32, 32)
RUNTIMES = ("torch", "openvino", "patchcore")


def memory(name: str) -> float:
    """Memory of this process in MiB: ``VmRSS`` for now, ``VmHWM`` for its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def extra_memory(function: Callable[[], object]) -> float:
    """Peak memory in MiB while a function runs, over what was held before."""
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    function()
    return memory("VmHWM") - before


def compile_for_openvino(bank: NormalBank, features: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.onnx"
        shapes = {"features": {0: torch.export.Dim.DYNAMIC}}
        torch.onnx.export(
            bank, (features[:1].expand(2, -1, -1, -1),), path, opset_version=OPSET_VERSION, dynamic_shapes=shapes
        )
        compiled = openvino.Core().compile_model(
            path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        )
    return lambda features: compiled(features.numpy())[0]


def build_patchcore(vectors: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    model = PatchcoreModel(layers=["layer1"], backbone="resnet18", pre_trained=False)
    model.memory_bank = vectors
    return lambda features: model.nearest_neighbors(model.reshape_embedding(features), n_neighbors=1)


@functools.cache
def prepare(
    runtime: str, chunk: int, num_vectors: int, width: int, num_images: int, threads: int
) -> Callable[[], object]:
    """Build what is to be measured, once in a process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    vectors, features = torch.randn(num_vectors, width), torch.randn(num_images, width, *GRID)
    if runtime == "patchcore":
        search = build_patchcore(vectors)
    else:
        bank = NormalBank(chunk).eval()
        bank.fill(vectors)
        search = bank if runtime == "torch" else compile_for_openvino(bank, features)
    return lambda: search(features)


@torch.no_grad()
def measure_memory(*row: Any) -> float:
    return extra_memory(prepare(*row))


@torch.no_grad()
def measure_seconds(*row: Any) -> float:
    search = prepare(*row)
    start = time.process_time()
    search()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--images", type=int, default=1, help="in a batch")
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 4096, 100_000])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=list(RUNTIMES))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    keys = [(runtime, chunk) for runtime in args.runtimes if runtime != "patchcore" for chunk in args.chunks]
    keys += [("patchcore", 0)] if "patchcore" in args.runtimes else []

    setting = (args.vectors, args.width, args.images, args.threads)

    with ExitStack() as stack:
        processes = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in keys]
        rows: list[dict[str, Any]] = []
        for process, (runtime, chunk) in zip(processes, keys, strict=True):
            extra = process.submit(measure_memory, runtime, chunk, *setting).result()
            rows.append({"runtime": runtime, "vectors_per_chunk": chunk, "extra_mib": round(extra), "turns": []})
        for _ in range(args.turns):
            for process, key, row in zip(processes, keys, rows, strict=True):
                row["turns"].append(process.submit(measure_seconds, *key, *setting).result())

    print("| runtime | `vectors_per_chunk` | extra MiB | CPU seconds |\n|---|---|---|---|")
    for row in rows:
        row["seconds"] = statistics.median(row["turns"])
        print(f"| {row['runtime']} | {row['vectors_per_chunk'] or ''} | {row['extra_mib']} | {row['seconds']:.2f} |")
    if args.output:
        machine = f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}"
        arguments = {name: str(value) for name, value in vars(args).items()}
        figures = {"machine": machine, "arguments": arguments, "rows": rows}
        write_whole(args.output, json.dumps(figures, indent=2).encode())


if __name__ == "__main__":
    main()
