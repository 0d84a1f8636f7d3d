# SPDX-License-Identifier: Apache-2.0

import inspect
import json
import shutil
from pathlib import Path
from typing import ClassVar

import anomalib.models
import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from anomalib_recon import models
from anomalib_recon.config_files import read_config
from anomalib_recon.experiments.reproduce.__main__ import main
from anomalib_recon.experiments.reproduce.summary import markdown, missing, summarise
from anomalib_recon.experiments.reproduce.table import read_table, table_names
from anomalib_recon.models.intra.torch_model import check_sizes

COMMON = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--data.num_workers", "0"]
INTRA = [
    "--model.patch_size", "8", "--model.window_size", "5", "--model.embed_dim", "16", "--model.depth", "2",
    "--model.num_heads", "2", "--model.windows_per_image", "10", "--model.image_size", "64",
    "--trainer.max_epochs", "3", "--trainer.callbacks+=tests.experiments.test_reproduce.StopOnce",
]  # fmt: skip
VIT = ["--model.backbone", "vit_tiny_patch16_224", "--model.pre_trained", "false", "--model.image_size", "64"]
ADTR = [
    "--model.backbone", "resnet18", "--model.layers", "[layer1]", "--model.pre_trained", "false",
    "--model.image_size", "64", "--model.feature_size", "4", "--model.embed_dim", "16", "--model.depth", "1",
]  # fmt: skip


class StopOnce(Callback):
    """Interrupts the first training in its third epoch, and notes the epochs of all."""

    epochs: ClassVar[list[int]] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: torch.nn.Module) -> None:
        self.epochs.append(trainer.current_epoch)
        if self.epochs == [0, 1, 2]:
            message = "interrupted"
            raise RuntimeError(message)


