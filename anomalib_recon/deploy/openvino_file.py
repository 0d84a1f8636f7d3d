# SPDX-License-Identifier: Apache-2.0

"""Change an OpenVINO model: its outputs, its thresholds, its metadata."""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import openvino
from openvino import opset13 as ops

from .metadata import MODEL_API_SECTION, RAW_MAP, RAW_SCORE, SECTION, Scale, Thresholds

# raw tensor, normalised scores, and what is above the limit
OUTPUTS = {"image": (RAW_SCORE, "pred_score", "pred_label"), "pixel": (RAW_MAP, "anomaly_map", "pred_mask")}


def read_model(path: Path) -> openvino.Model:
    """Read a model.

    Args:
        path (Path): The ``.xml`` or ``.onnx`` file.

    Returns:
        openvino.Model: The model.
    """
    # not mapped into memory: Windows locks such a file, and it could not be replaced
    return openvino.Core().read_model(path, config={"ENABLE_MMAP": False})


def read_metadata(model: openvino.Model) -> dict[str, str]:
    """Read what a model says about its scores.

    Args:
        model (openvino.Model): The model.

    Returns:
        dict[str, str]: Text by its key.
    """
    return model.get_rt_info([SECTION]).value if model.has_rt_info([SECTION]) else {}


def write_metadata(model: openvino.Model, metadata: Mapping[str, str]) -> None:
    """Replace what a model says about its scores, and say for model_api what kind of model it is.

    Args:
        model (openvino.Model): The model.
        metadata (Mapping[str, str]): Text by its key.
    """
    model.set_rt_info("AnomalyDetection", [MODEL_API_SECTION, "model_type"])
    for key, value in metadata.items():
        model.set_rt_info(value, [SECTION, key])


def hide_raw_outputs(model: openvino.Model) -> None:
    """Keep raw score and map as tensors inside a model whose outputs they are.

    Args:
        model (openvino.Model): The model.
    """
    for result in model.get_results():
        source = result.input_value(0)
        names = source.get_names()
        if raw := names & {RAW_SCORE, RAW_MAP}:
            if names - raw:  # scores are raw, and go by the other name
                source.set_names(names - raw)
            model.remove_result(result)


def with_raw_outputs(model: openvino.Model) -> openvino.Model:
    """Make the raw score and map that a model computes its last outputs.

    Args:
        model (openvino.Model): The model, which is changed.

    Returns:
        openvino.Model: The model.
    """
    found = {name for _, names in _named_outputs(model) for name in names}
    model.add_outputs([name for name in (RAW_SCORE, RAW_MAP) if name in found])
    return model


def write_thresholds(model: openvino.Model, thresholds: Thresholds) -> None:
    """Compute the outputs of a model from its raw scores anew.

    Args:
        model (openvino.Model): The model, which is changed.
        thresholds (Thresholds): Thresholds.
    """
    results = {name: result for result in model.get_results() for name in result.input_value(0).get_names()}
    sources = {name: output for output, names in _named_outputs(model) for name in names}
    scales = {"image": thresholds.image, "pixel": thresholds.pixel}
    for kind, scale in scales.items():
        raw, scores, above = OUTPUTS[kind]
        if scale is None or scores not in results:
            continue
        computed = sources.get(raw, sources[scores])
        new_scores = _normalize(computed, scale) if thresholds.normalized else computed
        # of raw scores: a device that computes in half precision would move the others across the limit
        limit = np.float32(scale.raw_limit(normalized=thresholds.normalized))
        is_above = ops.greater(computed, limit).output(0)
        if (inside := _region(results[above].input_value(0))) is not None:
            is_above = ops.logical_and(is_above, inside).output(0)
            if thresholds.normalized:
                new_scores = ops.select(inside, new_scores, np.float32(0)).output(0)
        for name, value in {scores: new_scores, above: is_above}.items():
            if results[name].input_value(0) != value:
                results[name].input_value(0).set_names(set())
                results[name].input(0).replace_source_output(value)
                value.set_names({name})
    write_metadata(model, thresholds.to_metadata())
    model.validate_nodes_and_infer_types()


def save_whole(model: openvino.Model, path: Path) -> None:
    """Write ``.xml`` and ``.bin``, each of them whole or not at all.

    Args:
        model (openvino.Model): The model.
        path (Path): The ``.xml`` file.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        openvino.save_model(model, Path(folder) / path.name, compress_to_fp16=False)
        for suffix in (".bin", ".xml"):
            (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))


def _region(mask: openvino.Output) -> openvino.Output | None:
    """What is inside the region of interest, to which the masks of a model are restricted, if they are."""
    if mask.get_node().get_type_name() != "LogicalAnd":
        return None
    return next(value for value in mask.get_node().input_values() if not _is_from_images(value))


def _is_from_images(value: openvino.Output) -> bool:
    """Whether a value depends on the images, and not on their size alone."""
    waiting = [value.get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return True
        if node.get_type_name() != "ShapeOf":
            waiting += [source.get_node() for source in node.input_values()]
    return False


def _normalize(raw: openvino.Output, scale: Scale) -> openvino.Output:
    difference = ops.subtract(raw, np.float32(scale.threshold))
    centred = ops.add(ops.divide(difference, np.float32(scale.range)), np.float32(0.5))
    return ops.clamp(centred, 0.0, 1.0).output(0)


def _named_outputs(model: openvino.Model) -> Iterator[tuple[openvino.Output, set[str]]]:
    for node in model.get_ops():
        if node.get_type_name() != "Result":
            for output in node.outputs():
                yield output, output.get_names()
