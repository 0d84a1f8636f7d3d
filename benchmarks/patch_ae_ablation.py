# SPDX-License-Identifier: Apache-2.0

"""PatchAE, its ablations, its encoder as it comes, and anomalib's PatchCore on the same backbone, as one table.

On drawn data and on a category in MVTec AD's layout, in an hour or so on two cores::

    python -m benchmarks.patch_ae_ablation --demo grid --root datasets/MVTecAD --categories screw \
        --backbone densenet169 --image_size 128 --epochs 10 --precision bf16-mixed --coreset_ratio 0.01

and in minutes, to see it work::

    python -m benchmarks.patch_ae_ablation --demo grid --image_size 64 --epochs 1 --max_train_images 20 \
        --backbone resnet18 --rows full untrained

Trains and tests with anomalib's engine and prints AUROC and AUPRO on raw scores. The figures are written to
``--output`` after each row. Training images are drawn with the seed if there are more than ``--max_train_images``.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Patchcore
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_recon.data import DemoAD
from anomalib_recon.files import write_whole
from anomalib_recon.layers import create_backbone, stage_strides
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.models import PatchAE

# an epoch of these learns the statistics of the stages, and no weights
NO_STEPS = {"trained_stages": 0, "learning_rate": 1e-12}
# what each row changes; each but the first is scored by its bank
ROWS: dict[str, dict[str, Any]] = {
    "plain, by reconstruction error": {"patch_wise": False, "defect_probability": 0.0, "score_by": "reconstruction"},
    "plain": {"patch_wise": False, "defect_probability": 0.0},
    "patch-wise": {"defect_probability": 0.0},
    "defects": {"patch_wise": False},
    "full": {},
    "full, all stages trained": {"trained_stages": 4},
    "full, by stages": {"embed_dim": None},
    "untrained": NO_STEPS,
    "untrained, by stages": {**NO_STEPS, "embed_dim": None},
    "PatchCore": {},
}
NOT_TRAINED = {"untrained", "untrained, by stages", "PatchCore"}
METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC", "pixel_AUPRO": "PRO"}


def datamodules(arguments: argparse.Namespace) -> Iterator[AnomalibDataModule]:
    """The data sets, with as many training images as asked for."""
    sizes = {"train_batch_size": arguments.batch_size, "eval_batch_size": arguments.batch_size, "num_workers": 0}
    drawn: list[AnomalibDataModule] = [DemoAD(category=category, **sizes) for category in arguments.demo]
    real = [MVTecAD(root=arguments.root, category=category, **sizes) for category in arguments.categories]
    for datamodule in drawn + real:
        datamodule.setup(TrainerFn.FITTING)
        count = len(datamodule.train_data)
        kept = torch.randperm(count, generator=torch.Generator().manual_seed(arguments.seed))
        datamodule.train_data = datamodule.train_data.subsample(sorted(kept[: arguments.max_train_images].tolist()))
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
    return PatchAE(
        backbone=arguments.backbone,
        pre_trained=not arguments.not_pre_trained,
        backbone_weights=arguments.backbone_weights,
        image_size=arguments.image_size,
        coreset_ratio=arguments.coreset_ratio,
        visualizer=False,
        **{
            "learning_rate": arguments.learning_rate,
            "backbone_learning_rate": arguments.backbone_learning_rate,
            "alpha": arguments.alpha,
            **ROWS[row],
        },
    )


def run(row: str, datamodule: AnomalibDataModule, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train and test one row."""
    seed_everything(arguments.seed)
    model: AnomalibModule = patchcore(arguments) if row == "PatchCore" else patch_ae(row, arguments)
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        engine = Engine(
            # half precision would move PatchCore's distances
            precision="32" if row == "PatchCore" else arguments.precision,
            max_epochs=1 if row in NOT_TRAINED else arguments.epochs,
            limit_val_batches=0,
            logger=False,
            enable_progress_bar=False,
            default_root_dir=folder,
        )
        engine.fit(model, datamodule=datamodule)
        (figures,) = engine.test(model, datamodule=datamodule, verbose=False)
    return {
        "data": datamodule.category,
        "row": row,
        "epochs": 0 if row in NOT_TRAINED else arguments.epochs,
        "train images": len(datamodule.train_data),
        **{title: round(float(figures[name]), 4) for name, title in METRICS.items()},
        "seed": arguments.seed,
        "seconds": round(time.monotonic() - start),
    }


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
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--backbone_learning_rate", type=float, default=2e-5)
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--coreset_ratio", type=float, default=0.1)
    parser.add_argument("--max_train_images", type=int, default=1_000_000)
    parser.add_argument("--precision", choices=["32", "bf16-mixed"], default="32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/patch_ae_ablation.json"))
    arguments = parser.parse_args()

    rows: list[dict[str, Any]] = []
    for datamodule in datamodules(arguments):
        for row in arguments.rows:
            rows.append(run(row, datamodule, arguments))
            print(rows[-1], flush=True)
            write_whole(arguments.output, json.dumps(rows, indent=1).encode())
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
