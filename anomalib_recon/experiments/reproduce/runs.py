# SPDX-License-Identifier: Apache-2.0

"""Train the cells of a table: one method on one category each."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib_recon.config_files import config_path, read_config
from anomalib_recon.experiments.training import check_settings, hardware, read_json, run_once, train

from .table import Row, Table


@dataclass(frozen=True)
class Runs:
    """The trainings of a table.

    Attributes:
        table (Table): The table.
        root (Path): Folder of the data set.
        folder (Path): Folder of the results of this table.
        arguments (Sequence[str]): Further arguments of ``anomalib train``.
        seed (int): Seed of each training.
    """

    table: Table
    root: Path
    folder: Path
    arguments: Sequence[str]
    seed: int

    def folder_of(self, row: Row, category: str) -> Path:
        """Folder of a cell."""
        return self.folder / row.name.replace(" ", "_") / category

    def result(self, row: Row, category: str) -> dict[str, Any] | None:
        """Result of a cell, or ``None`` if it has not been finished."""
        return read_json(self.folder_of(row, category) / "result.json")

    def check(self, row: Row, category: str) -> None:
        """Refuse a cell that was trained with other settings, or that starts from one that was.

        Raises:
            ValueError: If it was.
        """
        if row.after:
            self.check(self.table.rows[row.after], category)
        check_settings(self.folder_of(row, category), self._settings(row, category))

    def run(self, row: Row, category: str) -> dict[str, Any]:
        """Train and test a cell, unless that has been done, and first the one it starts from.

        Returns:
            dict[str, Any]: The result: metrics in [0, 1], seconds of training, hardware, seed, checkpoint and
            hyper-parameters.
        """
        start: dict[str, Any] = {}
        if row.after:
            first = self.table.rows[row.after]
            start = self.run(first, category)
            start["checkpoint"] = self.folder_of(first, category) / start["checkpoint"]
        return run_once(
            self.folder_of(row, category),
            self._settings(row, category),
            lambda: self._train_and_test(row, category, start),
        )

    def _train_and_test(self, row: Row, category: str, start: dict[str, Any]) -> dict[str, Any]:
        folder = self.folder_of(row, category)
        print(f"\n{self.table.name}: {row.name} on {category}", flush=True)
        trained = train(self._arguments(row, category, start), folder, self.seed)
        [metrics] = trained.engine.test(trained.model, datamodule=trained.datamodule)
        checkpoint = Path(trained.engine.best_model_path or "").resolve().relative_to(folder.resolve())
        plain = {key: value for key, value in trained.model.hparams.items() if isinstance(value, int | float | str)}
        return {
            "metrics": metrics,
            "training_seconds": trained.seconds,
            "hardware": hardware(trained.engine.trainer),
            "seed": self.seed,
            "checkpoint": str(checkpoint),
            "hyper_parameters": plain,
        }

    def _settings(self, row: Row, category: str) -> dict[str, Any]:
        return {
            "config": read_config(row.config),
            "overrides": self.table.overrides_of(row, category),
            "arguments": list(self.arguments),
            "seed": self.seed,
            "root": None if self.table.dataset.is_downloaded else str(self.root.resolve()),
        }

    def _arguments(self, row: Row, category: str, start: dict[str, Any]) -> list[str]:
        dataset = self.table.dataset
        arguments = ["--config", str(config_path(row.config))]
        if "data" not in read_config(row.config):
            arguments += ["--data", dataset.class_path]
        arguments += [f"--data.root={self.root}", f"--{dataset.category_argument}={category}"]
        known = {**start.get("hyper_parameters", {}), "checkpoint": start.get("checkpoint")}
        for name, value in self.table.overrides_of(row, category).items():
            text = value.format(**known) if isinstance(value, str) else json.dumps(value)
            arguments.append(f"--{name}={text}")
        return [*arguments, *self.arguments]
