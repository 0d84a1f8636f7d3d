# SPDX-License-Identifier: Apache-2.0

"""An exported model, run by OpenVINO or ONNX Runtime."""

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import onnx_file
from .grey_levels import GreyLevels
from .images import resize
from .metadata import RAW_MAP, RAW_SCORE, REGION_SHARE, Thresholds

Outputs = dict[str, NDArray[Any]]
# some CPUs would otherwise compute in bfloat16, which moves the scores
FP32 = {"INFERENCE_PRECISION_HINT": "f32"}
# by how much an image that was resized may leave [0, 1]
TOLERANCE = 0.01


class _Graph(NamedTuple):
    run: Callable[[NDArray[np.float32]], Outputs]
    # of the input (B, 3, H, W); None where it is free
    shape: tuple[int | None, ...]
    metadata: Mapping[str, str]


class ExportedModel:
    """An exported model that scores images as its checkpoint does, raw scores included.

    It needs numpy, and openvino for an ``.xml`` file or onnxruntime for an ``.onnx`` file. It serves one thread.

    Args:
        path (str | Path): The ``.xml`` or ``.onnx`` file.
        device (str): Device of OpenVINO, or ``"CPU"``.
            Defaults to ``"CPU"``.
        config (Mapping[str, Any] | None): Properties of OpenVINO. Defaults to ``None``, which means arithmetic in fp32.

    Raises:
        ValueError: If the file has another ending, or does not exist.

    Example:
        >>> from anomalib_recon.deploy import ExportedModel, read_image
        >>> model = ExportedModel("model.xml")  # doctest: +SKIP
        >>> model(read_image("image.png", model.levels)[None])["raw_score"]  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, device: str = "CPU", config: Mapping[str, Any] | None = None) -> None:
        path = Path(path)
        if path.suffix not in {".xml", ".onnx"}:
            msg = f"path must end in .xml or .onnx, got {path}; export the model to OpenVINO or ONNX."
            raise ValueError(msg)
        for file in (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,):
            if not file.is_file():
                msg = f"path must be an exported model, got {path}, but {file} is no file."
                raise ValueError(msg)
        if path.suffix == ".xml":
            self._graph = _open_openvino(path, device, dict(FP32 if config is None else config))
        else:
            self._graph = _open_onnx(path)

    @property
    def batch_size(self) -> int | None:
        """Number of images that the graph takes at a time, if that is fixed, as in anomalib's PatchCore."""
        return self._graph.shape[0]

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the images that the graph takes, if they are fixed; otherwise it resizes them itself."""
        height, width = self._graph.shape[-2:]
        return None if height is None or width is None else (height, width)

    @cached_property
    def thresholds(self) -> Thresholds:
        """Thresholds that the file names.

        Raises:
            ValueError: If it names none.
        """
        return Thresholds.from_metadata(self._graph.metadata)

    @property
    def region_share(self) -> float:
        """Share of the image that is inside the region of interest; 1 for a model without one."""
        return float(self._graph.metadata.get(REGION_SHARE, 1))

    @cached_property
    def levels(self) -> GreyLevels | None:
        """Levels of the images that the model was trained on, if they had more than 8 bits of grey."""
        return GreyLevels.from_metadata(self._graph.metadata)

    def __call__(self, images: NDArray[np.float32]) -> Outputs:
        """Score images.

        Args:
            images (NDArray[np.float32]): B images of shape ``(B, 3, H, W)``, RGB, values in [0, 1].

        Returns:
            Outputs: ``pred_score``, ``pred_label``, ``anomaly_map``, ``pred_mask`` as in anomalib, ``raw_score`` and
                ``raw_map``, each with B rows, as far as the model has them.

        Raises:
            ValueError: If the images have another shape, or values out of their range.
        """
        _check_images(images)
        images = images.astype(np.float32, copy=False)
        if self.image_size:
            images = resize(images, self.image_size)
        size = self.batch_size
        if not size:
            return self._graph.run(images)
        parts = [self._run_padded(images[start : start + size], size) for start in range(0, len(images), size)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _run_padded(self, images: NDArray[np.float32], batch_size: int) -> Outputs:
        count = len(images)
        padded = np.concatenate([images, np.repeat(images[-1:], batch_size - count, axis=0)])
        return {name: value[:count] for name, value in self._graph.run(padded).items()}


def _check_images(images: NDArray[Any]) -> None:
    if images.ndim != 4 or images.shape[1] != 3:
        msg = f"images must have the shape (B, 3, H, W), got {images.shape}."
        raise ValueError(msg)
    if not np.issubdtype(images.dtype, np.floating):
        msg = f"images must be floating-point numbers in [0, 1], got {images.dtype}; divide 8-bit values by 255."
        raise ValueError(msg)
    if images.size and not (images.min() >= -TOLERANCE and images.max() <= 1 + TOLERANCE):  # nor NaN
        msg = (
            f"images must have values in [0, 1], got {images.min():g} to {images.max():g}; divide 8-bit values by 255."
        )
        raise ValueError(msg)


def _open_openvino(path: Path, device: str, config: dict[str, Any]) -> _Graph:
    import openvino  # noqa: PLC0415  # an ONNX model runs without

    from . import openvino_file  # noqa: PLC0415

    model = openvino_file.with_raw_outputs(openvino_file.read_model(path))
    compiled = openvino.Core().compile_model(model, device, config)
    request = compiled.create_infer_request()
    names = [output.any_name for output in compiled.outputs]

    def run(images: NDArray[np.float32]) -> Outputs:
        outputs = request.infer(images)
        return _with_raw({name: np.array(value) for name, value in zip(names, outputs.values(), strict=True)})

    shape = tuple(axis.get_length() if axis.is_static else None for axis in compiled.input(0).partial_shape)
    return _Graph(run, shape, openvino_file.read_metadata(model))


def _open_onnx(path: Path) -> _Graph:
    import onnxruntime  # noqa: PLC0415  # an OpenVINO model runs without

    content = path.read_bytes()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
    session = onnxruntime.InferenceSession(
        onnx_file.with_raw_outputs(content), options, providers=["CPUExecutionProvider"]
    )
    [entry] = session.get_inputs()
    names = [output.name for output in session.get_outputs()]

    def run(images: NDArray[np.float32]) -> Outputs:
        return _with_raw(dict(zip(names, session.run(names, {entry.name: images}), strict=True)))

    shape = tuple(axis if isinstance(axis, int) else None for axis in entry.shape)
    return _Graph(run, shape, onnx_file.read_metadata(content))


def _with_raw(outputs: Outputs) -> Outputs:
    """Name the raw scores of a model that gives out no others."""
    raw = {RAW_SCORE: "pred_score", RAW_MAP: "anomaly_map"}
    return {**{name: outputs[other] for name, other in raw.items() if other in outputs}, **outputs}
