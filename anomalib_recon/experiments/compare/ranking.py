# SPDX-License-Identifier: Apache-2.0

"""Which model to take: all data sets of a comparison in one table and one sentence."""

import math
from collections.abc import Mapping

import pandas as pd

from .scores import Scores

CLOSE = 0.01
"""Difference in image AUROC that a few dozen test images can hardly tell from none."""


def rank_models(results: pd.DataFrame, scores: Mapping[tuple[str, str], Scores]) -> pd.DataFrame:
    """Rank models by their mean image AUROC over all data sets.

    Args:
        results (pd.DataFrame): A line for each data set and model, with ``data``, ``model``, ``image_AUROC``,
            ``pixel_AUPRO``, ``threshold``, ``torch_ms`` and ``openvino_ms``.
        scores (Mapping[tuple[str, str], Scores]): Scores of the test images by data set and model.

    Returns:
        pd.DataFrame: A line for each model that is finished on all data sets, the best first: means of
        ``image_AUROC``, ``pixel_AUPRO`` and ``milliseconds``, and sums over the test images: ``found`` of
        ``defective``, and ``false_alarms`` among ``good``, NaN of a model without thresholds.
    """
    frame = results.copy()
    frame["milliseconds"] = frame["openvino_ms"].fillna(frame["torch_ms"])
    of_lines = [_counts(scores[line.data, line.model], line.threshold) for line in frame.itertuples()]
    frame = frame.join(pd.DataFrame(of_lines, index=frame.index))
    means = dict.fromkeys(("image_AUROC", "pixel_AUPRO", "milliseconds"), "mean")
    counts = ("found", "defective", "false_alarms", "good")
    sums = dict.fromkeys(counts, lambda column: column.sum(skipna=False))
    grouped = frame.groupby("model", sort=False)
    ranking = grouped.agg({**means, **sums})[grouped["data"].nunique() == frame["data"].nunique()]
    return ranking.sort_values("image_AUROC", ascending=False, kind="stable")


def _counts(scores: Scores, threshold: float) -> dict[str, float]:
    called = scores.scores > threshold
    has_threshold = not math.isnan(threshold)
    return {
        "found": int((called & scores.labels).sum()) if has_threshold else math.nan,
        "defective": int(scores.labels.sum()),
        "false_alarms": int((called & ~scores.labels).sum()) if has_threshold else math.nan,
        "good": int((~scores.labels).sum()),
    }


def advise(ranking: pd.DataFrame, num_data: int) -> str:
    """Say which model to take, and why.

    Args:
        ranking (pd.DataFrame): What :func:`rank_models` returned.
        num_data (int): Number of data sets.

    Returns:
        str: One to three sentences, empty without a ranking.
    """
    if ranking.empty:
        return ""
    best, others = ranking.iloc[0], ranking.iloc[1:]
    where = "" if num_data == 1 else f" on average over {num_data} data sets"
    text = f"Take {ranking.index[0]}. Its image AUROC is {best['image_AUROC']:.3f}{where}"
    if pd.isna(best["found"]):
        text += "; it has no thresholds."
    else:
        text += (
            f"; by its own threshold it finds {best['found']:.0f} of {best['defective']:.0f} defective images and "
            f"calls {best['false_alarms']:.0f} of {best['good']:.0f} good ones defective."
        )
    if others.empty:
        return text
    behind = best["image_AUROC"] - others["image_AUROC"]
    close = others[behind <= CLOSE]
    faster = close[close["milliseconds"] * 1.5 <= best["milliseconds"]]
    if not faster.empty:
        name = faster["milliseconds"].idxmin()
        times = best["milliseconds"] / faster.at[name, "milliseconds"]
        return f"{text} If time counts, take {name}: it is {behind[name]:.3f} behind and {times:.1f} times as fast."
    if not close.empty:
        return f"{text} {', '.join(close.index)} can hardly be told from it: at most {CLOSE} behind."
    return f"{text} {others.index[0]} comes next, {behind.iloc[0]:.3f} behind."
