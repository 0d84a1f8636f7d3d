# SPDX-License-Identifier: Apache-2.0

import io
import json
import re
import shutil
from pathlib import Path

import anomalib.models
import numpy as np
import pandas as pd
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import MVTecAD, get_datamodule
from anomalib.models import AnomalibModule, get_model
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from PIL import Image
from sklearn.metrics import f1_score, roc_auc_score

from anomalib_recon.config_files import config_path, read_config
from anomalib_recon.experiments.compare.__main__ import main
from anomalib_recon.experiments.compare.plots import chosen_cases, speed_against_accuracy
from anomalib_recon.experiments.compare.ranking import advise, rank_models
from anomalib_recon.experiments.compare.runs import read_runs
from anomalib_recon.experiments.compare.scores import Scores
from anomalib_recon.experiments.compare.training_images import (
    oddest,
    score_training_images,
    short_names,
    training_picture,
)
from tests.tiny_models import build, engine_in

SMALL = {
    "image_size": 64, "patch_size": 8, "window_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 2,
    "windows_per_image": 10,
}  # fmt: skip
COMMON = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def arguments(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a comparison of two models, one of which has been trained."""
    folder = tmp_path_factory.mktemp("compare")
    intra = {"class_path": "InTra", "init_args": SMALL}
    data = {"root": str(stripes), "category": "stripes", "eval_batch_size": 4, "num_workers": 0}
    config = {
        "formats": True,
        "models": {
            "small InTra <1>": {"model": intra, "trainer": {"max_epochs": 1}},
            "other": {"model": intra, "trainer": {"max_epochs": 2}},
        },
        "datasets": {"stripes": {"class_path": "MVTecAD", "init_args": data}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(folder / "config.yaml"), "--output", str(folder / "output"), *COMMON]
    main([*arguments, "--models", "small InTra <1>"])
    return arguments


@pytest.fixture(scope="module")
def output(arguments: list[str]) -> Path:
    return Path(arguments[3])


@pytest.fixture(scope="module")
def folder(output: Path) -> Path:
    return output / "stripes" / "small_InTra_1_"


def test_results_are_those_of_scikit_learn_on_the_saved_scores(output: Path, folder: Path) -> None:
    [line] = pd.read_csv(output / "results.csv").to_dict("records")
    scores = Scores.read(folder / "scores.npz")
    assert [Path(path).parent.name == "hole" for path in scores.paths] == scores.labels.tolist()
    assert line["image_AUROC"] == pytest.approx(roc_auc_score(scores.labels, scores.scores), abs=1e-6)
    # the threshold is the score of an image up to rounding, and such an image is not above it
    expected_f1 = f1_score(scores.labels, scores.scores > line["threshold"] * (1 + 1e-5))
    assert line["image_F1Score"] == pytest.approx(expected_f1, abs=1e-6)
    exported = folder / "formats" / "fp32" / "weights" / "openvino"
    size = sum((exported / name).stat().st_size for name in ("model.xml", "model.bin"))
    assert line["openvino_mb"] == pytest.approx(size / 1e6)
    assert min(line["torch_ms"], line["openvino_ms"], line["training_seconds"]) > 0
    assert 0 <= line["pixel_AUROC"] <= 1
    assert 0 <= line["pixel_AUPRO"] <= 1


def test_every_format_is_measured_on_raw_scores(output: Path, folder: Path) -> None:
    rows = json.loads((folder / "formats.json").read_text(encoding="utf-8"))
    int8 = ["int8 weights", "int8 weights, bf16", "int8 PTQ", "int8 PTQ, bf16"]
    assert list(rows) == ["torch", "fp32", "bf16", "fp16", *int8]
    [result] = pd.read_csv(output / "results.csv").to_dict("records")
    for name in ("torch", "fp32"):
        assert rows[name]["image_AUROC"] == pytest.approx(result["image_AUROC"], abs=1e-6)
        assert rows[name]["pixel_AUROC"] == pytest.approx(result["pixel_AUROC"], abs=1e-4)
    for name in ("bf16", "fp16", *int8):
        assert rows[name]["image_AUROC"] == pytest.approx(result["image_AUROC"], abs=0.01)
        assert rows[name]["pixel_AUROC"] == pytest.approx(result["pixel_AUROC"], abs=0.01)
    assert rows["fp32"]["mb"] == rows["bf16"]["mb"] == result["openvino_mb"]
    weights = {name: folder / "formats" / name / "weights" / "openvino" / "model.bin" for name in rows}
    assert 2 * weights["fp16"].stat().st_size == pytest.approx(weights["fp32"].stat().st_size, rel=0.2)
    assert 3 * weights["int8 PTQ"].stat().st_size < 2 * weights["fp32"].stat().st_size
    frame = pd.read_csv(output / "formats.csv", index_col="format")
    assert (frame[["milliseconds", "speed_up", "images_per_second"]] > 0).all(axis=None)
    change = rows["int8 PTQ"]["pixel_AUROC"] - rows["torch"]["pixel_AUROC"]
    assert frame.at["int8 PTQ", "pixel_AUROC_change"] == pytest.approx(change)
    title, _, heading, _, *lines = (output / "formats.md").read_text(encoding="utf-8").splitlines()
    assert title == "## stripes"
    assert heading.count("|") == 11
    assert [line.split("|")[2].strip() for line in lines] == list(rows)


def test_the_report_stands_alone(output: Path, folder: Path) -> None:
    html = (output / "report.html").read_text(encoding="utf-8")
    assert "Take small InTra &lt;1&gt;." in html
    assert "Not finished yet: other on stripes." in html
    links = re.findall(r"""(?:src|href|url\()\s*=?\s*["']?([^"'\s>)]+)""", html)
    assert len(links) == 5  # speed, histograms, ROC curves, cases, training images
    assert all(link.startswith("data:image/png;base64,") for link in links)
    text = re.sub(r"data:image/png;base64,[\w+/=]+", "", html)
    assert not re.search("//|@import|<script|<link", text)
    for path in (output / "speed.png", output / "stripes-scores.png", output / "stripes-roc.png", folder / "cases.png"):
        with Image.open(path) as picture:
            picture.verify()
    assert not list(output.rglob("*.part*"))


def ranked(*lines: tuple[str, str, float, float, float]) -> tuple[pd.DataFrame, int]:
    """Ranking of models whose three defective images are 1, 2 and 3, and whose two good ones are 0 and 2."""
    scores = Scores([""] * 5, np.array([1, 1, 1, 0, 0], dtype=bool), np.array([1.0, 2.0, 3.0, 0.0, 2.0]))
    columns = ["data", "model", "image_AUROC", "openvino_ms", "threshold"]
    frame = pd.DataFrame(list(lines), columns=columns).assign(pixel_AUPRO=0.5, torch_ms=40.0)
    return rank_models(frame, {(line[0], line[1]): scores for line in lines}), frame["data"].nunique()


def test_models_are_ranked_by_their_mean_image_auroc() -> None:
    lines = [("a", "X", 0.8, 10.0, 1.5), ("a", "Y", 0.9, np.nan, 0.5), ("b", "X", 1.0, 20.0, 2.5)]
    alone, _ = ranked(*lines)
    assert list(alone.index) == ["X"]  # Y is not finished on b
    both, num_data = ranked(*lines, ("b", "Y", 0.92, 30.0, 5.0))
    assert both["image_AUROC"].to_dict() == pytest.approx({"Y": 0.91, "X": 0.9})
    assert both["milliseconds"].to_dict() == {"Y": 35.0, "X": 15.0}
    assert both[["found", "defective", "false_alarms", "good"]].to_dict("index") == {
        "X": {"found": 3, "defective": 6, "false_alarms": 1, "good": 4},
        "Y": {"found": 3, "defective": 6, "false_alarms": 1, "good": 4},
    }
    assert list(both.index) == ["Y", "X"]
    assert advise(both, num_data).startswith("Take Y. Its image AUROC is 0.910 on average over 2 data sets;")


@pytest.mark.parametrize(
    ("others", "end"),
    [
        ([], "calls 1 of 2 good ones defective."),
        ([("a", "Y", 0.9, 1.0, 1.5)], "Y comes next, 0.050 behind."),
        ([("a", "Y", 0.945, 9.0, 1.5)], "Y can hardly be told from it: at most 0.01 behind."),
        ([("a", "Y", 0.945, 4.0, 1.5)], "take Y: it is 0.005 behind and 2.5 times as fast."),
    ],
)
def test_advice_weighs_accuracy_and_speed(others: list, end: str) -> None:
    advice = advise(*ranked(("a", "X", 0.95, 10.0, 1.5), *others))
    assert advice.startswith("Take X. Its image AUROC is 0.950; by its own threshold it finds 2 of 3 defective images")
    assert advice.endswith(end)


def test_what_is_finished_is_not_done_again(arguments: list[str], output: Path, folder: Path) -> None:
    before = (folder / "result.json").stat().st_mtime_ns
    (output / "report.html").unlink()
    main([*arguments, "--models", "small InTra <1>"])
    assert (folder / "result.json").stat().st_mtime_ns == before
    assert (output / "report.html").exists()
    with pytest.raises(ValueError, match=r"holds a run with other settings \(arguments"):
        main([*arguments, "--data.train_batch_size", "2"])
    # what is not trained in this call is in the report, too
    with pytest.raises(ValueError, match=r"holds a run with other settings \(arguments"):
        main([*arguments, "--models", "other", "--data.train_batch_size", "2"])


@pytest.mark.parametrize(("argument", "known"), [("--models", "'other'"), ("--datasets", "'stripes'")])
def test_a_name_that_the_config_lacks_is_refused(arguments: list[str], argument: str, known: str) -> None:
    with pytest.raises(ValueError, match=rf"{argument} 'othr' is not in the config: choose from .*{known}"):
        main([*arguments, argument, "othr"])


def test_several_devices_are_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--trainer\.devices 2: models are compared on one device"):
        main([*arguments, "--output", str(tmp_path), "--trainer.devices", "2"])
    for run in read_runs(Path(arguments[1]), tmp_path):
        run.check()  # nothing has begun, so nothing keeps the call from being corrected


def test_a_mistake_in_one_model_is_found_before_another_is_trained(arguments: list[str], tmp_path: Path) -> None:
    config = yaml.safe_load(Path(arguments[1]).read_text(encoding="utf-8"))
    config["models"]["other"] = {"model": {"class_path": "InTra", "init_args": {**SMALL, "patch_size": 7}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match="image_size must be a multiple of patch_size"):
        main(["--config", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "output"), *COMMON])
    assert not list((tmp_path / "output").rglob("*.ckpt"))


def copy_of(output: Path, folder: Path, copies: Path) -> tuple[Path, Path]:
    """A copy of all results, and the folder of a run in it."""
    copy = Path(shutil.copytree(output, copies / "copy"))
    return copy, copy / folder.relative_to(output)


def test_a_model_without_export_is_reported(arguments: list[str], output: Path, folder: Path, tmp_path: Path) -> None:
    output, folder = copy_of(output, folder, tmp_path)
    lacking = {"result.json": {"openvino_ms": None, "openvino_mb": None}, "formats.json": {"fp16": {}}}
    for name, values in lacking.items():
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | values))
    main([*arguments, "--output", str(output), "--only_report"])
    assert np.isnan(pd.read_csv(output / "results.csv")["openvino_ms"].item())
    assert pd.read_csv(output / "formats.csv", index_col="format").loc["fp16", "milliseconds":].isna().all()
    [line] = [line for line in (output / "formats.md").read_text(encoding="utf-8").splitlines() if "fp16" in line]
    assert set(line.split("fp16")[1]) == {" ", "|"}


def test_data_without_masks_are_reported(arguments: list[str], output: Path, folder: Path, tmp_path: Path) -> None:
    """Neither the metrics nor the formats have figures of pixels then."""
    output, folder = copy_of(output, folder, tmp_path)
    result, formats = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("result.json", "formats.json")
    )
    of_images = {key: value for key, value in result.items() if not key.startswith("pixel")}
    (folder / "result.json").write_text(json.dumps(of_images))
    for row in formats.values():
        del row["pixel_AUROC"]
    (folder / "formats.json").write_text(json.dumps(formats))
    main([*arguments, "--output", str(output), "--only_report"])
    frame = pd.read_csv(output / "formats.csv", index_col="format")
    assert frame[["pixel_AUROC", "pixel_AUROC_change"]].isna().all(axis=None)
    assert frame["image_AUROC_change"].notna().all()


