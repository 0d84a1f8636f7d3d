# SPDX-License-Identifier: Apache-2.0

from collections import Counter

import openvino
import pytest
import torch
from anomalib_recon.models.components.export import comparison_operations, operations_before
from torch import Tensor, nn


class Reconstruction(nn.Module):
    """Compares two layers in the cells of a map that it smooths; the size of the map depends on that of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv2d(3, 8, kernel_size=4, stride=4)
        self.rebuild = nn.Linear(8, 8)
        self.smooth = nn.Conv2d(1, 1, kernel_size=3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        features = self.encode(images).relu()
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


def test_what_a_layer_depends_on_ends_before_it() -> None:
    model = openvino.convert_model(Reconstruction().eval(), example_input=torch.rand(1, 3, 32, 32))
    names = set(operations_before(model, "self.rebuild.weight"))
    kinds = [node.get_type_name() for node in model.get_ordered_ops() if node.get_friendly_name() in names]
    assert kinds.count("Convolution") == 1
    assert "Relu" in kinds
    assert not {"MatMul", "Subtract"} & set(kinds)


def test_a_graph_without_the_layer_is_refused() -> None:
    model = openvino.convert_model(Reconstruction().eval(), example_input=torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"nothing to quantise behind the backbone, no project\.weight; choose int8\."):
        operations_before(model, "project.weight")
