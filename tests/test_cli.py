# SPDX-License-Identifier: Apache-2.0

"""The ``anomalib`` command and anomalib's pipelines, with our models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from jsonargparse import Namespace
from sklearn.metrics import roc_auc_score

from anomalib_recon.deploy import ExportedModel
from anomalib_recon.experiments.compare.benchmark import MixedBenchmark
from anomalib_recon.experiments.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from anomalib_recon.models import FeatureInpainting, InTra
from tests.conftest import images_in, write_stripes
from tests.tiny_models import TINY

SMALL = {"patch_size": 8, "window_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 2, "windows_per_image": 10}
# the loss of an untrainable network does not fall, so that training ends by itself
SHORT = {**SMALL, "image_size": 64, "learning_rate": 1e-12, "patience": 1}


def data_config(root: Path) -> dict:
    arguments = {"root": str(root), "category": "stripes", "train_batch_size": 12, "eval_batch_size": 5}
    return {"class_path": "MVTecAD", "init_args": {**arguments, "num_workers": 0}}


def anomalib(folder: Path, *args: str) -> None:
    command = Path(sys.executable).with_name("anomalib")
    subprocess.run([command, *args], check=True, cwd=folder, capture_output=True, timeout=300)


def test_own_images_from_the_command_line(stripes: Path, tmp_path: Path) -> None:
    """The commands of the README: good images alone to train on and for thresholds, prediction, export."""
    small = {name: value for name, value in TINY["FeatureInpainting"].items() if name != "visualizer"}
    arguments = [f"--model.{name}={value}" for name, value in small.items()]
    good, hole = (stripes / "stripes" / folder for folder in ("train/good", "test/hole"))
    anomalib(
        tmp_path, "fit", "--model", "FeatureInpainting", *arguments, "--data", "Folder", "--data.name", "mine",
        "--data.normal_dir", str(good), "--data.num_workers", "0", "--data.test_split_mode", "none",
        "--data.val_split_mode", "from_train", "--data.val_split_ratio", "0.3",
        "--model.post_processor", "anomalib_recon.post_processing.FalsePositiveRatePostProcessor",
        "--model.post_processor.split", "val", "--model.post_processor.image_fpr", "0.4",
    )  # fmt: skip
    results = tmp_path / "results" / "FeatureInpainting" / "mine" / "latest"
    checkpoint = results / "weights" / "lightning" / "model.ckpt"
    anomalib(
        tmp_path, "predict", "--model", "FeatureInpainting", *arguments, "--ckpt_path", str(checkpoint),
        "--data", str(hole), "--default_root_dir", "predicted",
    )  # fmt: skip
    assert len(list((tmp_path / "predicted").rglob("*.png"))) == 6
    anomalib(
        tmp_path, "export", "--model", "FeatureInpainting", *arguments, "--ckpt_path", str(checkpoint),
        "--export_type", "openvino", "--export_root", "exported",
    )  # fmt: skip

    model = FeatureInpainting.load_from_checkpoint(checkpoint).eval()
    exported = ExportedModel(tmp_path / "exported" / "weights" / "openvino" / "model.xml")
    with torch.no_grad():
        expected = model(images_in(good))
    outputs = exported(images_in(good).numpy())
    np.testing.assert_allclose(outputs["pred_score"].ravel(), expected.pred_score, atol=1e-3)
    # the twelve images hold three or four that were not trained on, of which one may be called anomalous
    raw = outputs["raw_score"].ravel()
    threshold = model.post_processor.image_threshold.item()
    assert np.isclose(raw, threshold, rtol=1e-3).any()  # it is the score of one of them
    assert (exported(images_in(hole).numpy())["raw_score"] > threshold).all()


def test_benchmark_compares_our_models_with_built_in_ones(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    padim = {"backbone": "resnet18", "layers": ["layer1"], "pre_trained": False, "n_features": 20}
    models = [{"class_path": "Padim", "init_args": padim}, {"class_path": "InTra", "init_args": SHORT}]
    config = {"accelerator": "cpu", "benchmark": {"seed": 1, "model": {"grid": models}, "data": data_config(stripes)}}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    MixedBenchmark().run(Namespace(config=tmp_path / "benchmark.yaml"))
    results = pd.read_csv(next((tmp_path / "runs").rglob("results.csv"))).set_index("model.class_path")
    assert list(results.index) == ["Padim", "InTra"]
    for name in ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"):
        assert results[name].between(0, 1).all()
    assert 0 <= results.loc["InTra", "pixel_AUPRO"] <= 1


def test_tiled_ensemble_trains_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_stripes(tmp_path / "data", size=(128, 64))
    data = data_config(tmp_path / "data")
    data["init_args"] |= {"val_split_mode": "same_as_test", "test_split_mode": "from_dir"}
    config = {
        "seed": 1,
        "accelerator": "cpu",
        "default_root_dir": "results",
        "tiling": {"image_size": [128, 64], "tile_size": [64, 64], "stride": [64, 64]},
        "data": data,
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "SeamSmoothing": {"apply": False, "sigma": 2, "width": 0.1},
        "TrainModels": {
            "model": {"class_path": "FeatureInpainting", "init_args": TINY["FeatureInpainting"]},
            "trainer": {"max_epochs": 1},
        },
    }
    (tmp_path / "ensemble.yaml").write_text(yaml.safe_dump(config))
    arguments = Namespace(config=tmp_path / "ensemble.yaml")
    TrainTiledEnsemble().run(arguments)
    results = tmp_path / "results" / "FeatureInpainting" / "MVTecAD" / "stripes" / "latest"
    assert len(list((results / "weights" / "lightning").glob("model*.ckpt"))) == 2
    assert json.loads((results / "weights" / "lightning" / "stats.json").read_text(encoding="utf-8"))
    EvalTiledEnsemble(results.resolve()).run(arguments)
    row = pd.read_csv(next(results.resolve().rglob("metric_results.csv"))).iloc[0]
    assert 0 <= row["pixel_AUROC"] <= 1


def test_reported_metrics_are_those_of_scikit_learn(stripes: Path, tmp_path: Path) -> None:
    engine = Engine(default_root_dir=tmp_path, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    model = InTra(**{**SMALL, "image_size": 64, "windows_per_image": 50, "learning_rate": 2e-3})
    datamodule = MVTecAD(root=stripes, category="stripes", train_batch_size=12, eval_batch_size=5, num_workers=0)
    [metrics] = engine.train(model, datamodule=datamodule)
    labels, scores, masks, maps = [], [], [], []
    for batch in datamodule.test_dataloader():
        raw = model.model.eval()(batch.image)
        labels += batch.gt_label.tolist()
        scores += raw.pred_score.tolist()
        masks += batch.gt_mask.flatten().tolist()
        maps += raw.anomaly_map.flatten().tolist()
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-4)
    assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks, maps), abs=1e-4)
