# SPDX-License-Identifier: Apache-2.0

from collections import Counter
from pathlib import Path

import openvino
import pytest
import torch
from torch import Tensor, nn

from anomalib_recon.models.export import backbone_operations, comparison_operations, layers_behind_backbone


class Reconstruction(nn.Module):
    """Compares two layers in the cells of a map that it smooths; the size of the map depends on that of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.rebuild = nn.Linear(8, 8)
        self.smooth = nn.Conv2d(1, 1, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.embed(images).relu()
        rebuilt = self.rebuild(features.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, features.shape[-2:])
        distance = torch.linalg.vector_norm(features - rebuilt, dim=1, keepdim=True)
        return nn.functional.interpolate(self.smooth(distance), size=images.shape[-2:])


@pytest.mark.parametrize(("num_layers", "convolutions", "products"), [(0, 1, 0), (1, 2, 1)])
def test_the_comparison_ends_at_the_layers_with_weights(num_layers: int, convolutions: int, products: int) -> None:
    model = openvino.convert_model(Reconstruction().eval(), example_input=torch.rand(1, 3, 32, 32))
    names = set(comparison_operations(model, num_layers))
    kinds = Counter(node.get_type_name() for node in model.get_ordered_ops() if node.get_friendly_name() in names)
    assert {"Subtract", "Interpolate"} <= kinds.keys()
    assert kinds["Convolution"] == convolutions
    assert kinds["MatMul"] == products


class WithBackbone(nn.Module):
    """A network as a model holds it: its parameters have the names of an export."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "backbone": nn.Sequential(nn.Conv2d(3, 8, kernel_size=4, stride=4), nn.ReLU(), nn.Conv2d(8, 8, 1)),
                "reduce": nn.Conv2d(8, 4, kernel_size=1),
            }
        )

    def forward(self, images: Tensor) -> Tensor:
        # a scale that the converter joins with the weights behind it
        return self.model["reduce"](self.model["backbone"](images).relu() / torch.arange(1.0, 9)[:, None, None])


def test_the_backbone_ends_at_its_last_layer(tmp_path: Path) -> None:
    torch.onnx.export(WithBackbone().eval(), (torch.rand(1, 3, 32, 32),), tmp_path / "model.onnx", dynamo=True)
    model = openvino.convert_model(tmp_path / "model.onnx")
    names = set(backbone_operations(model))
    kinds = Counter(node.get_type_name() for node in model.get_ordered_ops())
    found = Counter(node.get_type_name() for node in model.get_ordered_ops() if node.get_friendly_name() in names)
    assert kinds["Convolution"] == 3
    assert found["Convolution"] == 2
    assert found["Relu"] == 1
    [reduce] = layers_behind_backbone(model)
    assert reduce not in names
    assert next(node for node in model.get_ops() if node.get_friendly_name() == reduce).shape == [1, 4, 8, 8]


def test_a_graph_without_a_backbone_has_none() -> None:
    model = openvino.convert_model(Reconstruction().eval(), example_input=torch.rand(1, 3, 32, 32))
    assert backbone_operations(model) == []
