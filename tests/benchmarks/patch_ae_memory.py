# SPDX-License-Identifier: Apache-2.0

"""Peak memory and time of PatchAE's nearest-neighbour search over the size of its chunks, in torch and OpenVINO.

``python tests/benchmarks/patch_ae_memory.py --vectors 100000 --chunks 1024 4096 100000 --output patch_ae_memory.json``

The bank is random, of the default width, and the queries are the grid of one image of 256 x 256 pixels. The extra
memory is the peak while one image is scored over what was held before, in a process of its own for each row, in fp32.
Linux only. Writes the figures as JSON and prints them as a Markdown table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openvino
import torch

from anomalib_recon.models.components.export import OPSET_VERSION
from anomalib_recon.models.patch_ae.normal_bank import NormalBank

GRID = (32, 32)


def memory(name: str) -> float:
    """Memory of this process in MiB: ``VmRSS`` for now, ``VmHWM`` for its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def compile_for_openvino(bank: NormalBank, features: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bank.onnx"
        shapes = {"features": {0: torch.export.Dim.DYNAMIC}}
        torch.onnx.export(
            bank, (features.expand(2, -1, -1, -1),), path, opset_version=OPSET_VERSION, dynamic_shapes=shapes
        )
        compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda features: compiled(features.numpy())[0]


def measure(runtime: str, vectors: int, width: int, chunk: int) -> dict[str, Any]:
    """Score one image in this process."""
    torch.manual_seed(0)
    bank = NormalBank(chunk).eval()
    bank.fill(torch.randn(vectors, width))
    features = torch.randn(1, width, *GRID)
    score = bank if runtime == "torch" else compile_for_openvino(bank, features)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.perf_counter()
    score(features)
    seconds = time.perf_counter() - start
    return {
        "runtime": runtime,
        "vectors_per_chunk": chunk,
        "held_mib": round(before),
        "extra_mib": round(memory("VmHWM") - before),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1024, 4096, 16384, 100_000])
    parser.add_argument("--runtimes", nargs="+", choices=["torch", "openvino"], default=["torch", "openvino"])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", action="store_true", help="measure the first row in this process and print it")
    arguments = parser.parse_args()
    if arguments.one:
        row = measure(arguments.runtimes[0], arguments.vectors, arguments.width, arguments.chunks[0])
        print(json.dumps(row))
        return

    rows = []
    for runtime in arguments.runtimes:
        for chunk in arguments.chunks:
            options = {"vectors": arguments.vectors, "width": arguments.width, "chunks": chunk, "runtimes": runtime}
            command = [sys.executable, __file__, "--one", *(f"--{name}={value}" for name, value in options.items())]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append(json.loads(output.splitlines()[-1]))
            print(rows[-1], flush=True)
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
