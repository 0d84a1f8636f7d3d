# SPDX-License-Identifier: Apache-2.0

"""ADTR, SAAE and their ablations over the epochs, trained on features that are computed once.

``python tests/benchmarks/feature_curves.py --root datasets/MVTecAD --category screw --variants adtr --epochs 100``

Loss, optimiser and schedule are the model's own; the learning rate of ADTR falls after four fifths of the epochs, as in
the paper. What differs is that the frozen backbone sees each image once instead of once in each epoch. Prints AUROC and
AUPRO on raw scores, and writes for each variant its figures as JSON and its weights as a checkpoint, which ADTR+ takes
as its start (``--model.normal_checkpoint``).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from anomalib.data import AnomalibDataset, ImageBatch, MVTecAD
from anomalib_recon.models.saae.latent_size import FeatureCovariance
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from anomalib_recon.metrics import AUPRO, AUROC
from anomalib_recon.models import ADTR, SAAE

# the stride of the feature map is that of ADTR, for the sake of the comparison
VARIANTS: dict[str, tuple[type[ADTR | SAAE], dict[str, Any]]] = {
    "adtr": (ADTR, {}),
    "adtr-encoder-query": (ADTR, {"query": "encoder"}),
    "adtr-without-attention": (ADTR, {"attention": "concat"}),
    "saae-v": (SAAE, {"feature_stride": 16, "mlp_ratio": 1}),
    "saae-2v": (SAAE, {"feature_stride": 16, "mlp_ratio": 2}),
    "saae-without-transformer": (SAAE, {"feature_stride": 16, "transformer": False}),
}
BATCH_SIZES = {ADTR: 16, SAAE: 32}
EVAL_BATCH_SIZE = 16


def autocast(precision: str) -> torch.autocast:
    """What a trainer's ``precision`` stands for."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")


@torch.no_grad()
def load(module: ADTR | SAAE, dataset: AnomalibDataset) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, C, h, w), masks (N, H, W) and labels (N,) of the images of a dataset, in its order."""
    batches = [
        (module.model.extract_features(batch.image).float(), batch.gt_mask, batch.gt_label)
        for batch in DataLoader(dataset, EVAL_BATCH_SIZE, collate_fn=dataset.collate_fn)
    ]
    features, masks, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return features, masks, labels


def score(module: ADTR | SAAE, features: Tensor, reconstruction: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B,) and maps (B, 1, H, W), as in the forward of the network."""
    generator = module.model.anomaly_map_generator
    if isinstance(module, SAAE):
        anomaly_map = generator(features, reconstruction)
        return anomaly_map.amax(dim=(1, 2, 3)), anomaly_map
    anomaly_map = generator(features, reconstruction, module.hparams["image_size"])
    return generator.score(anomaly_map), anomaly_map


@torch.no_grad()
def evaluate(module: ADTR | SAAE, features: Tensor, masks: Tensor, labels: Tensor, precision: str) -> dict[str, float]:
    """AUROC of images, AUROC and AUPRO of pixels, on raw scores."""
    module.eval()
    pixel_fields = ["anomaly_map", "gt_mask"]
    metrics = {
        "image_AUROC": AUROC(["pred_score", "gt_label"]),
        "pixel_AUROC": AUROC(pixel_fields),
        "pixel_AUPRO": AUPRO(pixel_fields),
    }
    for batch, mask, label in zip(*(part.split(EVAL_BATCH_SIZE) for part in (features, masks, labels)), strict=True):
        with autocast(precision):
            reconstruction = module.model.reconstruct(batch)
        pred_score, anomaly_map = score(module, batch, reconstruction.float())
        image = anomaly_map.expand(-1, 3, -1, -1)  # a batch needs one, and no metric looks at it
        scored = ImageBatch(image=image, anomaly_map=anomaly_map, pred_score=pred_score, gt_mask=mask, gt_label=label)
        for metric in metrics.values():
            metric.update(scored)
    return {name: round(float(metric.compute()), 4) for name, metric in metrics.items()}


def train_epoch(module: ADTR | SAAE, features: Tensor, optimizer: torch.optim.Optimizer, precision: str) -> float:
    """Train on all features once, in random order.

    Returns:
        float: Mean loss.
    """
    module.train()
    losses = []
    for index in torch.randperm(len(features)).split(BATCH_SIZES[type(module)]):
        batch = features[index]
        with autocast(precision):
            reconstruction = module.model.reconstruct(batch)
        loss = module.loss(batch, reconstruction.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def save(module: ADTR | SAAE, rows: list[dict[str, float]], output: Path) -> None:
    """Write figures and checkpoint, each whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    checkpoint, figures = output.with_suffix(".ckpt"), output.with_suffix(".json")
    part = output.with_suffix(".part")
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}, part)
    part.replace(checkpoint)
    part.write_text(json.dumps(rows, indent=1))
    part.replace(figures)


def run(variant: str, arguments: argparse.Namespace, datamodule: MVTecAD) -> None:
    """Train a variant and print its figures."""
    seed_everything(arguments.seed)
    model_class, given = VARIANTS[variant]
    given = {"image_size": arguments.image_size, **given}
    if arguments.backbone:
        given["backbone"] = arguments.backbone
    if model_class is ADTR:
        given["lr_drop_epoch"] = arguments.lr_drop_epoch or max(1, arguments.epochs * 4 // 5)
    module = model_class(backbone_weights=arguments.backbone_weights, **given)
    with autocast(arguments.precision):
        features, _, _ = load(module, datamodule.train_data)
        test = load(module, datamodule.test_data)
    if isinstance(module, SAAE):
        covariance = FeatureCovariance(features.shape[1])
        covariance.update(features)
        given["latent_dim"] = covariance.num_components(module.explained_variance)
        print(variant, "latent_dim", given["latent_dim"], "of", features.shape[1], flush=True)
        module = SAAE(backbone_weights=arguments.backbone_weights, **given)
    configured = module.configure_optimizers()
    (optimizer,), schedulers = configured if isinstance(configured, tuple) else ([configured], [])

    rows: list[dict[str, float]] = []
    trained = 0.0
    for epoch in range(1, arguments.epochs + 1):
        start = time.monotonic()
        loss = train_epoch(module, features, optimizer, arguments.precision)
        for scheduler in schedulers:
            scheduler.step()
        trained += time.monotonic() - start
        if epoch % arguments.every == 0 or epoch == arguments.epochs:
            figures = evaluate(module, *test, arguments.precision)
            rows.append({"epoch": epoch, "seconds": round(trained), "loss": round(loss, 2), **figures})
            print(variant, rows[-1], flush=True)
            save(module, rows, arguments.output / f"{arguments.category}-{variant}")


def main() -> None:
    """Run the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"))
    parser.add_argument("--category", default="screw")
    parser.add_argument("--backbone", help="a CNN of timm; the model's own if not given")
    parser.add_argument("--backbone_weights", type=Path)
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["adtr"])
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--lr_drop_epoch", type=int, help="after four fifths of the epochs if not given")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--precision", choices=["32", "bf16-mixed"], default="bf16-mixed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results/feature_curves"))
    arguments = parser.parse_args()

    datamodule = MVTecAD(
        root=arguments.root,
        category=arguments.category,
        augmentations=Resize((arguments.image_size, arguments.image_size), antialias=True),
    )
    datamodule.setup()
    for variant in arguments.variants:
        run(variant, arguments, datamodule)


if __name__ == "__main__":
    main()
