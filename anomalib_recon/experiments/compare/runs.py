# SPDX-License-Identifier: Apache-2.0

"""Train, test, export and time each model of a comparison on each data set."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.deploy import ExportType

from anomalib_recon.experiments.training import (
    Trained,
    check_settings,
    hardware,
    parse,
    read_json,
    run_once,
    train,
)
from anomalib_recon.files import write_whole
from anomalib_recon.metrics import RawScoreEvaluator
from anomalib_recon.post_processing.raw_score_export import find_thresholds
from anomalib_recon.training.image_files import levels_of

from .formats import measure_formats
from .plots import cases, chosen_cases
from .scores import (
    Scores,
    maps_and_masks,
    openvino_megabytes,
    openvino_milliseconds,
    score,
    torch_milliseconds,
)
from .training_images import score_training_images, training_picture

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One model on one data set.

    Attributes:
        model (str): Name of the model in the comparison.
        data (str): Name of the data set in the comparison.
        config (Mapping[str, Any]): Config of ``anomalib train``: ``model``, ``data`` and ``trainer``.
        arguments (Sequence[str]): Further arguments of ``anomalib train``.
        seed (int): Seed of the training.
        folder (Path): Folder of this run alone.
        formats (bool): Measure every format of the export, too.
    """

    model: str
    data: str
    config: Mapping[str, Any]
    arguments: Sequence[str]
    seed: int
    folder: Path
    formats: bool

    @property
    def result(self) -> dict[str, Any] | None:
        """Its result, or ``None`` if it has not been finished."""
        return read_json(self.folder / "result.json")

    @property
    def settings(self) -> dict[str, Any]:
        """All that the result depends on."""
        return {
            "config": dict(self.config),
            "arguments": list(self.arguments),
            "seed": self.seed,
            "formats": self.formats,
        }

    def check(self) -> None:
        """Refuse a folder whose run was started with other settings.

        Raises:
            ValueError: If it was.
        """
        check_settings(self.folder, self.settings)

    def read(self) -> None:
        """Build model and data of a run that has not been finished, to find mistakes before any training.

        Raises:
            SystemExit: If an argument is unknown.
            ValueError: If a value does not fit.
        """
        if self.result is None:
            _prepare(parse(self._write_config(), self.folder))

    def run(self) -> None:
        """Train and measure the model unless that has been done; an interrupted training continues.

        Leaves ``result.json``, ``scores.npz``, ``cases.png``, ``training_scores.npz``, ``training_images.png`` and the
        exported model in the folder, and ``formats.json`` if formats are measured.
        """
        run_once(self.folder, self.settings, self._train_and_measure)

    def _train_and_measure(self) -> dict[str, Any]:
        print(f"\n{self.model} on {self.data}", flush=True)
        trained = train(self._write_config(), self.folder, self.seed, _prepare)
        datamodule = trained.datamodule
        # before the test, which takes the training's data from the trainer, and the model from its device
        scores = score(trained)
        chosen = chosen_cases(scores)
        maps, masks = maps_and_masks(trained, [index for _, index in chosen])
        training = score_training_images(trained.model, datamodule.train_data, datamodule.eval_batch_size)
        [metrics] = trained.engine.test(trained.model, datamodule=trained.datamodule)
        found = find_thresholds(trained.model.post_processor)
        threshold = found.image.raw_limit(normalized=found.normalized) if found else math.nan
        write_whole(self.folder / "scores.npz", scores.to_bytes())
        levels = levels_of(datamodule)
        write_whole(self.folder / "cases.png", cases(scores, chosen, maps, masks, threshold, levels))
        write_whole(self.folder / "training_scores.npz", training.to_bytes())
        write_whole(self.folder / "training_images.png", training_picture(training, levels))
        device = trained.engine.trainer.strategy.root_device
        return {
            **metrics,
            "threshold": threshold,
            "torch_ms": torch_milliseconds(trained.model, scores.paths, device),
            **(
                self._measure_formats(trained, scores)
                if self.formats
                else _measure_export(trained, self.folder, scores)
            ),
            "training_seconds": trained.seconds,
            "seed": self.seed,
            "hardware": hardware(trained.engine.trainer),
        }

    def _write_config(self) -> list[str]:
        """Write the config of the training; returns arguments of ``anomalib train``."""
        config = self.folder / "config.yaml"
        write_whole(config, yaml.safe_dump(dict(self.config), sort_keys=False).encode())
        return ["--config", str(config), *self.arguments]

    def _measure_formats(self, trained: Trained, scores: Scores) -> dict[str, float | None]:
        fp32 = measure_formats(trained, scores, self.folder)["fp32"]
        return {"openvino_ms": fp32.get("milliseconds"), "openvino_mb": fp32.get("mb")}