@pytest.fixture(scope="module")
def root(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a data set with one category of MVTec AD by name, and one that is not MVTec AD's."""
    root = tmp_path_factory.mktemp("mvtec")
    for name in ("screw", "stripes"):
        shutil.copytree(stripes / "stripes", root / name)
    return root


@pytest.mark.parametrize("name", table_names())
def test_figures_of_the_paper_agree_with_its_means(name: str) -> None:
    table = read_table(name)
    groups = {**table.dataset.groups, "all": table.dataset.categories}
    for row in table.rows.values():
        for metric, figures in row.figures_of_the_paper.items():
            assert figures.keys() <= groups.keys() | set(table.dataset.categories)
            for group in groups.keys() & figures.keys():
                members = [figures[category] for category in groups[group] if category in figures]
                if members:  # figures and means are rounded to 0.1 each
                    assert len(members) == len(groups[group])
                    assert np.mean(members) == pytest.approx(figures[group], abs=0.1), (row.name, metric, group)


@pytest.mark.parametrize("name", table_names())
def test_overrides_are_arguments_of_the_model_and_the_trainer(name: str) -> None:
    table = read_table(name)
    for row in table.rows.values():
        assert row.after is None or row.after in table.rows
        for category in (*table.categories_of(row), "mine"):
            config = read_config(row.config)
            model = getattr(anomalib.models, config["model"]["class_path"].split(".")[-1])
            for argument in table.overrides_of(row, category):
                part, parameter, *_ = argument.split(".")
                assert parameter in inspect.signature({"model": model, "trainer": Trainer}[part]).parameters


def values(table: str, argument: str) -> dict[str, int]:
    """Value of an argument in the first row of a table, for each category."""
    content = read_table(table)
    row = next(iter(content.rows.values()))
    return {name: content.overrides_of(row, name)[argument] for name in content.dataset.categories}


def test_categories_have_the_values_of_the_papers() -> None:
    sizes = {  # table 1 of version 3
        256: {"grid", "bottle", "cable", "hazelnut", "metal_nut", "toothbrush", "transistor"},
        320: {"capsule", "screw"},
        512: {"carpet", "leather", "tile", "wood", "pill", "zipper"},
    }
    expected = {category: size for size, categories in sizes.items() for category in categories}
    assert values("intra_v3", "model.image_size") == expected
    # table A.7 of version 1
    assert values("intra_v1", "model.image_size") == {**expected, "grid": 512, "wood": 320}
    for size in sizes:
        check_sizes((size, size), patch_size=16, window_size=7)

    ratios = values("saae", "model.mlp_ratio")
    assert {name for name, ratio in ratios.items() if ratio == 1} == {"carpet", "grid", "leather", "tile", "wood"}
    assert set(ratios.values()) == {1, 2}


@pytest.mark.parametrize("name", ["intra_v1_ablations", "intra_v3_ablations"])
def test_ablations_of_intra_are_trained_for_a_fixed_number_of_epochs(name: str) -> None:
    table = read_table(name)
    for row in table.rows.values():
        for category in table.dataset.categories:
            overrides = table.overrides_of(row, category)
            assert overrides["model.patience"] >= overrides["trainer.max_epochs"]


@pytest.mark.parametrize("row", ["ResNet-18", "ResNet-34"])
def test_ablations_of_adtr_take_the_four_layers_of_torchvision(row: str) -> None:
    table = read_table("adtr_ablations")
    arguments = table.overrides_of(table.rows[row], "screw")
    model = models.ADTR(pre_trained=False, **{name.removeprefix("model."): value for name, value in arguments.items()})
    assert list(model.model.backbone.num_channels) == [64, 128, 256, 512]


def test_an_interrupted_call_continues_and_a_finished_one_is_skipped(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["intra_v3", "--root", str(root), "--output", str(tmp_path), *COMMON, *INTRA]
    with pytest.raises(RuntimeError, match="interrupted"):
        main(arguments)
    folder = tmp_path / "intra_v3" / "InTra" / "screw"
    assert not (folder / "result.json").exists()

    main(arguments)
    # the third epoch is done anew, the first two are not
    assert StopOnce.epochs == [0, 1, 2, 2]
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    saved = torch.load(folder / result["checkpoint"], weights_only=False)["callbacks"]["TrainingTime"]
    assert result["training_seconds"] >= saved["seconds"] > 0

    main(arguments)
    assert StopOnce.epochs == [0, 1, 2, 2]
    table = pd.read_csv(tmp_path / "intra_v3" / "table.csv")
    line = table[(table["category"] == "screw") & (table["metric"] == "pixel_AUROC")].iloc[0]
    assert line["paper"] == 99.5
    assert line["ours"] == pytest.approx(100 * result["metrics"]["pixel_AUROC"])
    assert line["seed"] == 0
    printed = capsys.readouterr().out
    assert "Missing of InTra: carpet, grid, leather" in printed

    with pytest.raises(ValueError, match=r"screw holds a run with other settings \(arguments"):
        main([*arguments, "--model.depth", "1"])
    with pytest.raises(ValueError, match="nothing: no such folder"):
        main([*arguments, "--categories", "nothing"])

    # a mean over categories is one of equal trainings, of the same data
    with pytest.raises(ValueError, match=r"screw holds a run with other settings \(arguments"):
        main([*arguments, "--categories", "stripes", "--model.depth", "1"])
    other = shutil.copytree(root, tmp_path / "data")
    with pytest.raises(ValueError, match=r"screw holds a run with other settings \(root"):
        main([*arguments, "--root", str(other)])

    # what is reported are the weights after the last epoch, not those that the second call began with
    main([*arguments, "--output", str(tmp_path / "uninterrupted")])
    whole = json.loads(
        (tmp_path / "uninterrupted" / folder.relative_to(tmp_path) / "result.json").read_text(encoding="utf-8")
    )
    assert result["metrics"] == pytest.approx(whole["metrics"], abs=1e-4)


def test_a_row_starts_from_the_row_before(root: Path, tmp_path: Path) -> None:
    common = ["--root", str(root), "--output", str(tmp_path), *COMMON, "--trainer.max_epochs", "1"]
    main(["saae_layers", *common, *VIT, "--methods", "f2", "--categories", "stripes"])
    folders = [tmp_path / "saae_layers" / method / "stripes" for method in ("f4", "f2")]
    f4, f2 = (
        json.loads((folder / "result.json").read_text(encoding="utf-8"))["hyper_parameters"] for folder in folders
    )
    assert f2["latent_dim"] == f4["latent_dim"]
    table = pd.read_csv(tmp_path / "saae_layers" / "table.csv")
    assert set(table["category"]) == {"stripes"}  # not a category of the paper, so in no mean
    assert table["paper"].isna().all()

    main(["adtr", *common, *ADTR])
    method = tmp_path / "adtr" / "ADTR+" / "screw"
    start = json.loads((method / "result.json").read_text(encoding="utf-8"))["hyper_parameters"]["normal_checkpoint"]
    assert Path(start).is_relative_to(tmp_path / "adtr" / "ADTR" / "screw")


def test_means_and_differences() -> None:
    table = read_table("intra_v3")
    trained = {"grid": (0.5, 0.7), "wood": (0.75, 0.9), "screw": (0.25, 0.8), "mine": (0.1, 0.1)}
    known = {"seed": 3, "training_seconds": 3661.4, "hardware": "a machine"}
    results = {
        ("InTra", name): {"metrics": {"image_AUROC": image, "pixel_AUROC": pixel}, **known}
        for name, (image, pixel) in trained.items()
    }
    frame = summarise(table, results)
    lines = {line["category"]: line for line in frame[frame["metric"] == "image_AUROC"].to_dict("records")}
    expected = {
        "grid": (100, 50), "wood": (97.5, 75), "screw": (95.7, 25), "mean of textures (2 of 5)": (98.75, 62.5),
        "mean of objects (1 of 10)": (95.7, 25), "mean of all (3 of 15)": ((100 + 97.5 + 95.7) / 3, 50),
    }  # fmt: skip
    assert lines.keys() == expected.keys() | {"mine"}
    for category, (paper, ours) in expected.items():
        assert lines[category]["paper"] == pytest.approx(paper)
        assert lines[category]["ours"] == pytest.approx(ours)
        assert lines[category]["difference"] == pytest.approx(ours - paper)
    assert np.isnan(lines["mine"]["paper"])
    assert len(missing(table, results)["InTra"]) == 12
    assert "1:01:01" in markdown(table, results)


def test_the_reported_mean_is_taken_when_all_categories_are_there() -> None:
    table = read_table("adtr")
    known = {"seed": 0, "training_seconds": 1.0, "hardware": "a machine"}
    results = {
        ("ADTR", name): {"metrics": {"pixel_AUROC": 0.9, "image_AUROC": 0.9}, **known}
        for name in table.dataset.categories
    }
    lines = summarise(table, results).set_index(["metric", "category"])
    assert lines.loc[("pixel_AUROC", "mean of all (15 of 15)"), "difference"] == pytest.approx(90 - 97.2)
    assert np.isnan(lines.loc[("pixel_AUROC", "mean of textures (5 of 5)"), "paper"])
    results.popitem()
    lines = summarise(table, results).set_index(["metric", "category"])
    assert np.isnan(lines.loc[("pixel_AUROC", "mean of all (14 of 15)"), "paper"])
    assert "Missing of ADTR: zipper." in markdown(table, results)
    assert "Missing of ADTR+: all categories." in markdown(table, results)
    assert "Missing of ADTR: all categories." in markdown(table, {})
