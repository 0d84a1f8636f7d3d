# SPDX-License-Identifier: Apache-2.0

"""Nothing names a device: networks and losses compute where their inputs are, in a precision that every device has."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import anomalib_recon
from anomalib_recon.layers import ResidualDistance
from anomalib_recon.post_processing import RegionPostProcessor
from tests.tiny_models import TINY, build

# what a training would find out
FITTED = {"SAAE": {"latent_dim": 12}}


class StaysOn(TorchDispatchMode):
    """Refuse each tensor, but for single numbers, that is not on a device, and each in double precision."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (value.device.type == self.device or value.dim()):
                assert value.device.type == self.device, f"{function} made a tensor on {value.device}"
                assert value.dtype != torch.float64, f"{function} made a tensor in double precision"
        return result


def network_of(name: str) -> Any:
    model = build(name, **FITTED.get(name, {}))
    if name == "PatchAE":
        model.model.whitening.fit(torch.rand(200, 16))
        model.model.bank.fill(torch.rand(40, 16))
    return model


def train_step(name: str, model: Any, images: Tensor) -> Tensor:
    network = model.model
    if name == "PatchAE":
        return model.loss(images, network.reconstruct(network.embed(images)))
    target = network.embed(images)
    reconstruction = network.reconstruct(target)
    if name == "InTra":
        return model.loss(network.pixels(target), network.pixels(reconstruction))
    return model.loss(target, reconstruction)


def test_a_tensor_elsewhere_or_in_double_precision_is_found() -> None:
    images = torch.rand(2, 3, device="meta")
    wrong: list[Callable[[], Any]] = [lambda: torch.zeros(3), images.double]
    for function in wrong:
        with pytest.raises(AssertionError, match="made a tensor"), StaysOn("meta"):
            function()


@pytest.mark.parametrize("name", TINY)
def test_networks_and_losses_stay_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # which torch lacks for this device; here nothing is in autocast
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    model = network_of(name).to("meta")
    images = torch.rand(2, 3, 64, 64, device="meta")
    with torch.no_grad(), StaysOn("meta"):
        predictions = model.model.eval()(images)
    assert predictions.anomaly_map.shape == (2, 1, 64, 64)
    assert predictions.pred_score.shape == (2,)
    if name != "FeatureInpainting":  # which trains no weight
        with StaysOn("meta"):
            train_step(name, model.train(), images).backward()


def test_a_region_stays_on_the_device() -> None:
    region = RegionPostProcessor([(0, 0), (1, 0), (1, 0.5)]).region.to("meta")
    with StaysOn("meta"):
        assert region.score(region(torch.rand(2, 1, 32, 32, device="meta")), 0.1).shape == (2,)


def test_residuals_are_measured_on_the_device() -> None:
    distance = ResidualDistance(6, (4, 4)).to("meta")
    with StaysOn("meta"):
        distance.fit(torch.randn(10, 6, 4, 4, device="meta") for _ in range(3))
    assert distance.whitening.shape == (4, 6, 6)


def test_the_code_names_no_accelerator() -> None:
    named = re.compile(r"torch\.(cuda|mps|xpu)\b|\.cuda\(|[\"'](cuda|mps|xpu)[\"':]")
    for path in Path(anomalib_recon.__file__).parent.rglob("*.py"):
        assert not named.search(path.read_text(encoding="utf-8")), path
