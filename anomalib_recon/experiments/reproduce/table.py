# SPDX-License-Identifier: Apache-2.0

"""A table of a paper, as the files in ``configs/reproduce`` describe it: what to train, and what the paper reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from anomalib_recon.config_files import config_path, read_config

ALL = "all"


@dataclass(frozen=True)
class Dataset:
    """A data set of the papers.

    Attributes:
        class_path (str): Its datamodule.
        category_argument (str): Argument of ``anomalib train`` that names the category.
        root (str): Where its data lie unless told otherwise.
        groups (Mapping[str, tuple[str, ...]]): Categories that the papers average over; together they are all.
        is_downloaded (bool): Whether the datamodule makes all categories available, wherever it is used.
    """

    class_path: str
    category_argument: str
    root: str
    groups: Mapping[str, tuple[str, ...]]
    is_downloaded: bool = False

    @property
    def categories(self) -> tuple[str, ...]:
        """All categories, in the order of the papers."""
        return tuple(category for group in self.groups.values() for category in group)


DATASETS = {
    "MVTecAD": Dataset(
        class_path="anomalib.data.MVTecAD",
        category_argument="data.category",
        root="datasets/MVTecAD",
        groups={
            "textures": ("carpet", "grid", "leather", "tile", "wood"),
            "objects": (
                "bottle", "cable", "capsule", "hazelnut", "metal_nut",
                "pill", "screw", "toothbrush", "transistor", "zipper",
            ),
        },
    ),
    "OneClassCIFAR10": Dataset(
        class_path="anomalib_recon.data.OneClassCIFAR10",
        category_argument="data.normal_class",
        root="datasets/CIFAR",
        groups={
            ALL: (
                "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
            ),
        },
        is_downloaded=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A method of a table.

    Attributes:
        name (str): Its name.
        config (str): Config of ``anomalib train``, inside the folder ``configs``.
        categories (str | None): File inside the folder ``configs`` with the arguments in which categories, or groups of
            them, differ from the config.
        after (str | None): Row whose training has to come first.
        overrides (Mapping[str, Any]): Arguments of ``anomalib train`` in which the row differs from that. In texts,
            ``{checkpoint}`` and the names of hyper-parameters stand for those of the row ``after``.
        overrides_for (Mapping[str, Mapping[str, Any]]): The same for a category or a group of categories.
        figures_of_the_paper (Mapping[str, Mapping[str, float]]): For each metric, the paper's figures in percent of
            categories, of groups and of ``"all"``, as far as it has them.
    """

    name: str
    config: str
    categories: str | None = None
    after: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    overrides_for: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    figures_of_the_paper: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def figure(self, metric: str, category: str) -> float | None:
        """The paper's figure of a category or group in percent, or ``None`` where it has none."""
        return self.figures_of_the_paper.get(metric, {}).get(category)


@dataclass(frozen=True)
class Table:
    """A table of a paper.

    Attributes:
        name (str): Name of its file.
        paper (str): Paper and number of the table.
        dataset (Dataset): Its data.
        rows (Mapping[str, Row]): Its methods.
    """

    name: str
    paper: str
    dataset: Dataset
    rows: Mapping[str, Row]

    @property
    def metrics(self) -> list[str]:
        """Metrics that the table reports, by anomalib's names."""
        return list(dict.fromkeys(metric for row in self.rows.values() for metric in row.figures_of_the_paper))

    def categories_of(self, row: Row) -> list[str]:
        """Categories that the paper has trained a row on: those it gives figures of, or all if it gives only means."""
        with_figures = {category for figures in row.figures_of_the_paper.values() for category in figures}
        return [name for name in self.dataset.categories if name in with_figures] or list(self.dataset.categories)

    def overrides_of(self, row: Row, category: str) -> dict[str, Any]:
        """Arguments of ``anomalib train`` for a row and category that differ from its config."""
        groups = [group for group, categories in self.dataset.groups.items() if category in categories]
        names = (*groups, category)
        shared = read_config(row.categories) if row.categories else {}
        parts = [*(shared.get(name, {}) for name in names), row.overrides]
        parts += [row.overrides_for.get(name, {}) for name in names]
        return {argument: value for part in parts for argument, value in part.items()}


def table_names() -> list[str]:
    """Names of the tables that can be reproduced."""
    return sorted(path.stem for path in config_path("reproduce").glob("*.yaml"))


def read_table(name: str) -> Table:
    """Read a table by its name, one of :func:`table_names`."""
    content = read_config(f"reproduce/{name}.yaml")
    rows = {name: Row(name, **row) for name, row in content["rows"].items()}
    return Table(name, content["paper"], DATASETS[content["dataset"]], rows)
