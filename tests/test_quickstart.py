# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
from PIL import Image

from anomalib_recon import quickstart
from tests.conftest import link_demo_data


def test_quickstart_trains_shows_exports_and_runs(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A shorter version of the whole: a network of half the depth, and about a quarter of its optimiser steps."""
    monkeypatch.chdir(tmp_path)
    link_demo_data(drawn, tmp_path)
    metrics = quickstart.main(
        ["--trainer.max_epochs", "3", "--model.depth", "2", "--trainer.enable_progress_bar", "false"]
    )

    assert metrics["image_AUROC"] >= 0.9
    assert metrics["pixel_AUROC"] >= 0.9
    results = tmp_path / "results" / "InTra" / "DemoAD" / "grid" / "latest"
    pictures = sorted((results / "images").rglob("*.png"))
    assert len(pictures) == 40
    # image, ground truth, reconstruction, anomaly map and predicted mask side by side
    assert {Image.open(path).size for path in pictures} == {(6 * 256, 256)}
    assert (results / "weights" / "openvino" / "model.xml").exists()
    assert len(list((results / "openvino_images").glob("*.png"))) == 6
    assert Image.open(results / "training_images.png").size[0] > 256
    output = capsys.readouterr()
    printed = output.out
    assert "torch.onnx" not in printed
    assert "treespec" not in output.err
    assert len(printed.splitlines()) < 50
    oddest = printed.split("oddest training images")[1].splitlines()[1:4]
    assert all(line.startswith("good/") for line in oddest)
    scores = [float(line.split()[1]) for line in oddest]
    assert scores == sorted(scores, reverse=True)
    assert "$ anomalib train --config" in printed
    assert "good/000.png" in printed


@pytest.mark.parametrize("argument", ["--model=SAAE", "--data"])
def test_another_model_and_other_data_are_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be chosen: the quickstart is InTra on synthetic data"):
        quickstart.main([argument, "MVTecAD"])