def _prepare(cli: AnomalibCLI) -> None:
    devices = cli.config["train"]["trainer"]["devices"]
    if str(devices) != "1" and not (isinstance(devices, list) and len(devices) == 1):
        msg = f"--trainer.devices {devices}: models are compared on one device; name one, such as [0]."
        raise ValueError(msg)
    cli.model.evaluator = RawScoreEvaluator()
    cli.model.visualizer = None  # the report has its own pictures


def _measure_export(trained: Trained, folder: Path, scores: Scores) -> dict[str, float | None]:
    trained.model.cpu()
    try:
        exported = trained.engine.export(trained.model, ExportType.OPENVINO, export_root=folder)
        assert exported is not None
        milliseconds = openvino_milliseconds(exported, scores.paths)
    except Exception:  # whatever keeps one model from being exported, the others are still to be compared
        logger.exception("The model cannot be exported to OpenVINO or not be run there; its report goes without.")
        return {"openvino_ms": None, "openvino_mb": None}
    return {"openvino_ms": milliseconds, "openvino_mb": openvino_megabytes(exported)}


def read_runs(config: Path, output: Path, arguments: Sequence[str] = ()) -> list[Run]:
    """Read a comparison.

    Args:
        config (Path): YAML file with ``seed``, ``models`` (for each name, ``model`` and ``trainer`` of a config of
            ``anomalib train``) and ``datasets`` (for each name, its ``data``); ``formats: true`` measures every
            format of the export.
        output (Path): Folder of all results.
        arguments (Sequence[str]): Further arguments of ``anomalib train`` for every run.

    Returns:
        list[Run]: Every model on every data set.

    Raises:
        ValueError: If there is no such file, it lacks a part, or two names would share a folder.
    """
    if not config.is_file():
        msg = f"--config must be a file, got {config}; see configs/compare."
        raise ValueError(msg)
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    parts = content if isinstance(content, dict) else {}
    lacking = [key for key in ("models", "datasets") if not isinstance(parts.get(key), dict) or not parts[key]]
    if lacking:
        msg = f"--config {config} has no {' and no '.join(lacking)}: see configs/compare/demo.yaml for the format."
        raise ValueError(msg)
    wrong = [
        name for key in ("models", "datasets") for name, entry in parts[key].items() if not isinstance(entry, dict)
    ]
    if wrong:
        msg = f"--config {config}: {wrong[0]} must have arguments, as in configs/compare/demo.yaml, and has none."
        raise ValueError(msg)
    runs = [
        Run(
            model=str(model),
            data=str(data),
            config={**settings, "data": dataset},
            arguments=arguments,
            seed=content.get("seed", 0),
            folder=output / _folder_name(str(data)) / _folder_name(str(model)),
            formats=content.get("formats", False),
        )
        for data, dataset in content["datasets"].items()
        for model, settings in content["models"].items()
    ]
    if len({run.folder for run in runs}) < len(runs):
        msg = f"--config {config} has names that differ in punctuation alone: choose names that can be folders."
        raise ValueError(msg)
    return runs


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
