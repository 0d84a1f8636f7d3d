# SPDX-License-Identifier: Apache-2.0

"""A trained model is handed on as a folder with a model card, and loaded from there."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from anomalib_recon import card
from anomalib_recon.pretrained import load_pretrained
from tests.tiny_models import OWN_SIZE, build, demo_images, train

FIGURES = ["image_AUROC=0.97", "pixel_AUPRO=0.9"]


def publish(name: str, checkpoint: str, folder: Path, *more: str) -> Path:
    card.main([
        "--model", name, "--ckpt", checkpoint, "--output", str(folder), "--trained_on", "a drawn mesh, 12 good images",
        "--licence", "cc0-1.0", *more,
    ])  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["SAAE", "InTra"])
def test_a_published_model_scores_as_the_trained_one(name: str, demo: Path, tmp_path: Path) -> None:
    trained = train(build(name), demo, tmp_path / "trained")
    folder = publish(name, trained.checkpoint, tmp_path / "mesh", "--figures", *FIGURES)
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.ckpt"}
    loaded = load_pretrained(folder)
    images = torch.from_numpy(demo_images(demo, OWN_SIZE))
    with torch.no_grad():
        for expected, result in zip(trained.model(images), loaded(images), strict=True):
            assert torch.equal(expected, result)


def test_the_card_says_what_the_model_is(demo: Path, tmp_path: Path) -> None:
    trained = train(build("ADTR"), demo, tmp_path / "trained")
    folder = publish("ADTR", trained.checkpoint, tmp_path / "mesh", "--figures", *FIGURES)
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    data = yaml.safe_load(head)
    assert data["license"] == "cc0-1.0"
    [result] = data["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "image_AUROC": 0.97, "pixel_AUPRO": 0.9,
    }  # fmt: skip
    assert "**Trained on** a drawn mesh, 12 good images" in text
    assert f"| image | {float(trained.model.post_processor.image_threshold):.6g} |" in text
    assert "| backbone | `resnet18` |" in text
    assert str(tmp_path) not in text
    assert "None were given." in card.card_of(trained.model, "mesh", "a mesh", "cc0-1.0", {})


def test_a_card_without_thresholds_says_so() -> None:
    assert "None: the scores are raw." in card.card_of(build("ADTR"), "mesh", "a mesh", "cc0-1.0", {})
    without = build("ADTR", post_processor=False)
    assert "None: the scores are raw." in card.card_of(without, "mesh", "a mesh", "cc0-1.0", {})


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConnectionError, match=r"^source='nobody/nothing' is no folder here.*pass a folder\.$"):
        load_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match=r"has no model\.ckpt and no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "model.ckpt").touch()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^source=.*: config\.json does not name a model"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "Padim"}))
    with pytest.raises(ValueError, match=r"^model must be one of ADTR, .* got 'Padim'"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model": "SAAE"}))
    (tmp_path / "model.ckpt").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"^ckpt=.*model\.ckpt"):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^ckpt=.*gone is no file"):
        publish("SAAE", str(tmp_path / "gone"), tmp_path / "mesh")
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("# A project")
    with pytest.raises(ValueError, match=r"^output=.*project has a README\.md that is no model card"):
        publish("SAAE", str(tmp_path / "model.ckpt"), tmp_path / "project")
