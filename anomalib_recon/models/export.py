# SPDX-License-Identifier: Apache-2.0

"""Export to ONNX in the operator set in which the graph is made, and to int8 without losing the scores."""

import copy
import functools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.deploy import CompressionType
from torch import nn

from anomalib_recon.layers import ResidualDistance
from anomalib_recon.post_processing import RawScoreExport

if TYPE_CHECKING:
    import openvino

logger = logging.getLogger(__name__)

OPSET_VERSION = 18
# how the names of its parameters begin
BACKBONE = "model.backbone."
# as many as nncf looks at
CALIBRATION_STEPS = 300
LOOPS = {"Loop", "TensorIterator"}
# what an OpenVINO model computes nothing by: what is behind them is no part of the comparison
NOT_COMPUTED = {"Constant", "Parameter", "ShapeOf"}


class CurrentOpsetExport(RawScoreExport):
    """Mixin of models whose graph no converter brings to operator set 14, for which anomalib asks.

    The attempt ends in a printed traceback, and the graph stays as it is.

    Quantisation after training (``int8_ptq``) leaves the comparison of an image with its reconstruction in floating
    point. anomalib would quantise it, too, to the range that it has for the images it calibrates with: with good images
    alone, it cuts off what is anomalous. Of a model with a backbone, it stores the weights in 8 bits, as ``int8`` does:
    channels of a backbone differ in range and would share one, and what follows a backbone takes little of the time.
    It does the same for a model that measures its reconstruction in units of what is normal, where rounding of smooth
    areas is many such units.
    If features are brought to one scale, backbone and the layer behind it keep their weights in floating point: the
    scale enlarges errors of the features, and converters join it with the weights behind, which then differ as much as
    the features did, and share the 8 bits of a row.
    """

    # whether features are brought to one scale behind the backbone
    scales_features = False
    # whether the reconstruction may be computed in 8 bits, if there is no backbone
    reconstructs_in_int8 = True

    @property
    def comparison_layers(self) -> int:
        """Layers with weights that are part of the comparison: a Mahalanobis distance is one."""
        return sum(isinstance(part, ResidualDistance) for part in cast("nn.Module", self).modules())

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
        # of a loop with weights, the exporter would ask for the graph of its gradient
        with torch.no_grad(), _probed_without_computing(self), _tiler_kept(cast("Any", self).model):
            return super().to_onnx(export_root, model_file_name, input_size, **arguments)

    def _compress_ov_model(
        self, model: "openvino.Model", compression_type: CompressionType | None = None, *args: Any, **kwargs: Any
    ) -> "openvino.Model":
        """Compress a copy, in which the graph and the bodies of its loops share no constants: nncf would stumble."""
        model = model.clone()
        if compression_type == CompressionType.INT8:
            import nncf  # noqa: PLC0415  # slow, and only needed here

            kept = comparison_operations(model, 0)
            if self.scales_features:
                kept += [*backbone_operations(model), *layers_behind_backbone(model)]
            compared = comparison_operations(model, self.comparison_layers)
            compressed = nncf.compress_weights(model, ignored_scope=nncf.IgnoredScope(names=kept, validate=False))
            for loop in _loops(compressed):
                if loop.get_friendly_name() not in compared:
                    loop.set_function(nncf.compress_weights(loop.get_function()))
            return compressed
        return super()._compress_ov_model(model, compression_type, *args, **kwargs)  # type: ignore[misc]

    def _post_training_quantization_ov(
        self, model: "openvino.Model", datamodule: AnomalibDataModule | None = None
    ) -> "openvino.Model":
        """Quantise all but the comparison, where anomalib's method of this name quantises all."""
        if backbone_operations(model) or not self.reconstructs_in_int8:
            logger.warning("int8_ptq stores the weights of this model in 8 bits, as int8 does, and computes in more.")
            return self._compress_ov_model(model, CompressionType.INT8)
        import nncf  # noqa: PLC0415  # slow, and only needed here

        if datamodule is None:
            msg = "compression_type=int8_ptq needs images to calibrate with: pass datamodule, or --data in a command."
            raise ValueError(msg)
        datamodule.setup("fit")
        if not hasattr(datamodule, "val_data"):
            msg = "compression_type=int8_ptq needs validation images to calibrate with: pass another val_split_mode."
            raise ValueError(msg)
        images = nncf.Dataset(datamodule.val_dataloader(), lambda batch: batch.image)
        floating = comparison_operations(model, self.comparison_layers)
        quantized = nncf.quantize(model, images, ignored_scope=nncf.IgnoredScope(names=floating))
        for loop in _loops(quantized):
            if loop.get_friendly_name() not in floating:
                steps = list(islice(_steps(quantized, loop, images.get_inference_data()), CALIBRATION_STEPS))
                loop.set_function(nncf.quantize(loop.get_function(), nncf.Dataset(steps)))
        return quantized


