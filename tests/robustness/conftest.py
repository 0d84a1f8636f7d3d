# SPDX-License-Identifier: Apache-2.0

"""Stripes to train and test the tiny models on, whatever is done to them."""

from pathlib import Path

from anomalib.data import MVTecAD


def data(root: Path, **arguments) -> MVTecAD:
    sizes = {"train_batch_size": 5, "eval_batch_size": 4, "num_workers": 0}
    return MVTecAD(root=root, category="stripes", **{**sizes, **arguments})
