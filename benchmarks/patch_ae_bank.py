# SPDX-License-Identifier: Apache-2.0

"""Accuracy of PatchAE, and the time of its search, over the size of its bank.

``python -m benchmarks.patch_ae_bank --root DATA --category pill --weights FILE``

The recommended PatchAE is trained once, with the largest bank. Vectors are in the order of their selection, so the
first of them are the smaller banks. Time is that of the search for one image, in turns with the frozen backbone alone,
which takes the rest. Figures are on raw scores, on the test images. Writes a row for each share and prints them as a
table.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD
from lightning import seed_everything

from anomalib_recon.models import PatchAE
from benchmarks.rows import Rows, accuracy
from benchmarks.time_to_model import build_own
from benchmarks.trainings import BATCHES, create_engine

TURNS = 9


def milliseconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


@torch.no_grad()
def times_of(model: PatchAE) -> dict[str, float]:
    network = model.model.eval()
    image = torch.rand(1, 3, *network.image_size)
    features = network.whitening(network.embed(image).float())
    times = [
        (milliseconds(lambda: network.bank(features)), milliseconds(lambda: network.backbone(image)))
        for _ in range(TURNS + 1)
    ][1:]
    search, backbone = (statistics.median(column) for column in zip(*times, strict=True))
    return {"search, ms": search, "backbone, ms": backbone}


def measure(model: PatchAE, vectors: torch.Tensor, number: int, args: argparse.Namespace) -> dict[str, Any]:
    """Test the model with the first vectors of the bank."""
    model.model.bank.fill(vectors[:number])
    datamodule = MVTecAD(root=args.root, category=args.category, **BATCHES)
    engine = create_engine(args.output / "test", args.precision)
    [metrics] = engine.test(model, datamodule=datamodule, verbose=False)
    return accuracy(metrics) | {"vectors": number} | times_of(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--category", required=True)
    parser.add_argument("--weights", type=Path, required=True, help="weights of tf_efficientnet_b4 in timm's format")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.02, 0.01, 0.005, 0.002, 0.001, 0.0005, 0.0002])
    parser.add_argument("--output", type=Path, default=Path("results/patch_ae_bank"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    seed_everything(0)
    largest = max(args.ratios)
    model, epochs = build_own("PatchAE", backbone_weights=args.weights, coreset_ratio=largest)
    engine = create_engine(args.output / "training", args.precision, max_epochs=epochs, limit_val_batches=0)
    engine.fit(model, datamodule=MVTecAD(root=args.root, category=args.category, **BATCHES))
    vectors = model.model.bank.vectors
    rows = Rows(args.output / f"{args.category}.json", args)
    for ratio in args.ratios:
        number = round(len(vectors) * ratio / largest)
        rows.measure(f"{100 * ratio:g} %", lambda number=number: measure(model, vectors, number, args))


if __name__ == "__main__":
    main()