def test_a_test_set_without_defects_is_drawn() -> None:
    results = pd.DataFrame({"model": ["a"], "data": "x", "image_AUROC": np.nan, "openvino_ms": 2.0, "torch_ms": 3.0})
    with Image.open(io.BytesIO(speed_against_accuracy(results))) as picture:
        picture.verify()


def test_the_clearest_and_the_hardest_cases_are_shown() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1], dtype=bool)
    scores = Scores([""] * 6, labels, np.array([0.3, 0.9, 0.8, 0.1, 0.2, 0.7]))
    assert chosen_cases(scores) == [
        ("defective, highest scores", 1), ("defective, highest scores", 5),
        ("defective, lowest scores", 3), ("defective, lowest scores", 5),
        ("good, highest scores", 2), ("good, highest scores", 0),
        ("good, lowest scores", 4), ("good, lowest scores", 0),
    ]  # fmt: skip


def test_a_defect_among_the_training_images_is_found(stripes: Path, tmp_path: Path) -> None:
    root = shutil.copytree(stripes, tmp_path / "data")
    train = root / "stripes" / "train" / "good"
    shutil.copy(root / "stripes" / "test" / "hole" / "000.png", train / "005.png")
    datamodule = MVTecAD(root=root, category="stripes", train_batch_size=4, num_workers=0)
    model = build("FeatureInpainting")
    engine_in(tmp_path).fit(model, datamodule=datamodule)
    scores = score_training_images(model, datamodule.train_data, batch_size=5)
    assert [Path(path).name for path in scores.paths] == [f"{index:03d}.png" for index in range(12)]
    [image] = [image for image in datamodule.train_data if Path(image.image_path).name == "003.png"]
    assert scores.scores[3] == pytest.approx(float(model.model.eval()(image.image[None]).pred_score), rel=1e-4)
    assert oddest(scores)[0] == 5
    assert short_names(scores.paths)[5] == "good/005.png"
    assert len(oddest(scores)) == 10
    with Image.open(io.BytesIO(training_picture(scores))) as picture:
        picture.verify()


