# SPDX-License-Identifier: Apache-2.0

"""A short fit by the recommended recipes is ahead of what needs none, on the same features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataset
from lightning import seed_everything
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional

from anomalib_recon.config_files import read_config
from anomalib_recon.data import DemoAD
from anomalib_recon.models import ADTR, SAAE, FeatureInpainting
from tests.tiny_models import engine_in

SIDE = 128
# a backbone of random weights, and a smaller network on it
SMALL = {
    "backbone": "resnet18", "layers": ["layer1", "layer2", "layer3"], "pre_trained": False, "image_size": SIDE,
    "visualizer": False,
}  # fmt: skip
RECIPES: dict[type, tuple[str, dict[str, Any]]] = {
    ADTR: ("recommended/adtr", {"feature_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 4, "mlp_dim": 64}),
    SAAE: ("recommended/saae", {"latent_dim": 32}),
    FeatureInpainting: ("model/feature_inpainting", {"context_dim": 16, "rank": 32, "num_units": 64}),
}


@pytest.fixture(scope="module")
def datamodule(drawn: Path) -> DemoAD:
    return DemoAD(root=drawn, category="plate", train_batch_size=10)


def images_of(dataset: AnomalibDataset) -> Tensor:
    images = [torch.as_tensor(np.asarray(item.image))[None] for item in dataset]
    return torch.cat([functional.interpolate(image, (SIDE, SIDE), mode="bilinear", antialias=True) for image in images])


def masks_of(dataset: AnomalibDataset) -> Tensor:
    masks = [torch.as_tensor(item.gt_mask, dtype=torch.float32)[None, None] for item in dataset]
    return torch.cat([functional.interpolate(mask, (SIDE, SIDE)) for mask in masks]) > 0.5


def figures(distances: Tensor, masks: Tensor) -> tuple[float, float]:
    """Image and pixel AUROC of distances of cells, ``(B, h, w)``; an image's score is its mean top 1 %."""
    maps = functional.interpolate(distances[:, None], (SIDE, SIDE), mode="bilinear").flatten(1)
    scores = maps.topk(SIDE**2 // 100, dim=1).values.mean(dim=1)
    return roc_auc_score(masks.flatten(1).any(dim=1), scores), roc_auc_score(masks.flatten(), maps.flatten())


@pytest.mark.parametrize("model", RECIPES)
def test_a_short_training_is_ahead_of_the_constant_and_of_pca(model: type, datamodule: DemoAD, tmp_path: Path) -> None:
    seed_everything(0)
    name, sizes = RECIPES[model]
    arguments = read_config(f"{name}.yaml")["model"]["init_args"]
    trained = model(**{**arguments, **SMALL, **sizes})
    engine = engine_in(tmp_path, max_epochs=4)
    engine.fit(trained, datamodule=datamodule)
    result = engine.test(trained, datamodule=datamodule, verbose=False)[0]
    image, pixel = result["image_AUROC"], result["pixel_AUROC"]

    backbone = trained.model.extract if model is ADTR else trained.model.backbone
    features, tested = (
        trained.model.scale.standardize(backbone(images_of(dataset))).movedim(1, -1).numpy()
        for dataset in (datamodule.train_data, datamodule.test_data)
    )
    masks = masks_of(datamodule.test_data)
    constant = np.linalg.norm(tested - features.mean(axis=0), axis=-1)
    pca = PCA(0.95).fit(features.reshape(-1, features.shape[-1]))
    cells = tested.reshape(-1, features.shape[-1])
    residual = np.linalg.norm(cells - pca.inverse_transform(pca.transform(cells)), axis=-1)
    for untrained in (constant, residual.reshape(constant.shape)):
        of_images, of_pixels = figures(torch.from_numpy(untrained).float(), masks)
        assert image > of_images + 0.01
        assert pixel > of_pixels + 0.02
