# SPDX-License-Identifier: Apache-2.0

"""InTra after the same minutes: its recommended training against one covered patch a window, on the same network.

``python -m benchmarks.intra_time --root DATA --category bottle --minutes 1 5 15 --output intra_time``

"One patch" covers one patch of each window, with the paper's loss, readout and windows a step, at the recommended
learning rate, held constant. Both are scored by the recommended distance.
Each row is a training of its own, since the rate of the recommended one rises and falls within its time. Loss and PSNR
are of good test images, each patch covered alone and inpainted from its window; the loss is the paper's, whatever the
training minimises. Nothing is chosen by them. Writes ``CATEGORY.json``, of which what is there is not measured again,
and ``CATEGORY.png``, and prints a table.
"""

import argparse
import logging
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from anomalib.data import MVTecAD
from lightning import seed_everything
from matplotlib.figure import Figure
from torch import Tensor

from anomalib_recon.config_files import read_config
from anomalib_recon.models import InTra
from anomalib_recon.models.intra.loss import InTraLoss
from benchmarks.rows import Rows
from benchmarks.trainings import create_engine, fit_and_test

SEED = 0
NUM_GOOD_IMAGES = 8
RECIPES = ("recommended", "one patch")
# the recommended arguments that both take
SHARED = (
    "image_size", "patch_size", "embed_dim", "depth", "num_heads", "windows_per_image", "patience", "learning_rate",
    "distance", "top_fraction",
)  # fmt: skip


def arguments_of(recipe: str, config: str) -> dict[str, Any]:
    arguments = read_config(config)["model"]["init_args"]
    return arguments if recipe == "recommended" else {name: arguments[name] for name in SHARED}


def good_test_images(model: InTra, datamodule: MVTecAD) -> Tensor:
    items = (datamodule.test_data[index] for index in range(len(datamodule.test_data)))
    good = [item.image for item in items if not bool(item.gt_label)]
    return torch.stack([model.pre_processor.transform(image) for image in good[:NUM_GOOD_IMAGES]])


@torch.no_grad()
def measure_reconstruction(checkpoint: str, datamodule: MVTecAD) -> dict[str, float]:
    """Loss of the paper (section 3.4) and PSNR in dB, with one covered patch a window."""
    module = InTra.load_from_checkpoint(checkpoint, covered_per_window=1, visualizer=False).eval()
    network: Any = module.model
    patches = network.embed(good_test_images(module, datamodule))
    inpainted = network.reconstruct(patches)
    error = (inpainted - patches).square().mean().item()
    loss = InTraLoss()(network.pixels(patches), network.pixels(inpainted)).item()
    return {"loss": loss, "PSNR": -10 * math.log10(error)}


def measure(recipe: str, minutes: float, args: argparse.Namespace) -> dict[str, Any]:
    """Train for so many minutes, and test."""
    seed_everything(SEED, verbose=False)
    model = InTra(**arguments_of(recipe, args.config), visualizer=False)
    datamodule = MVTecAD(root=args.root, category=args.category, eval_batch_size=16, num_workers=0)
    max_time = {"seconds": round(60 * minutes)}
    engine = create_engine(args.output / "trainings", args.precision, max_epochs=-1, max_time=max_time)
    figures = fit_and_test(engine, model, datamodule) | measure_reconstruction(engine.best_model_path, datamodule)
    return {"recipe": recipe, "minutes": minutes, **figures, "steps": engine.trainer.global_step}


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, column in zip(figure.subplots(1, 3), ("loss", "image AUROC", "pixel AUROC"), strict=True):
        for recipe in RECIPES:
            points = sorted((row["minutes"], row[column]) for row in rows.values() if row["recipe"] == recipe)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=recipe)
        axes.set(xlabel="minutes of training", ylabel=column, xscale="log")
        axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--category", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 15])
    parser.add_argument("--config", default="recommended/intra.yaml", help="in the folder configs; the recommended one")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--output", type=Path, default=Path("results/intra_time"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    rows = Rows(args.output / f"{args.category}.json", args)
    for minutes in args.minutes:
        for recipe in args.recipes:
            rows.measure(f"{recipe}, {minutes:g} min", partial(measure, recipe, minutes, args))
            plot(rows.figures, rows.path.with_suffix(".png"))


if __name__ == "__main__":
    main()
