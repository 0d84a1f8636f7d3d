# SPDX-License-Identifier: Apache-2.0

"""Time to score an image, and to export and load the model, beside the backbone alone and anomalib's models.

``python -m benchmarks.scoring --output results/scoring``

The recommended networks with random weights on 256 pixels, PatchCore on the two stages that PatchAE takes, with banks
of 1 and 10 % of 250 images, and EfficientAD-S and Dinomaly (on ViT-Ti/16) as they come. The time of a network does not
depend on what it has learned. ``backbone`` is that of all but the last two, up to the last stage they take. Each format
is timed in turns with it. Prints tables and writes the figures as JSON.
"""

import argparse
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pandas as pd
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, EfficientAd, Patchcore
from torch import Tensor, nn

from anomalib_recon.files import write_whole
from anomalib_recon.layers import FrozenBackbone

from .dinomaly import build_dinomaly
from .time_to_model import BACKBONE, CONFIGS, LAYERS, build_own

SIZE = (256, 256)
NUM_IMAGES, CELLS = 250, 1024
OTHER_NETWORKS: dict[str, Callable[[], AnomalibModule]] = {
    "EfficientAD-S": lambda: EfficientAd(visualizer=False),
    "Dinomaly, ViT-Ti": lambda: build_dinomaly(None, SIZE[0]),
}
BANKS = {"PatchCore, 1 %": 0.01, "PatchCore, 10 %": 0.1}
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class Backbone(nn.Module):
    """The backbone up to the last stage."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = FrozenBackbone(BACKBONE, LAYERS, pre_trained=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute the stages of images of shape ``(B, 3, H, W)``."""
        return tuple(self.backbone(images))


def build(name: str) -> AnomalibModule:
    """Build a model that can score, with random weights."""
    torch.manual_seed(0)
    if name in OTHER_NETWORKS:
        return OTHER_NETWORKS[name]().eval()
    if name in BANKS:
        model = Patchcore(BACKBONE, LAYERS[1:], pre_trained=False, visualizer=False)
        channels = sum(model.model.feature_extractor.out_dims)
        model.model.memory_bank = torch.rand(int(BANKS[name] * NUM_IMAGES * CELLS), channels)
        return model.eval()
    model = build_own(name, pre_trained=False)[0].eval()
    with torch.no_grad():
        if name.startswith("FeatureInpainting"):
            model.model.fit([model.model.backbone(torch.rand(4, 3, *SIZE))])
        elif name == "PatchAE":
            codes = model.model.embed(torch.rand(1, 3, *SIZE))
            num_vectors = int(model.hparams["coreset_ratio"] * NUM_IMAGES * CELLS)
            model.model.bank.fill(torch.rand(num_vectors, codes.shape[1]))
    return model


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(run: Callable[[], object], backbone: Callable[[], object], turns: int) -> tuple[float, float]:
    """Median milliseconds, and the median ratio to the backbone's in the same turn."""
    rows = [(seconds(run), seconds(backbone)) for _ in range(turns + 1)][1:]  # the first turn warms up
    return 1000 * statistics.median(ours for ours, _ in rows), statistics.median(ours / other for ours, other in rows)


def in_torch(module: nn.Module, images: np.ndarray) -> Callable[[], object]:
    tensor = torch.from_numpy(images)

    def run() -> object:
        with torch.inference_mode():
            return module(tensor)

    return run


def in_openvino(model: openvino.Model, precision: str, images: np.ndarray) -> Callable[[], object]:
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    model = model.clone()
    model.reshape([len(images), 3, *SIZE])
    compiled = openvino.Core().compile_model(model, "CPU", settings)
    return lambda: compiled(images)


def measure(name: str, backbone: nn.Module, backbone_graph: openvino.Model, args: argparse.Namespace) -> dict[str, Any]:
    model = build(name)
    start = time.perf_counter()
    path = Engine(default_root_dir=args.output, accelerator="cpu", logger=False).export(
        model, ExportType.OPENVINO, export_root=args.output / name.replace(" ", "_")
    )
    figures: dict[str, Any] = {"export, s": time.perf_counter() - start}
    model.eval()
    graph = openvino.Core().read_model(path)
    figures["operations"] = len(graph.get_ops())
    figures["MB"] = path.with_suffix(".bin").stat().st_size / 1e6
    figures["load, s"] = seconds(lambda: openvino.Core().compile_model(path, "CPU"))
    fixed = graph.input(0).partial_shape[0]  # anomalib's PatchCore takes so many images at a time, and no others
    for size in [fixed.get_length()] if fixed.is_static else args.batch_sizes:
        images = np.random.default_rng(0).random((size, 3, *SIZE), dtype=np.float32)
        cases = {"torch fp32": (in_torch(model.model, images), in_torch(backbone, images))}
        for kind, precision in PRECISIONS.items():
            cases[f"OpenVINO {kind}"] = (
                in_openvino(graph, precision, images), in_openvino(backbone_graph, precision, images)
            )  # fmt: skip
        for kind, functions in cases.items():
            milliseconds, ratio = compare(*functions, args.turns)
            figures[f"{kind}, {size}"] = {"ms an image": milliseconds / size, "times the backbone": ratio}
    return figures


def table(figures: dict[str, dict[str, Any]]) -> str:
    rows = [
        {"model": name}
        | {
            key: f"{value['ms an image']:.1f} ({value['times the backbone']:.2f})" if isinstance(value, dict) else value
            for key, value in row.items()
        }
        for name, row in figures.items()
    ]
    return pd.DataFrame(rows).to_markdown(index=False, floatfmt=".1f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CONFIGS, *BANKS, *OTHER_NETWORKS]
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("results/scoring"))
    args = parser.parse_args()
    logging.disable(logging.INFO)
    backbone = Backbone().eval()
    example = torch.rand(1, 3, *SIZE)
    backbone_graph = openvino.convert_model(backbone, example_input=example, input=[-1, 3, *SIZE])
    figures: dict[str, dict[str, Any]] = {}
    for name in args.models:
        figures[name] = measure(name, backbone, backbone_graph, args)
        print(table(figures), flush=True)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    write_whole(args.output / "scoring.json", json.dumps({"machine": machine, **figures}, indent=2).encode())


if __name__ == "__main__":
    main()
