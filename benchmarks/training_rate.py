# SPDX-License-Identifier: Apache-2.0

"""Training rate of ADTR and SAAE as a share of the machine's matrix products, and where the rest of the time goes.

``python -m benchmarks.training_rate --output training_rate.json``

An optimiser step on a batch of 16 images whose targets are there, as the feature cache has them, by each model's
arguments of the paper and the recommended ones. Weights and features are random. The share is of the rate of
``torch.matmul`` on two 4096 x 4096 matrices in the same precision, timed in turns with the steps. The profile sums the
time inside of torch's operators by kind. Writes the figures as JSON and prints them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from anomalib_recon import models
from anomalib_recon.config_files import read_config
from anomalib_recon.files import write_whole

MATRIX_SIZE = 4096
NUM_IMAGES = 16
# config, and arguments beside it
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ADTR, the paper's": ("model/adtr.yaml", {}),
    "ADTR, recommended": ("recommended/adtr.yaml", {}),
    "SAAE, the paper's on ViT-Ti": (
        "model/saae.yaml", {"backbone": "vit_tiny_patch16_224", "latent_dim": 21, "mlp_ratio": 2}
    ),
    "SAAE, recommended": ("recommended/saae.yaml", {}),
}  # fmt: skip
# of shapes; torch does not count them on a CPU
ATTENTION_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
# operators whose names begin so; the rest is "other"
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution",
                        "aten::mkldnn_linear", "aten::convolution_backward", "aten::thnn_conv2d",
                        "mkldnn::_convolution", "aten::_slow_conv2d"),
    "attention": ("aten::_scaled_dot_product",),
    "random numbers": ("aten::bernoulli_", "aten::native_dropout"),
    "copies": ("aten::copy_", "aten::cat", "aten::clone"),
    "normalisation": ("aten::native_layer_norm", "aten::native_batch_norm"),
    "optimiser": ("aten::_fused_adam", "aten::_foreach", "aten::addcdiv_", "aten::addcmul_", "aten::lerp_"),
}  # fmt: skip


def build(name: str) -> Any:
    config, arguments = CASES[name]
    section = read_config(config)["model"]
    model_class = getattr(models, section["class_path"].split(".")[-1])
    torch.manual_seed(0)
    return model_class(**section["init_args"] | arguments | {"pre_trained": False}, visualizer=False).train()


def build_step(module: Any, precision: str) -> Callable[[], None]:
    """What a step of the training does, from the targets in half precision on."""
    images = torch.rand(NUM_IMAGES, 3, *module.model.image_size)
    with torch.no_grad():
        extract = getattr(module.model, "extract", module.model.backbone)
        targets = module.targets(extract(images)).half()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            target = targets.float()
            loss = module.loss(target, module.model.reconstruct(target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def shares_of_time(step: Callable[[], None]) -> dict[str, float]:
    """Shares of the time inside of operators, by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    times: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "other")
        times[kind] += event.self_cpu_time_total
    return {kind: times[kind] / sum(times.values()) for kind in (*KINDS, "other")}


def measure(name: str, precision: str, turns: int) -> dict[str, float]:
    step = build_step(build(name), precision)
    matrix = torch.rand(MATRIX_SIZE, MATRIX_SIZE, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
    step()  # warms up
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        step()
    flops, product = counter.get_total_flops(), 2 * MATRIX_SIZE**3
    rows = [(seconds(step), seconds(lambda: matrix @ matrix)) for _ in range(turns)]
    return {
        "ms": 1000 * statistics.median(ours for ours, _ in rows),
        "GFLOP": flops / 1e9,
        "GFLOP/s": statistics.median(flops / ours for ours, _ in rows) / 1e9,
        "share": statistics.median(flops / ours / (product / other) for ours, other in rows),
    } | shares_of_time(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = {f"{name}, {kind}": measure(name, kind, args.turns) for name in args.models for kind in args.precisions}
    print(pd.DataFrame(rows).T.to_markdown(floatfmt=".3g"))
    if args.output:
        machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
        write_whole(args.output, json.dumps({"machine": machine, **rows}, indent=2).encode())


if __name__ == "__main__":
    main()
