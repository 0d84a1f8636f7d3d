# SPDX-License-Identifier: Apache-2.0

"""What the features of a frozen backbone tell without any training, beside which trained models stand.

``python -m benchmarks.untrained --root DATA --categories pill screw --weights tf_efficientnet_b4.safetensors``

A ``constant`` predicts the mean of each place, a ``PCA`` the principal components, of all cells together, that hold a
share of the variance. What they miss is measured by its L2 norm, each layer brought to one scale unless
``--feature_scale`` says otherwise, or by the Mahalanobis distance of the recommended models. The image's score is the
mean of a share of the map, from the highest value down. No value depends on a seed. Prints tables and writes them as
JSON, of which what is there is not measured again.
"""

import argparse
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from anomalib.data import ImageBatch, MVTecAD
from torch import Tensor
from torch.nn import functional
from torchvision.transforms.v2 import Transform
from torchvision.transforms.v2.functional import resize

from anomalib_recon.layers import FeatureScale, ResidualDistance, create_dense_features
from anomalib_recon.layers.top_mean import top_mean
from anomalib_recon.metrics import AUPRO, AUROC
from anomalib_recon.models import SAAE
from benchmarks.rows import Rows

BATCH_SIZE = 16


@torch.no_grad()
def load(dataset: Iterable, backbone: torch.nn.Module, transform: Transform) -> tuple[Tensor, Tensor]:
    """Features (N, C, h, w) and masks (N, H, W) of the images of a dataset, at the size of the transform."""
    features, masks = [], []
    for item in dataset:
        image = transform(item.image[None])
        features.append(backbone(image).float())
        mask = torch.zeros(item.image.shape[-2:]) if item.gt_mask is None else item.gt_mask.float()
        masks.append(resize(mask[None], list(image.shape[-2:]), interpolation=0).bool())  # nearest
    return torch.cat(features), torch.cat(masks)


def principal_components(features: Tensor, share: float) -> Tensor:
    """The fewest components (k, C) of centred features that hold a share of their variance."""
    cells = features.movedim(1, 0).flatten(1)  # (C, n)
    values, vectors = torch.linalg.eigh((cells @ cells.T).double())
    held = values.flip(0).cumsum(0) / values.sum()
    return vectors.flip(1)[:, : int((held < share).sum()) + 1].T.float()


def score(distances: Tensor, masks: Tensor, top_fraction: float) -> dict[str, float]:
    """AUROC and AUPRO of distances (N, 1, h, w) on raw scores, with masks of the size of the map."""
    fields = ["anomaly_map", "gt_mask"]
    metrics = {
        "image AUROC": AUROC(["pred_score", "gt_label"]),
        "pixel AUROC": AUROC(fields),
        "PRO": AUPRO(fields),
    }
    for part, mask in zip(distances.split(BATCH_SIZE), masks.split(BATCH_SIZE), strict=True):
        maps = functional.interpolate(part, size=mask.shape[-2:], mode="bilinear")
        batch = ImageBatch(
            image=maps.expand(-1, 3, -1, -1),  # a batch needs one, and no metric looks at it
            anomaly_map=maps,
            pred_score=top_mean(maps, top_fraction),
            gt_mask=mask,
            gt_label=mask.flatten(1).any(dim=1),
        )
        for metric in metrics.values():
            metric.update(batch)
    return {name: float(metric.compute()) for name, metric in metrics.items()}


def measure_distances(
    name: str, normal: Tensor, tested: Tensor, masks: Tensor, rows: Rows, top_fractions: Sequence[float]
) -> None:
    """Add the rows of both distances of the residuals of normal and tested images."""
    mahalanobis = ResidualDistance(normal.shape[1], tuple(normal.shape[2:]))
    mahalanobis.fit(normal.split(BATCH_SIZE))
    distances = {
        "L2": torch.linalg.vector_norm(tested, dim=1, keepdim=True),
        "Mahalanobis": torch.cat([mahalanobis(part, torch.zeros_like(part)) for part in tested.split(BATCH_SIZE)]),
    }
    for by, distance in distances.items():
        for fraction in top_fractions:
            rows.measure(f"{name}, {by}, highest {fraction:.2%}", partial(score, distance, masks, fraction))


def load_scaled(category: str, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled features of the good images and of the test images, both (N, C, h, w), and the latter's masks."""
    size = (args.image_size, args.image_size)
    backbone = create_dense_features(
        args.backbone, args.layers, size, args.feature_stride, pre_trained=False, weights=args.weights
    ).eval()
    transform = SAAE.configure_pre_processor(size).transform
    datamodule = MVTecAD(root=args.root, category=category, num_workers=0)
    datamodule.setup()
    train, _ = load(datamodule.train_data, backbone, transform)
    test, masks = load(datamodule.test_data, backbone, transform)
    scale = FeatureScale(backbone.layer_channels, args.feature_scale)
    scale.fit(train.split(BATCH_SIZE))
    return scale(train), scale(test), masks


def measure(category: str, args: argparse.Namespace) -> None:
    train, test, masks = load_scaled(category, args)
    rows = Rows(args.output / f"{category}.json", args)
    place_mean = train.mean(dim=0)
    measure_distances("constant", train - place_mean, test - place_mean, masks, rows, args.top_fractions)
    for share in args.variance:
        components = principal_components(train, share)
        rest = torch.eye(components.shape[1]) - components.T @ components
        normal, tested = (torch.einsum("cd,bdhw->bchw", rest, part) for part in (train, test))
        name = f"PCA, {share:.0%} of the variance, {len(components)} components"
        measure_distances(name, normal, tested, masks, rows, args.top_fractions)


def add_features(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the features and of the image's score."""
    parser.add_argument("--root", type=Path, required=True, help="data in MVTec AD's layout")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_b4")
    parser.add_argument("--weights", type=Path, required=True, help="weights of the backbone in timm's format")
    parser.add_argument("--layers", nargs="+", default=["blocks.1", "blocks.2", "blocks.4"])
    parser.add_argument("--feature_stride", type=int, help="side of a cell in pixels; 8 for a CNN")
    parser.add_argument("--feature_scale", choices=["none", "stage", "channel", "whiten"], default="stage")
    parser.add_argument("--image_size", type=int, default=256)
    parser.add_argument("--top_fractions", type=float, nargs="+", default=[0.01], help="0 for the maximum")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_features(parser)
    parser.add_argument("--variance", type=float, nargs="*", default=[0.8, 0.95], help="shares that the PCAs hold")
    parser.add_argument("--output", type=Path, default=Path("results/untrained"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    for category in args.categories:
        measure(category, args)


if __name__ == "__main__":
    main()
