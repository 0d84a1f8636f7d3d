# SPDX-License-Identifier: Apache-2.0

"""Raw scores of the test images, and the speed of a model on single images."""

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from pathlib import Path

import numpy as np
import openvino
import torch
from anomalib.data.utils import read_image
from anomalib.models import AnomalibModule
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from anomalib_recon.experiments.training import Trained
from anomalib_recon.training import score_images

PICTURE_SIZE = 192
WARM_UP = 2
REPEATS = 10

# from images of shape (B, 3, H, W) to what an exported model gives, by name
Infer = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Scores:
    """Scores of N test images, before normalisation.

    Attributes:
        paths (list[str]): Their files.
        labels (NDArray[np.bool_]): Which are anomalous, (N,).
        scores (NDArray[np.float64]): Anomaly scores, (N,).
    """

    paths: list[str]
    labels: NDArray[np.bool_]
    scores: NDArray[np.float64]

    def to_bytes(self) -> bytes:
        """Content of an ``.npz`` file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, paths=np.array(self.paths), labels=self.labels, scores=self.scores)
        return buffer.getvalue()

    @classmethod
    def read(cls, path: Path) -> "Scores":
        """Read an ``.npz`` file."""
        with np.load(path) as content:
            return cls(content["paths"].tolist(), content["labels"], content["scores"])


def score(trained: Trained) -> Scores:
    """Score the test images.

    Args:
        trained (Trained): The model.

    Returns:
        Scores: Their scores, in the order of the test set.
    """
    trainer = trained.engine.trainer
    trained.model.to(trainer.strategy.root_device)
    paths: list[str] = []
    labels: list[bool] = []
    scores: list[float] = []
    for batch in score_images(trainer, trained.model, trained.datamodule.test_data):
        assert batch.image_path is not None
        assert batch.gt_label is not None
        assert batch.pred_score is not None
        paths += [str(path) for path in batch.image_path]
        labels += batch.gt_label.tolist()
        scores += batch.pred_score.flatten().double().tolist()
    return Scores(paths, np.array(labels, dtype=np.bool_), np.array(scores))


def maps_and_masks(trained: Trained, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Score some of the test images again, for pictures.

    Args:
        trained (Trained): The model.
        indices (Sequence[int]): Their places in the test set.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Raw anomaly maps and ground truth masks, both
        ``(N, PICTURE_SIZE, PICTURE_SIZE)``, with NaN where the model makes no map or the data have no mask.
    """
    shown = sorted(set(indices))
    some = trained.datamodule.test_data.subsample(shown)
    maps, masks = [], []
    for batch in score_images(trained.engine.trainer, trained.model, some):
        maps.append(_as_picture(batch.anomaly_map, batch.batch_size))
        masks.append(_as_picture(batch.gt_mask, batch.batch_size))
    places = [shown.index(index) for index in indices]
    return torch.cat(maps)[places], torch.cat(masks)[places]


def _as_picture(values: torch.Tensor | None, batch_size: int) -> torch.Tensor:
    if values is None:
        return torch.full((batch_size, PICTURE_SIZE, PICTURE_SIZE), float("nan"))
    values = values.detach().float().reshape(batch_size, 1, *values.shape[-2:])
    return interpolate(values, (PICTURE_SIZE, PICTURE_SIZE), mode="bilinear", antialias=True)[:, 0].cpu()


def torch_milliseconds(model: AnomalibModule, paths: Sequence[str], device: torch.device) -> float:
    """Median time from an image in memory to its normalised score and map, as in an exported model.

    Args:
        model (AnomalibModule): The model.
        paths (Sequence[str]): Images.
        device (torch.device): Where to run it.

    Returns:
        float: Milliseconds for one image, of its own size.
    """
    model.eval().to(device)

    def infer(image: torch.Tensor) -> None:
        model(image.to(device))
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    with torch.inference_mode():
        return median_milliseconds([infer], paths)[0]


def openvino_milliseconds(model: Path, paths: Sequence[str]) -> float:
    """The same for an OpenVINO model (``.xml``) on the CPU, in fp32."""
    compiled = compile_openvino(model)
    return median_milliseconds([openvino_inference(compiled)], paths)[0] / fixed_batch(compiled)


def compile_openvino(model: Path, precision: str = "f32", **config: str) -> openvino.CompiledModel:
    """Compile an OpenVINO model for the CPU.

    Args:
        model (Path): The ``.xml`` file.
        precision (str): Arithmetic, ``"f32"`` or ``"bf16"``; left alone, OpenVINO takes the latter where the CPU can.
        **config (str): Further properties of OpenVINO.

    Returns:
        openvino.CompiledModel: The model.
    """
    return openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision, **config})


def openvino_megabytes(model: Path) -> float:
    """Size of an OpenVINO model (``.xml``) with its weights."""
    return sum(model.with_suffix(suffix).stat().st_size for suffix in (".xml", ".bin")) / 1e6


def fixed_batch(compiled: openvino.CompiledModel) -> int:
    """Number of images that a graph takes at a time, if that is fixed, as in anomalib's PatchCore; or else 1."""
    size = compiled.input(0).partial_shape[0]
    return size.get_length() if size.is_static else 1


def openvino_inference(compiled: openvino.CompiledModel) -> Infer:
    """Make a function of an OpenVINO model, from an image of shape ``(1, 3, H, W)`` to its outputs by name.

    The image is repeated for a graph of a fixed batch.
    """
    batch_size = fixed_batch(compiled)

    def infer(image: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = compiled(image.expand(batch_size, -1, -1, -1).numpy())
        return {output.any_name: torch.from_numpy(outputs[output][:1]) for output in compiled.outputs}

    return infer


def median_milliseconds(inferences: Sequence[Callable[[torch.Tensor], object]], paths: Sequence[str]) -> list[float]:
    """Median time of each function for an image of its own size, all timed in turns.

    So their ratios hold on a machine whose speed drifts.
    """
    milliseconds = []
    for path in islice(cycle(paths), WARM_UP + REPEATS):
        image = read_image(path, as_tensor=True)
        assert isinstance(image, torch.Tensor)
        times = [time.perf_counter()]
        for infer in inferences:
            infer(image[None])
            times.append(time.perf_counter())
        milliseconds.append([1000 * (end - start) for start, end in pairwise(times)])
    return [statistics.median(column) for column in zip(*milliseconds[WARM_UP:], strict=True)]
