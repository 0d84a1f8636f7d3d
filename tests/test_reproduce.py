# SPDX-License-Identifier: Apache-2.0

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import get_model
from lightning.pytorch import Callback, Trainer

from anomalib_recon.quickstart import config_path
from anomalib_recon.reproduce.__main__ import main
from anomalib_recon.reproduce.summary import markdown, missing, summarise
from anomalib_recon.reproduce.table import read_table, table_names

CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
SMALL_INTRA = [
    "--model.image_size", "64", "--model.patch_size", "8", "--model.window_size", "5", "--model.embed_dim", "16",
    "--model.depth", "2", "--model.num_heads", "2", "--model.windows_per_image", "10", "--trainer.max_epochs", "3",
]  # fmt: skip
SMALL_VIT = [
    "--model.backbone", "vit_tiny_patch16_224", "--model.pre_trained", "false", "--model.image_size", "64",
    "--trainer.max_epochs", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a data set that holds one category of MVTec AD by name, and one that is not MVTec AD's."""
    root = tmp_path_factory.mktemp("mvtec")
    for name in ("screw", "stripes"):
        shutil.copytree(stripes / "stripes", root / name)
    return root


class StopOnce(Callback):
    """Interrupts the first training in its third epoch, and notes the epochs of all."""

    epochs: list[int] = []  # noqa: RUF012

    def on_train_epoch_start(self, trainer: Trainer, pl_module: torch.nn.Module) -> None:
        StopOnce.epochs.append(trainer.current_epoch)
        if StopOnce.epochs == [0, 1, 2]:
            message = "interrupted"
            raise RuntimeError(message)


@pytest.mark.parametrize("name", table_names())
def test_figures_of_the_paper_agree_with_its_means(name: str) -> None:
    table = read_table(name)
    groups = {**table.dataset.groups, "all": table.dataset.categories}
    for row in table.rows.values():
        for metric, figures in row.figures_of_the_paper.items():
            assert figures.keys() <= groups.keys() | set(table.dataset.categories)
            for group in groups.keys() & figures.keys():
                members = [figures[category] for category in groups[group] if category in figures]
                if members:  # the paper rounds both to 0.1, and InTra's tables some means to 0.01
                    assert len(members) == len(groups[group])
                    assert np.mean(members) == pytest.approx(figures[group], abs=0.1001), (row.name, metric, group)


@pytest.mark.parametrize("name", table_names())
def test_overrides_are_arguments_of_the_model_and_the_trainer(name: str) -> None:
    table = read_table(name)
    for row in table.rows.values():
        assert row.after is None or row.after in table.rows
        for category in table.categories_of(row):
            config = yaml.safe_load(config_path(row.config_for(category)).read_text())
            model = type(get_model({"class_path": config["model"]["class_path"].split(".")[-1]}, pre_trained=False)) \
                if False else None
            del model
            for argument in table.overrides_of(row, category):
                part, _, parameter = argument.partition(".")
                assert part in {"model", "trainer"}
                import anomalib.models as models
                owner = Trainer if part == "trainer" else getattr(models, config["model"]["class_path"].split(".")[-1])
                assert parameter in inspect.signature(owner).parameters
