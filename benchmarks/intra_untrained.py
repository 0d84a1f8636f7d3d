# SPDX-License-Identifier: Apache-2.0

"""InTra's recipe without its painting: the mean of the good images at each place, by the same distance and score.

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
import yaml
from anomalib.data import MVTecAD
from anomalib.models import AnomalibModule
from torch import Tensor

from anomalib_recon.config_files import config_path
from anomalib_recon.models import InTra
from anomalib_recon.training import normal_images
from benchmarks.rows import Rows, accuracy
from benchmarks.trainings import BATCHES, create_engine

IMAGES_PER_PART = 16
SCORES: dict[str, dict[str, Any]] = {"recipe": {}, "paper": {"distance": "gms", "top_fraction": 0.0}}


@torch.no_grad()
def fit(module: AnomalibModule, datamodule: MVTecAD) -> None:
    """Have the network paint the mean of the good images, and measure what that misses."""
    network: Any = module.model
    datamodule.setup()
    dataset = normal_images(datamodule.train_data, module)
    patches = network.embed(torch.stack([dataset[index].image for index in range(len(dataset))]))
    mean = patches.mean(dim=0, keepdim=True)

    def reconstruct(patches: Tensor) -> Tensor:
        return mean.expand_as(patches)

    network.reconstruct = reconstruct
    parts = patches.split(IMAGES_PER_PART)
    if network.mahalanobis is not None:
        network.mahalanobis.fit(network.residual(part, reconstruct(part)) for part in parts)
        return
    differences = [network.difference(part, reconstruct(part)) for part in parts]
    network.normal_difference.copy_(torch.cat(differences).mean(dim=0, keepdim=True))


def measure(category: str, args: argparse.Namespace) -> dict[str, Any]:
    config = yaml.safe_load(config_path(args.config).read_text(encoding="utf-8"))
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
