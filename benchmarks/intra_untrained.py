# SPDX-License-Identifier: Apache-2.0

"""InTra's recipe without its reconstruction: the mean of the good images at each place, by the same distance and score.

``python -m benchmarks.intra_untrained --root DATA --categories bottle screw --output results/intra_untrained``

What a trained InTra should be ahead of. Takes image size, patches, distance and score of a config, or the paper's
score; no seed has an influence. Prints a table and writes it as JSON, of which what is there is not measured again.
"""

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD

from anomalib_recon.config_files import read_config
from anomalib_recon.models import InTra
from benchmarks.intra_covered import normal_patches, take_statistics
from benchmarks.rows import Rows, accuracy
from benchmarks.trainings import BATCHES, create_engine

SCORES: dict[str, dict[str, Any]] = {"recipe": {}, "paper": {"distance": "gms", "top_fraction": 0.0}}


@torch.no_grad()
def fit(module: InTra, datamodule: MVTecAD) -> None:
    """Have the network inpaint the mean of the good images, and measure what that misses."""
    datamodule.setup()
    mean = normal_patches(module, datamodule).mean(dim=0, keepdim=True)
    module.model.reconstruct = mean.expand_as  # type: ignore[method-assign]
    take_statistics(module, datamodule)


def measure(category: str, args: argparse.Namespace) -> dict[str, Any]:
    config = read_config(args.config)
    module = InTra(**config["model"]["init_args"] | SCORES[args.score], visualizer=False)
    datamodule = MVTecAD(root=args.root, category=category, **BATCHES)
    fit(module, datamodule)
    [metrics] = create_engine(args.output, "32").test(module.eval(), datamodule=datamodule, verbose=False)
    return accuracy(metrics)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--config", default="recommended/intra.yaml", help="in the folder configs")
    parser.add_argument("--score", choices=SCORES, default="recipe", help="that of the config, or of section 3.5")
    parser.add_argument("--output", type=Path, default=Path("results/intra_untrained"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    rows = Rows(args.output / "intra_untrained.json", args)
    for category in args.categories:
        rows.measure(category, partial(measure, category, args))


if __name__ == "__main__":
    main()
