# SPDX-License-Identifier: Apache-2.0

"""A defect of 10 pixels in images of 2000 pixels: the whole image, made smaller, against tiles of it.

``python -m benchmarks.small_defects --backbone vit_tiny_patch16_224 --weights WEIGHTS --output small_defects``
"""

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from anomalib.callbacks.tiler_configuration import TilerConfigurationCallback
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning import seed_everything
from PIL import Image
from scipy import ndimage
from torchvision.transforms.v2 import Resize

from anomalib_recon.metrics import AUROC, RawScoreEvaluator
from anomalib_recon.models import FeatureInpainting
from anomalib_recon.pre_processing import ExactResizePreProcessor

SIDE, DEFECT, TILE = 2000, 10, 224
# of images and defects
COUNTS = {"train/good": 6, "test/good": 6, "test/pit": 6}


def draw(random: np.random.Generator, has_defect: bool) -> tuple[np.ndarray, np.ndarray]:
    """Brushed metal, ``(SIDE, SIDE)`` with values in [0, 1], with or without a pit, and the mask of the pit."""
    brushed = ndimage.gaussian_filter(random.standard_normal((SIDE, SIDE)), (1, 25), mode="wrap")
    clouds = ndimage.zoom(random.standard_normal((8, 8)), SIDE / 8, order=1)
    image = 0.55 + 0.06 * brushed / brushed.std() + 0.03 * clouds
    image += 0.02 * random.standard_normal((SIDE, SIDE))
    row, col = random.integers(DEFECT, SIDE - DEFECT, 2)
    rows, cols = np.mgrid[:SIDE, :SIDE]
    distance = np.hypot(rows - row, cols - col)
    mask = (distance <= DEFECT / 2) & has_defect
    return np.where(mask, image - 0.25 * (1 - (2 * distance / DEFECT) ** 2 / 2), image).clip(0, 1), mask


def write(root: Path) -> None:
    """Write the images in the layout of MVTec AD, as category ``metal``."""
    random = np.random.default_rng(0)
    for folder, count in COUNTS.items():
        kind = Path(folder).name
        pictures, masks = root / "metal" / folder, root / "metal" / "ground_truth" / kind
        for path in (pictures, masks):
            path.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            image, mask = draw(random, has_defect=kind != "good")
            Image.fromarray((255 * image).astype(np.uint8)).save(pictures / f"{index:03d}.png")
            if kind != "good":
                Image.fromarray(mask).save(masks / f"{index:03d}_mask.png")


def measure(root: Path, backbone: str, weights: Path | None, side: int, network_side: int) -> dict[str, float]:
    """Train on images that are resized to ``side`` and, if the network is smaller, cut into tiles."""
    seed_everything(0)
    has_tiles = side > network_side
    model = FeatureInpainting(
        backbone=backbone,
        backbone_weights=weights,
        image_size=network_side,
        pre_processor=ExactResizePreProcessor(Resize((side, side), antialias=True)),
        top_fraction=1e-4,
        evaluator=RawScoreEvaluator(test_metrics=AUROC(fields=["pred_score", "gt_label"], prefix="image_")),
        visualizer=False,
    )
    tiles = [TilerConfigurationCallback(enable=True, tile_size=TILE, stride=TILE)] if has_tiles else []
    batches = {"train_batch_size": 1 if has_tiles else 8, "eval_batch_size": 1, "num_workers": 0}
    # a validation that takes no time: nothing here depends on thresholds
    splits = {"val_split_mode": "from_train", "val_split_ratio": 0.2}
    datamodule = MVTecAD(root=root, category="metal", seed=0, **batches, **splits)
    engine = Engine(callbacks=tiles, default_root_dir=root / "results", logger=False)
    start = time.monotonic()
    engine.fit(model, datamodule=datamodule)
    fitted = time.monotonic()
    [metrics] = engine.test(model, datamodule=datamodule)
    seconds = {"fit s": fitted - start, "test s/image": (time.monotonic() - fitted) / len(datamodule.test_data)}
    return {"tiles": (side // network_side) ** 2, **metrics, **seconds}


def main() -> None:
    """Print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--output", type=Path, default=Path("small_defects"))
    options = parser.parse_args()
    write(options.output)
    rows = {
        f"{side} x {side}": measure(options.output, options.backbone, options.weights, side, network)
        for side, network in ((TILE, TILE), (2 * TILE, 2 * TILE), (9 * TILE, TILE))
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.to_csv(options.output / "small_defects.csv")
    print(table.round(3).to_markdown())


if __name__ == "__main__":
    main()
