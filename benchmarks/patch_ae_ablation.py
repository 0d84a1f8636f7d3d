# SPDX-License-Identifier: Apache-2.0

"""PatchAE, its ablations, its encoder as it comes, and anomalib's PatchCore on the same backbone, as one table.

On synthetic data and on a category in MVTec AD's layout, in an hour or so on two cores::

    python -m benchmarks.patch_ae_ablation --demo grid --root datasets/MVTecAD --categories screw \
        --backbone densenet169 --image_size 128 --epochs 10 --precision bf16-mixed --coreset_ratio 0.01

and in minutes, to see it work::

    python -m benchmarks.patch_ae_ablation --demo grid --image_size 64 --epochs 1 --max_train_images 20 \
        --backbone resnet18 --rows full untrained

Trains and tests with anomalib's engine, and takes AUROC and AUPRO on raw scores. Training images are drawn with the
seed if there are more than ``--max_train_images``. Prints a table for each data set and writes it as JSON, of which
what is there is not measured again.
"""

import argparse
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.models import AnomalibModule, Patchcore
from lightning import seed_everything

from anomalib_recon.data import DemoAD
from anomalib_recon.layers import create_backbone, stage_strides
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models import PatchAE
from benchmarks.rows import Rows
from benchmarks.trainings import BATCHES, create_engine, fit_and_test, keep_training_images

NUM_LAYERS = 4
# an epoch of these learns the statistics of the stages, and no weights
NO_STEPS = {"trained_stages": 0, "learning_rate": 1e-12}
PLAIN = {"patch_wise": False, "defect_probability": 0.0}
# what each row changes
ROWS: dict[str, dict[str, Any]] = {
    # 256 pixels of 3 channels become 16 values, through convolutions that see their neighbours
    "plain, 16 values a patch, by error": {**PLAIN, "patch_size": 16, "embed_dim": 16, "score_by": "reconstruction"},
    "plain, by error": {**PLAIN, "score_by": "reconstruction"},
    "plain": PLAIN,
    "patch-wise": {"defect_probability": 0.0},
    "defects": {"patch_wise": False},
    "full": {},
    "full, patches of 4": {"patch_size": 4},
    "full, patches of 16": {"patch_size": 16},
    "full, patches of 32": {"patch_size": 32},
    "full, all stages trained": {"trained_stages": 4},
    "full, 128 values a vector": {"embed_dim": 128},
    "full, without projection": {"embed_dim": None},
    "full, one scale a stage": {"feature_scale": "stage"},
    "full, one scale a stage, without the last": {"feature_scale": "stage", "num_layers": 3},
    "untrained": NO_STEPS,
    "untrained, without projection": {**NO_STEPS, "embed_dim": None},
    "untrained, one scale a stage": {**NO_STEPS, "feature_scale": "stage"},
    "untrained, one scale a stage, without the last": {**NO_STEPS, "feature_scale": "stage", "num_layers": 3},
    "PatchCore": {},
}
NOT_TRAINED = {name for name in ROWS if name.startswith(("untrained", "PatchCore"))}


def datamodules(arguments: argparse.Namespace) -> Iterator[AnomalibDataModule]:
    """The data sets, with as many training images as asked for."""
    drawn: list[AnomalibDataModule] = [DemoAD(category=category, **BATCHES) for category in arguments.demo]
    real = [MVTecAD(root=arguments.root, category=category, **BATCHES) for category in arguments.categories]
    for datamodule in drawn + real:
        keep_training_images(datamodule, arguments.max_train_images, arguments.seed)
        yield datamodule


def patchcore(arguments: argparse.Namespace) -> Patchcore:
    """PatchCore on the two stages with strides 8 and 16, as in its paper, and so on the grid of patches of 8 pixels."""
    layers = [name for name, stride in stage_strides(arguments.backbone).items() if stride in {8, 16}]
    size = (arguments.image_size, arguments.image_size)
    model = Patchcore(
        backbone=arguments.backbone,
        layers=layers,
        pre_trained=False,
        coreset_sampling_ratio=arguments.coreset_ratio,
        pre_processor=Patchcore.configure_pre_processor(size),
        evaluator=RawScoreEvaluator(),
        visualizer=False,
    )
    extractor = model.model.feature_extractor
    extractor.feature_extractor = create_backbone(
        arguments.backbone,
        pre_trained=not arguments.not_pre_trained,
        weights=arguments.backbone_weights,
        features_only=True,
        out_indices=tuple(extractor.idx),
    ).eval()
    return model


def patch_ae(row: str, arguments: argparse.Namespace) -> PatchAE:
    changes = dict(ROWS[row])
    num_layers = changes.pop("num_layers", NUM_LAYERS)
    layers = list(stage_strides(arguments.backbone))[-NUM_LAYERS:][:num_layers]
    return PatchAE(
        backbone=arguments.backbone,
        layers=layers,
        pre_trained=not arguments.not_pre_trained,
        backbone_weights=arguments.backbone_weights,
        image_size=arguments.image_size,
        coreset_ratio=arguments.coreset_ratio,
        visualizer=False,
        **{
            "learning_rate": arguments.learning_rate,
            "backbone_learning_rate": arguments.backbone_learning_rate,
            "alpha": arguments.alpha,
            **changes,
        },
    )


def measure(row: str, datamodule: AnomalibDataModule, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test one row."""
    seed_everything(arguments.seed, verbose=False)
    model: AnomalibModule = patchcore(arguments) if row == "PatchCore" else patch_ae(row, arguments)
    # half precision would move PatchCore's distances
    precision = "32" if row == "PatchCore" else arguments.precision
    epochs = 1 if row in NOT_TRAINED else arguments.epochs
    with TemporaryDirectory() as folder:
        engine = create_engine(Path(folder), precision, max_epochs=epochs, limit_val_batches=0)
        return fit_and_test(engine, model, datamodule)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", nargs="*", default=[], help="categories of DemoAD")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"))
    parser.add_argument("--categories", nargs="*", default=[], help="folders of the root")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--backbone", default="wide_resnet101_2")
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--not_pre_trained", action="store_true", help="random weights of the backbone")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--backbone_learning_rate", type=float, default=2e-5)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--coreset_ratio", type=float, default=0.1)
    parser.add_argument("--max_train_images", type=int, default=1_000_000)
    parser.add_argument("--precision", choices=["32", "bf16-mixed"], default="32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/patch_ae_ablation"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    for datamodule in datamodules(arguments):
        source = "demo_" if isinstance(datamodule, DemoAD) else ""  # both have a grid
        rows = Rows(arguments.output / f"{source}{datamodule.category}.json", arguments)
        for row in arguments.rows:
            rows.measure(row, partial(measure, row, datamodule, arguments))


if __name__ == "__main__":
    main()
