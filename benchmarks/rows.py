# SPDX-License-Identifier: Apache-2.0

"""Rows of figures that a benchmark writes as they come, and does not measure again."""

import argparse
import json
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from anomalib_recon.files import write_whole

CHOOSE_ROWS = {
    "categories", "category", "demo", "minutes", "models", "output", "process", "recipes", "rows", "seeds", "sources",
    "top_fractions", "variance",
}  # fmt: skip


class Rows:
    """Figures by the name of their row, in a JSON file beside the arguments and the class of the machine.

    Args:
        path (Path): The file. What it has is kept.
        args (argparse.Namespace): Arguments of the benchmark, of which a file has one value each, but for those that
            say which rows to measure.

    Raises:
        SystemExit: If the file has figures of other arguments.
    """

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        self.path = path
        self.arguments = {name: str(value) for name, value in vars(args).items() if name not in CHOOSE_ROWS}
        stored = self._stored()
        self.figures: dict[str, dict[str, Any]] = stored.get("rows", {})
        if self.figures and stored.get("arguments") != self.arguments:
            msg = f"{path} has figures of other arguments, {stored.get('arguments')}; pass another --output."
            raise SystemExit(msg)

    def _stored(self) -> dict[str, Any]:
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def measure(self, name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add a row, unless it is there, write all, and print them as a table.

        Args:
            name (str): Name of the row.
            function (Callable[[], dict[str, Any]]): What measures its figures.

        Returns:
            dict[str, Any]: The figures of the row.
        """
        if name not in self.figures:
            figures = function()
            self.figures.update(self._stored().get("rows", {}))  # what another call may have measured meanwhile
            self.figures[name] = figures
            machine = f"{platform.machine()}, {os.cpu_count()} cores"
            content = {"machine": machine, "arguments": self.arguments, "rows": self.figures}
            write_whole(self.path, json.dumps(content, indent=2).encode())
        print(f"{self.path.stem}\n\n{pd.DataFrame(self.figures).T.to_markdown(floatfmt='.4g')}\n", flush=True)
        return self.figures[name]


def accuracy(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a test by the names that tables have."""
    names = {"image AUROC": "image_AUROC", "pixel AUROC": "pixel_AUROC", "PRO": "pixel_AUPRO"}
    return {name: metrics[key] for name, key in names.items()}
