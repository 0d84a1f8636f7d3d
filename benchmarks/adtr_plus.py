# SPDX-License-Identifier: Apache-2.0

"""Whether ADTR+ helps the recommended ADTR, with anomalies of three sources.

``python -m benchmarks.adtr_plus --root DATA --category screw --weights tf_efficientnet_b4.safetensors``

The recommended ADTR is trained on good images. From there it is trained further: on good images alone, which is the
control, and as ADTR+ with confetti, with labelled defects drawn from the test folders, and with good images on which
anomalib's Perlin noise is drawn. All are tested on the same images, without the labelled defects. Learning rate and
number of epochs are those of the recommended ADTR. Prints a table and writes it as JSON, of which what is there is not
measured again.
"""

import argparse
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torchvision.transforms.v2.functional import to_pil_image

from anomalib_recon.config_files import read_config
from anomalib_recon.data import LabelledFolder
from anomalib_recon.models import ADTR
from benchmarks.rows import Rows
from benchmarks.trainings import BATCHES, create_engine, fit_and_test

SEED = 0
SOURCES = ("none", "confetti", "labelled defects", "Perlin noise")


def draw_perlin(datamodule: LabelledFolder, folder: Path, number: int) -> pd.DataFrame:
    """Draw anomalib's Perlin noise on the first good images, and write images and masks."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = PerlinAnomalyGenerator(probability=1.0)
    rows = []
    for index in range(number):
        item = datamodule.train_data[index]
        image, mask = generator(item.image)
        paths = [folder / f"{index:03}.png", folder / f"{index:03}_mask.png"]
        to_pil_image(image).save(paths[0])
        to_pil_image(mask.float()).save(paths[1])
        rows.append({"image_path": str(paths[0]), "mask_path": str(paths[1]), "label": "abnormal", "label_index": 1})
    return pd.DataFrame(rows).assign(split="train")


def build_data(source: str, args: argparse.Namespace) -> LabelledFolder:
    """Good images and the anomalies of a source to train on; the images to test on do not depend on the source."""
    root = args.root / args.category
    kinds = sorted(path.name for path in (root / "test").iterdir() if path.name != "good")
    defects, masks = [f"test/{kind}" for kind in kinds], [f"ground_truth/{kind}" for kind in kinds]
    datamodule = LabelledFolder(
        name=args.category, root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir=defects,
        mask_dir=masks, train_abnormal_dir=defects, train_mask_dir=masks, num_train_abnormal=args.defects,
        seed=SEED, **BATCHES,
    )  # fmt: skip
    datamodule.setup(TrainerFn.FITTING)
    if source != "labelled defects":
        samples = datamodule.train_data.samples
        good = samples[samples.label_index == 0].reset_index(drop=True)
        datamodule.train_data.samples = good
        if source == "Perlin noise":
            drawn = draw_perlin(datamodule, args.output / f"perlin_{args.category}", args.perlin)
            drawn.index += len(good)
            both = pd.concat([good, drawn])
            both.attrs = good.attrs
            datamodule.train_data.samples = both
    return datamodule


def train_and_test(model: ADTR, datamodule: LabelledFolder, epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    engine = create_engine(args.output / "trainings", args.precision, max_epochs=epochs)
    return fit_and_test(engine, model, datamodule) | {"checkpoint": engine.best_model_path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--category", required=True)
    parser.add_argument("--weights", type=Path, required=True, help="weights of EfficientNet-B4 in timm's format")
    parser.add_argument("--defects", type=int, default=10, help="labelled defects to train on")
    parser.add_argument("--perlin", type=int, default=50, help="good images to draw Perlin noise on")
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--output", type=Path, default=Path("results/adtr_plus"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    config = read_config("recommended/adtr.yaml")
    arguments = config["model"]["init_args"] | {"backbone_weights": args.weights, "visualizer": False}
    epochs = config["trainer"]["max_epochs"]

    rows = Rows(args.output / f"{args.category}.json", args)
    seed_everything(SEED, verbose=False)
    start = rows.measure("ADTR", lambda: train_and_test(ADTR(**arguments), build_data("none", args), epochs, args))[
        "checkpoint"
    ]

    def train_further(source: str) -> dict[str, Any]:
        seed_everything(SEED, verbose=False)
        if source == "none":
            model = ADTR(**arguments)
            model.load_state_dict(torch.load(start, weights_only=True)["state_dict"], strict=False)
        else:
            confetti = 0.5 if source == "confetti" else 0.0
            model = ADTR(**arguments, labels="pixel", normal_checkpoint=start, confetti=confetti)
        return train_and_test(model, build_data(source, args), epochs, args)

    for source in args.sources:
        name = "ADTR, trained further" if source == "none" else f"ADTR+, {source}"
        rows.measure(name, partial(train_further, source))


if __name__ == "__main__":
    main()
