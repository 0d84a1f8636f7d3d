# SPDX-License-Identifier: Apache-2.0

"""How far brightness alone tells defective images from good ones, and a copy of the data in which it does not.

``python -m benchmarks.equal_brightness --root DATA --categories screw pill --output equal``

The score of an image is its mean value, which says nothing about defects: on MVTec AD's screw, all defective images are
brighter than all good ones of the test set. In the copy, the values of each image are multiplied so that its mean is
that of the training images, but for what is cut off at 255. Pass the copy to other benchmarks as ``--root``. Prints a
table and writes it as JSON.
"""

import argparse
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from anomalib.data import MVTecAD
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks.rows import Rows


def brightness(path: str | Path) -> float:
    """Mean of all values of an image."""
    with Image.open(path) as image:
        return float(np.asarray(image.convert("RGB")).mean())


def write_equal(path: Path, mean: float, target: Path) -> None:
    """Write an image, multiplied so that its mean is the given one; what is above 255 is cut off."""
    with Image.open(path) as image:
        values = np.asarray(image.convert("RGB")).astype(float)
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((values * mean / values.mean()).clip(0, 255).round().astype(np.uint8)).save(target)


def measure(category: str, args: argparse.Namespace) -> dict[str, float]:
    """Compare the brightness of images, and write the copy."""
    datamodule = MVTecAD(root=args.root, category=category)
    datamodule.setup()
    train, test = datamodule.train_data.samples, datamodule.test_data.samples
    of_train, of_test = (np.array([brightness(path) for path in samples.image_path]) for samples in (train, test))
    labels = test.label_index.to_numpy()
    folder = Path(args.root) / category
    copies = []
    for path in map(Path, [*train.image_path, *test.image_path]):
        copies.append(args.output / category / path.relative_to(folder))
        write_equal(path, of_train.mean(), copies[-1])
    shutil.copytree(folder / "ground_truth", args.output / category / "ground_truth", dirs_exist_ok=True)
    return {
        "training": of_train.mean(),
        "deviation": of_train.std(),
        "good": of_test[labels == 0].mean(),
        "defective": of_test[labels == 1].mean(),
        "image AUROC": roc_auc_score(labels, of_test),
        "largest deviation of the copy": max(abs(brightness(path) - of_train.mean()) for path in copies),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--output", type=Path, default=Path("results/equal_brightness"))
    args = parser.parse_args()
    rows = Rows(args.output / "brightness.json", args)
    for category in args.categories:
        rows.measure(category, partial(measure, category, args))


if __name__ == "__main__":
    main()
