# SPDX-License-Identifier: Apache-2.0

"""The report of a comparison: a table, plots and one HTML file that holds them all."""

import base64
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from anomalib_recon.experiments.training import read_json
from anomalib_recon.files import write_whole

from .plots import histograms, roc_curves, speed_against_accuracy
from .ranking import advise, rank_models
from .runs import Run
from .scores import Scores
from .training_images import oddest, short_names

# column of results.csv, its heading, number format, and whether a higher value is better (None: neither)
COLUMNS: tuple[tuple[str, str, str, bool | None], ...] = (
    ("image_AUROC", "image AUROC", "{:.3f}", True),
    ("pixel_AUROC", "pixel AUROC", "{:.3f}", True),
    ("pixel_AUPRO", "PRO", "{:.3f}", True),
    ("image_F1Score", "image F1", "{:.3f}", True),
    ("threshold", "threshold", "{:.4g}", None),
    ("torch_ms", "torch, ms", "{:.1f}", False),
    ("openvino_ms", "OpenVINO, ms", "{:.1f}", False),
    ("openvino_mb", "size, MB", "{:.1f}", False),
    ("training_seconds", "training, s", "{:.0f}", False),
)

# column of formats.csv, its heading and number format
FORMAT_COLUMNS: dict[str, tuple[str, str]] = {
    "milliseconds": ("ms", ".1f"),
    "speed_up": ("times as fast as torch", ".2f"),
    "images_per_second": ("images/s", ".1f"),
    "mb": ("MB", ".1f"),
    "image_AUROC": ("image AUROC", ".4f"),
    "image_AUROC_change": ("change", "+.4f"),
    "pixel_AUROC": ("pixel AUROC", ".4f"),
    "pixel_AUROC_change": ("change ", "+.4f"),
}


def results_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Results of all finished runs, a line for each, in the order of the comparison."""
    lines = [{"data": run.data, "model": run.model, **result} for run in runs if (result := run.result) is not None]
    frame = pd.DataFrame(lines)
    return frame.reindex(columns=[*frame.columns, *(name for name, *_ in COLUMNS if name not in frame.columns)])


def table_rows(frame: pd.DataFrame) -> list[dict[str, object]]:
    """Lines of a table as texts: ``model`` and ``cells``, each a text and whether it is the best of its column."""
    best = {
        name: frame[name].max() if is_higher_better else frame[name].min()
        for name, _, _, is_higher_better in COLUMNS
        if is_higher_better is not None and len(frame) > 1
    }
    return [
        {
            "model": line["model"],
            "cells": [
                ("" if pd.isna(line[name]) else form.format(line[name]), line[name] == best.get(name))
                for name, _, form, _ in COLUMNS
            ],
        }
        for line in frame.to_dict("records")
    ]


def formats_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """Figures of the formats in which models were exported, a line for each data set, model and format."""
    frames = {}
    for run in runs:
        if rows := read_json(run.folder / "formats.json"):
            frame = pd.DataFrame(list(rows.values()), index=list(rows), columns=list(FORMAT_COLUMNS))
            for metric in ("image_AUROC", "pixel_AUROC"):
                frame[f"{metric}_change"] = frame[metric] - frame.at["torch", metric]
            frames[run.data, run.model] = frame
    return pd.concat(frames, names=["data", "model", "format"])[list(FORMAT_COLUMNS)]


def formats_tables(frame: pd.DataFrame) -> str:
    """The same as Markdown, with a table for each data set."""
    frame = frame.astype(object).where(frame.notna(), None)
    tables = [
        f"## {data}\n\n"
        + frame.loc[data]
        .rename(columns={name: heading for name, (heading, _) in FORMAT_COLUMNS.items()})
        .reset_index()
        .to_markdown(index=False, floatfmt=("", "", *(form for _, form in FORMAT_COLUMNS.values())), missingval="")
        for data in frame.index.unique("data")
    ]
    return "\n\n".join(tables) + "\n"


def write_report(runs: Sequence[Run], title: str, output: Path) -> Path:
    """Write ``report.html``, ``results.csv`` and the plots of all finished runs.

    Where formats were measured, ``formats.md`` and ``formats.csv``, too.

    Args:
        runs (Sequence[Run]): The runs of the comparison.
        title (str): Heading of the report.
        output (Path): Folder to write to.

    Returns:
        Path: The HTML file.

    Raises:
        ValueError: If no run is finished.
    """
    finished = [run for run in runs if run.result is not None]
    if not finished:
        msg = f"--output {output} holds no finished run of this comparison: run it without --only_report."
        raise ValueError(msg)
    frame = results_frame(finished)
    pictures = {"speed.png": speed_against_accuracy(frame)}
    sections = []
    all_scores: dict[tuple[str, str], Scores] = {}
    for data in frame["data"].unique():
        members = {run.model: run for run in finished if run.data == data}
        folder = next(iter(members.values())).folder.parent.name
        scores = {model: Scores.read(run.folder / "scores.npz") for model, run in members.items()}
        all_scores |= {(data, model): values for model, values in scores.items()}
        lines = frame[frame["data"] == data]
        thresholds = dict(zip(lines["model"], lines["threshold"], strict=True))
        pictures |= {f"{folder}-scores.png": histograms(scores, thresholds), f"{folder}-roc.png": roc_curves(scores)}
        any_scores = next(iter(scores.values()))
        sections.append({
            "data": data,
            "num_good": int((~any_scores.labels).sum()),
            "num_defective": int(any_scores.labels.sum()),
            "rows": table_rows(lines),
            "histograms": _embed(pictures[f"{folder}-scores.png"]),
            "roc": _embed(pictures[f"{folder}-roc.png"]),
            "cases": [(model, _embed((run.folder / "cases.png").read_bytes())) for model, run in members.items()],
            "training": [(model, *_training(run)) for model, run in members.items()],
        })  # fmt: skip

    ranking = rank_models(frame, all_scores)
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, undefined=StrictUndefined)
    html = environment.get_template("report.html.jinja").render(
        title=title,
        advice=advise(ranking, frame["data"].nunique()),
        ranking=ranking.to_dict("index"),
        unranked=[model for model in frame["model"].unique() if model not in ranking.index],
        headings=[heading for _, heading, _, _ in COLUMNS],
        sections=sections,
        speed=_embed(pictures["speed.png"]),
        hardware=sorted(frame["hardware"].unique()),
        seeds=sorted(frame["seed"].unique()),
        missing=[f"{run.model} on {run.data}" for run in runs if run.result is None],
    )
    for name, content in pictures.items():
        write_whole(output / name, content)
    write_whole(output / "results.csv", frame.to_csv(index=False).encode())
    if any(run.formats for run in finished):
        formats = formats_frame(finished)
        write_whole(output / "formats.csv", formats.to_csv().encode())
        write_whole(output / "formats.md", formats_tables(formats).encode())
    write_whole(output / "report.html", html.encode())
    return output / "report.html"


def _training(run: Run) -> tuple[str, list[str]]:
    """The picture of the training images of a run, and the names of the oddest."""
    scores = Scores.read(run.folder / "training_scores.npz")
    names = short_names([scores.paths[index] for index in oddest(scores)])
    return _embed((run.folder / "training_images.png").read_bytes()), names


def _embed(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()
