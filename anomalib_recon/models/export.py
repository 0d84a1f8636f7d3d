# SPDX-License-Identifier: Apache-2.0

"""Export to ONNX in the operator set in which the graph is made, and to int8 without losing the scores."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule

if TYPE_CHECKING:
    import openvino

OPSET_VERSION = 18
# what an OpenVINO model computes nothing by: what is behind them is no part of the comparison
NOT_COMPUTED = {"Constant", "Parameter", "ShapeOf"}


class CurrentOpsetExport:
    """Mixin of models whose graph no converter brings to operator set 14, for which anomalib asks.

    The attempt ends in a printed traceback, and the graph stays as it is.

    Quantisation after training (``int8_ptq``) leaves the comparison of an image with its reconstruction, or with normal
    features, in floating point. anomalib would quantise it, too, to the range that it has for the images it calibrates
    with: with good images alone, it cuts off what is anomalous. A backbone stays in floating point, too: its channels
    differ in range, and would share one.
    """

    # layers with weights that are part of the comparison
    comparison_layers = 0
    # what the layer with this parameter depends on is the backbone
    first_own_weight: str | None = None

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX.

        Args:
            export_root (Path | str): Folder for the export.
            model_file_name (str): Name of the file, without ending.
            input_size (tuple[int, int] | None): Height and width of the input; dynamic if ``None``.
            **kwargs (Any): Arguments of ``torch.onnx.export``.

        Returns:
            Path: The exported file.
        """
        arguments = {"opset_version": OPSET_VERSION, **kwargs}
        with torch.no_grad():  # of a loop with weights, the exporter would ask for the graph of its gradient
            return super().to_onnx(export_root, model_file_name, input_size, **arguments)  # type: ignore[misc]

    def _compress_ov_model(self, model: "openvino.Model", *args: Any, **kwargs: Any) -> "openvino.Model":
        """Compress a copy, in which the graph and the bodies of its loops share no constants: nncf would stumble."""
        return super()._compress_ov_model(model.clone(), *args, **kwargs)  # type: ignore[misc]

    def _post_training_quantization_ov(
        self, model: "openvino.Model", datamodule: AnomalibDataModule | None = None
    ) -> "openvino.Model":
        """Quantise all but backbone and comparison, where anomalib's method of this name quantises all."""
        import nncf  # noqa: PLC0415  # slow, and only needed here

        if datamodule is None:
            msg = "compression_type=int8_ptq needs images to calibrate with: pass datamodule, or --data in a command."
            raise ValueError(msg)
        datamodule.setup("fit")
        images = nncf.Dataset(datamodule.val_dataloader(), lambda batch: batch.image)
        floating = set(comparison_operations(model, self.comparison_layers))
        if self.first_own_weight:
            floating |= set(operations_before(model, self.first_own_weight))
        return nncf.quantize(model, images, ignored_scope=nncf.IgnoredScope(names=sorted(floating)))


def comparison_operations(model: "openvino.Model", num_layers: int) -> list[str]:
    """Name the operations between the last layers with weights and the outputs of an OpenVINO model.

    Args:
        model (openvino.Model): The model.
        num_layers (int): Layers with weights that are counted in.

    Returns:
        list[str]: Names of the operations.
    """
    return _upstream([value for result in model.get_results() for value in result.input_values()], num_layers)


def operations_before(model: "openvino.Model", weight: str) -> list[str]:
    """Name the operations of an OpenVINO model that the layer with a certain weight depends on.

    Args:
        model (openvino.Model): The model, exported from ONNX.
        weight (str): Parameter of the layer, as the state dict names it.

    Returns:
        list[str]: Names of the operations.

    Raises:
        ValueError: If no layer has it.
    """
    parameters = (node for node in model.get_ops() if node.get_friendly_name() == weight)
    layers = [value.get_node() for parameter in parameters for value in parameter.output(0).get_target_inputs()]
    if not layers:
        msg = f"compression_type=int8_ptq finds nothing to quantise behind the backbone, no {weight}; choose int8."
        raise ValueError(msg)
    return _upstream([layer.input_value(0) for layer in layers], math.inf)


def _upstream(values: list["openvino.Output"], num_layers: float) -> list[str]:
    """Name the operations that values depend on, up to as many layers with weights."""
    found: dict[str, float] = {}
    waiting = [(value.get_node(), num_layers) for value in values]
    while waiting:
        node, left = waiting.pop()
        left -= _has_weights(node)
        name = node.get_friendly_name()
        if left < 0 or left <= found.get(name, -1) or node.get_type_name() in NOT_COMPUTED:
            continue
        found[name] = left
        waiting += [(value.get_node(), left) for value in node.input_values()]
    return sorted(found)


def _has_weights(node: "openvino.Node") -> bool:
    """Whether it is a layer with weights: neither a filter of a map, of one channel, nor a resize, of four axes."""
    if node.get_type_name() == "Convolution":
        return node.input_value(1).get_partial_shape()[1].get_length() > 1
    return node.get_type_name() == "MatMul" and len(node.get_output_partial_shape(0)) < 4
