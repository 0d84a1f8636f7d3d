# SPDX-License-Identifier: Apache-2.0

"""Exported models, executed beside the checkpoint they come from."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openvino
import torch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from PIL import Image

# a CPU with bfloat16 arithmetic would otherwise use it
FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
BF16 = {"INFERENCE_PRECISION_HINT": "bf16"}


def export(model: AnomalibModule, folder: Path, export_type: ExportType, **kwargs) -> Path:
    engine = Engine(default_root_dir=folder, accelerator="cpu")
    if export_type == ExportType.OPENVINO and "input_size" not in kwargs:
        keep_graph(model)
    path = engine.export(model, export_type, export_root=folder, **kwargs)
    model.eval()
    assert path is not None
    return path


def keep_graph(model: AnomalibModule) -> None:
    """Have torch's exporter run once, however often a model is compressed: it takes most of the time."""
    if "to_onnx" in vars(model):
        return
    to_onnx, kept = model.to_onnx, TemporaryDirectory()

    def to_onnx_once(export_root: Path, *args, **kwargs) -> Path:
        kept_files = list(Path(kept.name).rglob("*.onnx"))
        if not kept_files:
            path = to_onnx(kept.name, *args, **kwargs)
            kept_files = [path]
        shutil.copytree(kept.name, export_root, dirs_exist_ok=True)
        return Path(export_root) / kept_files[0].relative_to(kept.name)

    model.to_onnx = to_onnx_once


def images_of(root: Path, size: tuple[int, int]) -> np.ndarray:
    """All test images of the stripes at a size, ``(10, 3, *size)`` with values in [0, 1]."""
    return read_images(root / "stripes" / "test", size)


def read_images(folder: Path, size: tuple[int, int]) -> np.ndarray:
    """All images of a folder and its folders at a size, ``(N, 3, *size)`` with values in [0, 1]."""
    paths = sorted(folder.rglob("*.png"))
    images = [Image.open(path).convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR) for path in paths]
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255


def expected_from(model: AnomalibModule, images: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in model(torch.from_numpy(images))._asdict().items()}


def run(path: Path, images: np.ndarray, batch_size: int, config: dict[str, str] = FP32) -> dict[str, np.ndarray]:
    compiled = openvino.Core().compile_model(path, "CPU", config)
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    outputs = [compiled(batch) for batch in batches]
    names = [output.any_name for output in compiled.outputs]
    return {name: np.concatenate([output[name] for output in outputs]) for name in names}


def quantised_convolutions(path: Path) -> list[bool]:
    """Whether each convolution of an exported model takes an input in 8 bits, in the order of the graph."""
    convolutions = [
        node
        for node in openvino.Core().read_model(path).get_ordered_ops()
        if node.get_type_name() in {"Convolution", "GroupConvolution"}
    ]
    return [node.input_value(0).get_node().get_type_name() == "FakeQuantize" for node in convolutions]
