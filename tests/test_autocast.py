# SPDX-License-Identifier: Apache-2.0

"""Losses and maps are computed in single precision, also where the trainer has the network computed in half."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from anomalib_recon.models.adtr.anomaly_map import AnomalyMapGenerator as ADTRMap
from anomalib_recon.models.adtr.loss import ImageLoss, NormalLoss, PixelLoss
from anomalib_recon.models.intra.anomaly_map import AnomalyMapGenerator as InTraMap
from anomalib_recon.models.intra.loss import InTraLoss
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.models.patch_ae.loss import HybridLoss
from anomalib_recon.models.patch_ae.torch_model import PatchAEModel
from anomalib_recon.models.saae.anomaly_map import AnomalyMapGenerator as SAAEMap
from anomalib_recon.models.saae.loss import SAAELoss

SIZE = (64, 48)
Comparison = Callable[[Tensor, Tensor], Tensor]


def intra() -> InTraModel:
    torch.manual_seed(0)
    return InTraModel(SIZE, 8, 5, embed_dim=16, depth=1, num_heads=2, distance="mahalanobis")


def as_patches(images: Tensor) -> Tensor:
    return intra().embed(images)


# of a target (2, 3, 64, 48), which may be in half precision itself, with its reconstruction
FEATURES: dict[str, Comparison] = {
    "ADTR's loss": NormalLoss(),
    "ADTR+'s loss of pixels": lambda *pair: PixelLoss(0.003)(*pair, torch.eye(64, 48).expand(2, -1, -1)),
    "ADTR+'s loss of images": lambda *pair: ImageLoss(0.003, 5)(*pair, torch.tensor([0, 1])),
    "ADTR's map": ADTRMap((128, 96), 4),
    "ADTR's score": lambda *pair: ADTRMap((128, 96), 4).score(ADTRMap((128, 96), 4)(*pair)),
    "SAAE's loss": SAAELoss("norm"),
    "SAAE's loss of squares": SAAELoss("mse"),
    "SAAE's map": SAAEMap((128, 96), "norm"),
    "InTra's loss": InTraLoss(),
    "InTra's difference": InTraMap(SIZE).difference,
    "InTra's distance": lambda *pair: intra().mahalanobis(*pair),
    "InTra's map": lambda *pair: intra().compare(*map(as_patches, pair)).anomaly_map,
}


@pytest.fixture(scope="module")
def patch_ae() -> PatchAEModel:
    torch.manual_seed(0)
    model = PatchAEModel("resnet18", pre_trained=False, image_size=SIZE, embed_dim=3, sigma=2.0)
    normal = torch.rand(200, 3)
    model.whitening.fit(normal)
    model.bank.fill(model.whitening.whiten(normal))
    return model


def assert_single_precision(compare: Comparison, target: Tensor, reconstruction: Tensor) -> None:
    """The result in autocast is that of the same numbers in single precision without it."""
    with torch.no_grad():
        expected = compare(target.float(), reconstruction.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = compare(target, reconstruction)
    assert result.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A target, and its reconstruction in half precision, which differs little."""
    target, noise = torch.rand(2, 2, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    return target.to(dtype), (target + 0.01 * noise).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_comparisons_of_features_and_patches(name: str, dtype: torch.dtype) -> None:
    assert_single_precision(FEATURES[name], *draw(dtype))


def test_comparisons_of_patch_ae(patch_ae: PatchAEModel) -> None:
    assert_single_precision(HybridLoss(0.5, 8), *draw())
    assert_single_precision(lambda *pair: patch_ae.compare_pixels(*pair).anomaly_map, *draw())
    codes = draw()[1][:, :, :8, :6]
    assert_single_precision(lambda codes, _: patch_ae.compare(codes).anomaly_map, codes, codes)
