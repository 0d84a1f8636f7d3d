# SPDX-License-Identifier: Apache-2.0

"""Ours and anomalib's Dinomaly on the same frozen vision transformer, trained for the same minutes.

``python -m benchmarks.dinomaly --root DATA --category screw --weights vit_tiny_patch16_224.safetensors --minutes 3``

SAAE and FeatureInpainting compare the blocks in the second quarter of the transformer in units of normal residuals;
SAAE takes its recommended arguments, FeatureInpainting its defaults. Dinomaly compares two means of its eight blocks in
the middle, by its own network, loss, optimiser and schedule; steps are counted first, so that its learning rate falls
within the time. SAAE's steps end after the same time; FeatureInpainting takes what it takes. For figures without any
training see ``python -m benchmarks.untrained``. Prints a table and writes it as JSON, of which what is there is not
measured again.
"""

import argparse
import logging
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import timm
from anomalib.data import MVTecAD
from anomalib.models import Dinomaly
from anomalib.models.image.dinomaly import torch_model as dinomaly
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback

from anomalib_recon.config_files import read_config
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models import SAAE, FeatureInpainting
from benchmarks.rows import Rows
from benchmarks.trainings import BATCHES, create_engine, fit_and_test

SEED = 0
BACKBONE, IMAGE_SIZE = "vit_tiny_patch16_224", 384
LAYERS = ["blocks.3", "blocks.4", "blocks.5"]
TINY = {"embed_dim": 192, "num_heads": 3, "target_layers": list(range(2, 10))}
PROBE_STEPS = 10


def build_dinomaly(weights: Path | None, image_size: int = IMAGE_SIZE) -> Dinomaly:
    """anomalib's Dinomaly, which knows DINOv2's transformers alone, on another one with local or random weights."""
    create, source = timm.create_model, {"file": str(weights), "num_classes": 0}

    def create_model(*args: Any, **kwargs: Any) -> Any:
        return create(*args, **kwargs | ({"pretrained_cfg_overlay": source} if weights else {"pretrained": False}))

    with patch.dict(dinomaly.DINO_ARCHITECTURES, {"tiny": TINY}), patch.object(timm, "create_model", create_model):
        return Dinomaly(
            BACKBONE, evaluator=RawScoreEvaluator(), visualizer=False,
            pre_processor=Dinomaly.configure_pre_processor((image_size, image_size), image_size),
        )  # fmt: skip


def build_own(name: str, weights: Path) -> SAAE | FeatureInpainting:
    arguments = {"backbone": BACKBONE, "backbone_weights": weights, "image_size": IMAGE_SIZE, "layers": LAYERS}
    if name == "FeatureInpainting":
        return FeatureInpainting(**arguments, visualizer=False)
    config = read_config("recommended/saae.yaml")
    arguments = config["model"]["init_args"] | arguments | {"feature_stride": None}
    return SAAE(**arguments, visualizer=False)


class Clock(Callback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.time())

    def seconds_per_step(self) -> float:
        return (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)


def train_and_test(name: str, args: argparse.Namespace) -> dict[str, float]:
    engine = partial(create_engine, args.output / "trainings", args.precision)
    datamodule = MVTecAD(root=args.root, category=args.category, **BATCHES)
    seed_everything(SEED, verbose=False)
    model: Any = build_dinomaly(args.weights) if name == "Dinomaly" else build_own(name, args.weights)
    ends: dict[str, Any] = {"max_epochs": 1}
    if name == "SAAE":
        ends = {"max_epochs": -1, "max_time": {"seconds": round(60 * args.minutes)}}
    elif name == "Dinomaly":
        probe = Clock()
        engine(max_steps=PROBE_STEPS, limit_val_batches=0, callbacks=[probe]).fit(
            build_dinomaly(args.weights), datamodule=datamodule
        )
        ends = {"max_steps": int(60 * args.minutes / probe.seconds_per_step())}
    trained = engine(**ends)
    return fit_and_test(trained, model, datamodule) | {"steps": trained.trainer.global_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["FeatureInpainting", "SAAE", "Dinomaly"]
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--category", required=True)
    parser.add_argument("--weights", type=Path, required=True, help=f"weights of {BACKBONE} in timm's format")
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--output", type=Path, default=Path("results/dinomaly"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    rows = Rows(args.output / f"{args.category}.json", args)
    for name in args.models:
        rows.measure(f"{name}, {args.minutes:g} min", partial(train_and_test, name, args))


if __name__ == "__main__":
    main()
