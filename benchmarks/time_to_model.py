# SPDX-License-Identifier: Apache-2.0

"""Time from the start of a process to a model with thresholds, beside PaDiM and PatchCore, and how good the model is.

``python -m benchmarks.time_to_model --root DATA --category screw --weights tf_efficientnet_b4.safetensors``

Each model trains in a process of its own, by its recommended config; the built-in ones take the same backbone and image
size. ``start`` is the time until the fit begins, ``fit`` that of the fit with the thresholds; the test that follows is
not in it. Training images are drawn with the seed if there are more than ``--max_train_images``. Prints a table and
writes it as JSON. What is in the file is not measured again.
"""

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from anomalib.data import MVTecAD
from anomalib.models import Padim, Patchcore
from lightning import seed_everything

from anomalib_recon import models
from anomalib_recon.config_files import read_config
from anomalib_recon.layers import create_backbone
from anomalib_recon.metrics import RawScoreEvaluator
from benchmarks.rows import Rows
from benchmarks.trainings import BATCHES, create_engine, fit_and_test, keep_training_images

CONFIGS = {
    "FeatureInpainting": "model/feature_inpainting.yaml",
    "FeatureInpainting, rank 0": "recommended/feature_inpainting_textures.yaml",
    "ADTR": "recommended/adtr.yaml",
    "SAAE": "recommended/saae.yaml",
    "PatchAE": "recommended/patch_ae.yaml",
}
BACKBONE, LAYERS = "tf_efficientnet_b4", ["blocks.1", "blocks.2", "blocks.4"]
BUILT_IN: dict[str, tuple[Any, dict[str, Any]]] = {
    "PaDiM": (Padim, {"layers": LAYERS, "n_features": 100}),
    "PatchCore, 1 %": (Patchcore, {"layers": LAYERS[1:], "coreset_sampling_ratio": 0.01}),
}


def build_own(name: str, **arguments: Any) -> tuple[Any, int]:
    """Build a model by its recommended config, and read for how many epochs it trains."""
    config = read_config(CONFIGS[name])
    model_class = getattr(models, config["model"]["class_path"].split(".")[-1])
    return model_class(**config["model"]["init_args"] | arguments, visualizer=False), config["trainer"]["max_epochs"]


def build_built_in(name: str, weights: Path) -> Any:
    model_class, arguments = BUILT_IN[name]
    model = model_class(
        BACKBONE, **arguments, pre_trained=False, pre_processor=model_class.configure_pre_processor((256, 256)),
        evaluator=RawScoreEvaluator(), visualizer=False,
    )  # fmt: skip
    source = create_backbone(BACKBONE, pre_trained=False, weights=weights, features_only=True).state_dict()
    network = model.model.feature_extractor.feature_extractor
    network.load_state_dict({key: source[key] for key in network.state_dict()})
    return model


def train_and_test(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train a model in this process; ``begun`` is a stamp of the clock."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    [seed] = args.seeds
    seed_everything(seed)
    if name in CONFIGS:
        model, epochs = build_own(name, backbone_weights=args.weights)
    else:
        model, epochs = build_built_in(name, args.weights), 1
    datamodule = MVTecAD(root=args.root, category=args.category, **BATCHES)
    keep_training_images(datamodule, args.max_train_images, seed)
    precision = args.precision if name in CONFIGS else "32"
    engine = create_engine(args.output / name.replace(" ", "_"), precision, max_epochs=epochs)
    begun = time.time()
    return fit_and_test(engine, model, datamodule) | {"begun": begun}


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    process = ["--process", name, "--seeds", str(seed)]
    command = [sys.executable, "-m", "benchmarks.time_to_model", *sys.argv[1:], *process]
    start = time.time()
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    figures = json.loads(lines[-1])
    return {"start, s": figures.pop("begun") - start, **figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*CONFIGS, *BUILT_IN]
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--category", required=True)
    parser.add_argument("--weights", type=Path, required=True, help=f"weights of {BACKBONE} in timm's format")
    parser.add_argument("--precision", default="bf16-mixed", help="of our models")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_train_images", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path("results/time_to_model"))
    parser.add_argument("--process", choices=names, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.process:
        print(json.dumps(train_and_test(args.process, args)))
        return
    rows = Rows(args.output / f"{args.category}.json", args)
    for name in args.models:
        for seed in args.seeds:
            rows.measure(f"{name}, seed {seed}", partial(measure, name, seed, args))


if __name__ == "__main__":
    main()
