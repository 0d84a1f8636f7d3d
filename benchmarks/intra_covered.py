# SPDX-License-Identifier: Apache-2.0

"""Accuracy of an InTra that has learnt one patch of a window at a time, when it inpaints several.

``python -m benchmarks.intra_covered --checkpoint CKPT --root datasets/MVTecAD --category screw --output FILE``

Tests a checkpoint of a network with ``readout="token"`` once with each ``covered_per_window`` and prints AUROC and
AUPRO on raw scores. "own" means that the statistics of the normal training images (eq. 17) have been taken
anew by the same inference; otherwise they are those of the checkpoint. Writes the figures as JSON and prints them.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from torch import Tensor

from anomalib_recon.files import write_whole
from anomalib_recon.models import InTra
from anomalib_recon.training import normal_images

BATCH_SIZE = 8


def normal_patches(model: InTra, datamodule: MVTecAD) -> Tensor:
    """Patches of all good training images, ``(n, N * M, K * K * C)``."""
    dataset = normal_images(datamodule.train_data, model)
    return model.model.embed(torch.stack([dataset[index].image for index in range(len(dataset))]))


@torch.no_grad()
def take_statistics(model: InTra, datamodule: MVTecAD) -> None:
    """Take what scoring needs of the good training images, by the reconstruction that the network does now."""
    network = model.model.eval()
    batches = normal_patches(model, datamodule).split(BATCH_SIZE)
    pairs = ((patches, network.reconstruct(patches)) for patches in batches)
    if network.mahalanobis is not None:
        network.mahalanobis.fit(tuple(map(network.unpatchify, pair)) for pair in pairs)
        return
    differences = [network.difference(*pair) for pair in pairs]
    network.normal_difference.copy_(torch.cat(differences).mean(dim=0, keepdim=True))


def measure(checkpoint: Path, count: int, own: bool, datamodule: MVTecAD) -> dict[str, float | int | bool]:
    model = InTra.load_from_checkpoint(checkpoint, covered_per_window=count, visualizer=False)
    if own:
        take_statistics(model, datamodule)
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        engine = Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False)
        (metrics,) = engine.test(model, datamodule=datamodule, verbose=False)
    seconds = time.monotonic() - start
    figures = {
        "covered_per_window": count,
        "own": own,
        "windows": len(model.model.places),
        "seconds": seconds,
        **metrics,
    }
    print(json.dumps(figures), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--category", required=True)
    parser.add_argument("--covered", type=int, nargs="+", default=[1, 4, 9])
    parser.add_argument("--own", action="store_true", help="also with the statistics taken anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    datamodule = MVTecAD(root=args.root, category=args.category, eval_batch_size=BATCH_SIZE, num_workers=0)
    datamodule.setup()
    rows = [(count, own) for count in args.covered for own in (False, args.own and count > 1)]
    figures = [measure(args.checkpoint, count, own, datamodule) for count, own in dict.fromkeys(rows)]
    if args.output:
        write_whole(args.output, json.dumps(figures, indent=2).encode())


if __name__ == "__main__":
    main()