def test_a_comparison_without_models_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ValueError, match=r"--config must be a file, got .*config\.yaml"):
        read_runs(path, tmp_path)
    for text, lacking in (
        ("datasets: {a: {class_path: DemoAD}}", "no models"),
        ("", "no models and no datasets"),
        ("{models: [InTra], datasets: {a: {class_path: DemoAD}}}", "no models"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"has {lacking}:"):
            read_runs(path, tmp_path)


def test_anomalib_reads_the_configs_of_the_demo(tmp_path: Path) -> None:
    for run in read_runs(config_path("compare/demo.yaml"), tmp_path):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(run.config))
        AnomalibCLI(["train", "--config", str(tmp_path / "config.yaml")], run=False)


def test_anomalib_knows_the_models_of_the_configs(tmp_path: Path) -> None:
    runs = read_runs(config_path("compare/folder.yaml"), tmp_path)
    for run in runs:
        assert issubclass(getattr(anomalib.models, run.config["model"]["class_path"]), AnomalibModule)
    benchmark = read_config("compare/benchmark.yaml")["benchmark"]
    jobs = [(get_model(job["model"]), get_datamodule(job["data"])) for job in get_iterator_from_grid_dict(benchmark)]
    assert [(type(model).__name__, data.category) for model, data in jobs] == [
        ("InTra", "grid"), ("InTra", "plate"), ("Padim", "grid"), ("Padim", "plate"),
    ]  # fmt: skip