@contextmanager
def _probed_without_computing(model: Any) -> Iterator[None]:
    """Give anomalib the outputs' names, for which it calls the model, without the time of an inference."""
    forward = model.forward

    @functools.wraps(forward)
    def probe(images: torch.Tensor) -> Any:
        if torch.compiler.is_exporting():
            return forward(images)
        predictions = InferenceBatch(
            pred_score=images.new_zeros(1), anomaly_map=images.new_zeros(1, 1, *images.shape[-2:])
        )
        return model.post_processor(predictions) if model.post_processor else predictions

    model.forward = probe
    try:
        yield
    finally:
        del model.forward


@contextmanager
def _tiler_kept(network: Any) -> Iterator[None]:
    """Let a copy of the tiler cut the images: it notes sizes, which are symbols here, and cannot be pickled then."""
    tiler = getattr(network, "tiler", None)
    if tiler is None:
        yield
        return
    network.tiler = copy.copy(tiler)
    try:
        yield
    finally:
        network.tiler = tiler


def comparison_operations(model: "openvino.Model", num_layers: int) -> list[str]:
    """Name the operations between the last layers with weights and the outputs of an OpenVINO model.

    Args:
        model (openvino.Model): The model.
        num_layers (int): Layers with weights that are counted in.

    Returns:
        list[str]: Names of the operations.
    """
    return _upstream([value for result in model.get_results() for value in result.input_values()], num_layers)


def backbone_operations(model: "openvino.Model") -> list[str]:
    """Name the operations up to the last layer of the backbone of an OpenVINO model.

    Args:
        model (openvino.Model): The model, exported from ONNX.

    Returns:
        list[str]: Names of the operations.
    """
    parameters = [node for node in model.get_ops() if node.get_friendly_name().startswith(BACKBONE)]
    users = [value.get_node().output(0) for node in parameters for value in node.output(0).get_target_inputs()]
    return _upstream(users, math.inf)


def layers_behind_backbone(model: "openvino.Model") -> list[str]:
    """Name the first layers with weights behind the backbone of an OpenVINO model.

    Args:
        model (openvino.Model): The model, exported from ONNX.

    Returns:
        list[str]: Names of the operations.
    """
    seen = set(backbone_operations(model))
    waiting = [node for node in model.get_ops() if node.get_friendly_name() in seen]
    found: list[openvino.Node] = []
    while waiting:
        for value in (value for output in waiting.pop().outputs() for value in output.get_target_inputs()):
            node, name = value.get_node(), value.get_node().get_friendly_name()
            if name not in seen:
                seen.add(name)
                (found if _has_weights(node) else waiting).append(node)
    return sorted(node.get_friendly_name() for node in found)


def _loops(model: "openvino.Model") -> list[Any]:
    return [node for node in model.get_ops() if node.get_type_name() in LOOPS]


def _steps(model: "openvino.Model", loop: Any, images: Iterable[Any]) -> Iterator[tuple[np.ndarray, ...]]:
    """What the body of a loop sees of images, step by step, if its steps hand on nothing but what they were given."""
    import openvino  # noqa: PLC0415  # slow, and only needed here

    descriptions = sorted(loop.get_input_descriptions(), key=lambda description: description.body_parameter_index)
    inputs = [loop.input_value(description.input_index) for description in descriptions]
    before = openvino.compile_model(openvino.Model(inputs, model.get_parameters(), "before the loop"), "CPU")
    axes = [getattr(description, "axis", None) for description in descriptions]
    for image in images:
        values = list(before(np.asarray(image)).values())
        num_steps = max(value.shape[axis] for value, axis in zip(values, axes, strict=True) if axis is not None)
        for step in range(num_steps):
            yield tuple(
                value if axis is None else value.take([step], axis) for value, axis in zip(values, axes, strict=True)
            )


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
    """Whether it is a layer with weights: neither a filter of a map, of one channel, nor a resize, of four axes.

    A loop is one if its body has one.
    """
    if node.get_type_name() in LOOPS:
        return any(map(_has_weights, node.get_function().get_ops()))
    if node.get_type_name() == "Convolution":
        return node.input_value(1).get_partial_shape()[1].get_length() > 1
    return node.get_type_name() == "MatMul" and len(node.get_output_partial_shape(0)) < 4
