# SPDX-License-Identifier: Apache-2.0

"""What the paper reports beside what was measured."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd

from anomalib_recon.files import write_whole

from .table import ALL, Row, Table

# result of each method and category that has been trained
Results = Mapping[tuple[str, str], Mapping[str, Any]]


def summarise(table: Table, results: Results) -> pd.DataFrame:
    """Compare all results with the paper.

    Args:
        table (Table): The table.
        results (Results): Results of the runs.

    Returns:
        pd.DataFrame: A line for each method, metric and category, and for each mean. ``paper``, ``ours`` and
        ``difference`` are percentages; the paper's figure is missing where it has none.
    """
    lines = []
    for row in table.rows.values():
        trained = [category for name, category in results if name == row.name]
        for metric in table.metrics:
            ours = {name: 100 * results[row.name, name]["metrics"].get(metric, float("nan")) for name in trained}
            lines += [_line(table, row, metric, name, results[row.name, name], ours[name]) for name in trained]
            lines += _means(table, row, metric, ours)
    columns = ["method", "metric", "category", "paper", "ours", "difference", "seed", "training_seconds", "hardware"]
    frame = pd.DataFrame(lines, columns=columns).astype({"paper": float, "ours": float, "seed": "Int64"})
    return frame.assign(difference=frame["ours"] - frame["paper"])


def _line(table: Table, row: Row, metric: str, category: str, result: Mapping[str, Any], ours: float) -> dict[str, Any]:
    known = {name: result[name] for name in ("seed", "training_seconds", "hardware")}
    paper = row.figure(metric, category) if category in table.dataset.categories else None
    return {"method": row.name, "metric": metric, "category": category, "paper": paper, "ours": ours, **known}


def _means(table: Table, row: Row, metric: str, ours: Mapping[str, float]) -> list[dict[str, Any]]:
    """Means over the categories that are there, of ours and of the paper's figures alike."""
    lines = []
    expected = table.categories_of(row)
    for group, members in {**table.dataset.groups, ALL: table.dataset.categories}.items():
        of_paper = [category for category in members if category in expected]
        there = [category for category in of_paper if category in ours]
        if not there:
            continue
        figures = [row.figure(metric, category) for category in there]
        reported = row.figure(metric, group) if there == of_paper else None
        known = [figure for figure in figures if figure is not None]
        computed = sum(known) / len(known) if len(known) == len(figures) else None
        lines.append({
            "method": row.name,
            "metric": metric,
            "category": f"mean of {group} ({len(there)} of {len(of_paper)})",
            "paper": computed if reported is None else reported,
            "ours": sum(ours[category] for category in there) / len(there),
        })  # fmt: skip
    return lines


def missing(table: Table, results: Results) -> dict[str, list[str]]:
    """Categories of the paper that have no result yet, for each method that lacks any."""
    lacking = {
        row.name: [category for category in table.categories_of(row) if (row.name, category) not in results]
        for row in table.rows.values()
    }
    return {name: categories for name, categories in lacking.items() if categories}


def markdown(table: Table, results: Results) -> str:
    """The comparison as a Markdown document.

    Args:
        table (Table): The table.
        results (Results): Results of the runs.

    Returns:
        str: Heading, table, and what is missing.
    """
    frame = summarise(table, results)
    frame["training"] = [_hours(seconds) for seconds in frame.pop("training_seconds")]
    frame["hardware"] = frame.pop("hardware")  # last, because it is long
    frame = frame.astype(object).where(frame.notna(), None)
    parts = [f"# {table.paper}", "Percent. `paper` are the figures of the paper, `ours` those measured here."]
    parts.append(frame.to_markdown(index=False, floatfmt=".2f", missingval=""))
    for method, categories in missing(table, results).items():
        is_all = categories == table.categories_of(table.rows[method])
        parts.append(f"Missing of {method}: {'all categories' if is_all else ', '.join(categories)}.")
    return "\n\n".join(parts) + "\n"


def _hours(seconds: float) -> str | None:
    return None if pd.isna(seconds) else str(timedelta(seconds=round(seconds)))


def write_summary(table: Table, results: Results, folder: Path) -> None:
    """Write ``table.md`` and ``table.csv``."""
    write_whole(folder / "table.md", markdown(table, results).encode())
    write_whole(folder / "table.csv", summarise(table, results).to_csv(index=False).encode())
