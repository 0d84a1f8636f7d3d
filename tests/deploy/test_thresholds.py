# SPDX-License-Identifier: Apache-2.0

"""Exports give raw scores and name their thresholds, and get others from normal images."""

import shutil
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule

from anomalib_recon.deploy import (
    ExportedModel,
    Scale,
    Thresholds,
    find_images,
    find_thresholds,
    read_image,
    set_thresholds,
)
from anomalib_recon.deploy import thresholds as command
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor, RegionPostProcessor
from tests.deploy.conftest import IMAGE_FPR, PIXEL_FPR, Exported, build_padim
from tests.tiny_models import build, demo_data, demo_images, engine_in

OUTPUTS = list(InferenceBatch._fields)


def copy_of(path: Path, folder: Path) -> Path:
    """A copy of an export with the files beside it."""
    return shutil.copytree(path.parent, folder / "copy") / path.name


def raw_of(model: AnomalibModule, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        batch = model.model(model.pre_processor(torch.from_numpy(images)))
    score = batch.anomaly_map.amax(dim=(-2, -1)) if batch.pred_score is None else batch.pred_score
    return score.numpy(), batch.anomaly_map.numpy()


def output_names(path: Path) -> list[str]:
    return [output.any_name for output in openvino.Core().read_model(path).outputs]


@pytest.mark.parametrize("size", [(64, 64), (150, 99)])
def test_raw_scores_are_those_of_the_checkpoint(
    exported_model: Exported, path: Path, demo: Path, size: tuple[int, int]
) -> None:
    assert output_names(path) == OUTPUTS
    images = demo_images(demo, size)
    outputs = ExportedModel(path)(images)
    raw_score, raw_map = raw_of(exported_model.model, images)
    np.testing.assert_allclose(outputs["raw_score"], raw_score, rtol=1e-3)
    np.testing.assert_allclose(outputs["raw_map"], raw_map, rtol=1e-2, atol=1e-3 * raw_map.max())


def test_thresholds_in_the_file_lead_from_raw_scores_to_the_others(
    exported_model: Exported, path: Path, demo: Path
) -> None:
    model = ExportedModel(path)
    post_processor = exported_model.model.post_processor
    outputs = model(demo_images(demo, (64, 64)))
    for kind, (raw, scores, above) in {
        "image": ("raw_score", "pred_score", "pred_label"), "pixel": ("raw_map", "anomaly_map", "pred_mask")
    }.items():  # fmt: skip
        scale = getattr(model.thresholds, kind)
        assert scale.threshold == getattr(post_processor, f"{kind}_threshold").item()
        assert (scale.min, scale.max) == tuple(
            getattr(post_processor, f"{kind}_{end}").item() for end in ("min", "max")
        )
        expected = ((outputs[raw] - scale.threshold) / (scale.max - scale.min) + 0.5).clip(0, 1)
        np.testing.assert_allclose(outputs[scores], expected, atol=1e-5)
        np.testing.assert_array_equal(outputs[above], outputs[scores] > 0.5)
        assert 0 < outputs[above].mean() < 1


def test_normal_images_set_the_thresholds_of_the_post_processor(
    exported_model: Exported, path: Path, good: Path, saae: AnomalibModule
) -> None:
    if exported_model.model is not saae:
        pytest.skip("its thresholds are from anomalous images")
    model = ExportedModel(path)
    found, fitted = find_thresholds(model, find_images(good), IMAGE_FPR, PIXEL_FPR), model.thresholds
    for kind in ("image", "pixel"):
        for name in ("threshold", "min", "max", "limit"):
            assert getattr(getattr(found, kind), name) == pytest.approx(
                getattr(getattr(fitted, kind), name), rel=1e-3
            ), (kind, name)


def test_other_rates_act_on_all_outputs(path: Path, good: Path, tmp_path: Path) -> None:
    before, content = ExportedModel(path), path.read_bytes()
    output = tmp_path / "new" / f"other{path.suffix}"
    images = [read_image(file)[None] for file in find_images(good)]
    expected = [before(image) for image in images]
    thresholds = command.main(
        [
            "--model",
            str(path),
            "--images",
            str(good),
            "--image_fpr",
            "0.26",
            "--pixel_fpr",
            "0.03",
            "--output",
            str(output),
        ]
    )
    assert path.read_bytes() == content
    assert output_names(output) == OUTPUTS
    after = ExportedModel(output)
    assert after.thresholds == thresholds
    outputs = [after(image) for image in images]
    for name in ("raw_score", "raw_map"):
        np.testing.assert_array_equal([new[name] for new in outputs], [old[name] for old in expected])
    # of 12 images, at most a fraction of 0.26 is 3, and the threshold is the fourth highest score
    raw = np.sort([old["raw_score"].item() for old in expected])
    assert thresholds.image.threshold == raw[-4]
    assert sum(bool(new["pred_label"].item()) for new in outputs) == 3
    pixels = np.sort(np.ravel([old["raw_map"] for old in expected]))
    assert thresholds.pixel is not None
    assert thresholds.pixel.threshold == pixels[-1 - int(0.03 * pixels.size)]
    assert np.mean([new["pred_mask"] for new in outputs]) == pytest.approx(0.03, abs=1e-3)
    scores = np.ravel([new["pred_score"] for new in outputs])
    assert scores.min() == pytest.approx(0, abs=1e-6)


def test_thresholds_are_changed_in_place_and_again(path: Path, good: Path, tmp_path: Path) -> None:
    copied = copy_of(path, tmp_path)
    first = ExportedModel(copied).thresholds
    for rate in ("0.4", "0.1"):
        command.main(["--model", str(copied), "--images", str(good), "--image_fpr", rate])
    assert ExportedModel(copied).thresholds != first
    set_thresholds(copied, first)
    image = read_image(find_images(good)[0])[None]
    outputs, expected = ExportedModel(copied)(image), ExportedModel(path)(image)
    for name in OUTPUTS:
        np.testing.assert_allclose(outputs[name].astype(float), expected[name].astype(float), atol=1e-6)


@pytest.mark.parametrize("suffix", [".xml", ".onnx"])
def test_a_region_stays_with_other_thresholds(suffix: str, demo: Path, good: Path, tmp_path: Path) -> None:
    polygon = [(0, 0), (0.5, 0), (0.5, 1), (0, 1)]
    rates = FalsePositiveRatePostProcessor(PIXEL_FPR, IMAGE_FPR, region=polygon, top_fraction=0.01)
    model = build("SAAE", post_processor=rates)
    engine_in(tmp_path).fit(model, datamodule=demo_data(demo))
    path = model.to_openvino(tmp_path) if suffix == ".xml" else model.to_onnx(tmp_path)
    exported, files = ExportedModel(path), find_images(good)
    assert exported.region_share == 0.5
    # rates are those of the pixels inside, as in the fit
    found = find_thresholds(exported, files, IMAGE_FPR, PIXEL_FPR)
    assert found.pixel is not None
    assert found.pixel.threshold == pytest.approx(rates.pixel_threshold.item(), rel=1e-3)
    assert found.image.threshold == pytest.approx(rates.image_threshold.item(), rel=1e-3)
    for _ in range(2):  # the second time, what the first has written
        set_thresholds(path, find_thresholds(exported, files, 0.3, 0.2))
        outputs = ExportedModel(path)(demo_images(demo, (64, 64)))
        assert not outputs["anomaly_map"][..., 32:].any()
        assert not outputs["pred_mask"][..., 32:].any()
        assert outputs["pred_mask"][..., :32].any()
    set_thresholds(path, exported.thresholds)
    images = demo_images(demo, (64, 64))
    before, after = exported(images), ExportedModel(path)(images)
    for name in OUTPUTS:
        np.testing.assert_allclose(after[name].astype(float), before[name].astype(float), atol=1e-6)


def test_weights_of_another_model_are_not_overwritten(exported_model: Exported, good: Path, tmp_path: Path) -> None:
    path = copy_of(exported_model.files[".onnx"], tmp_path)
    weights = path.with_name("model.onnx.data")
    weights.write_bytes(b"weights")
    thresholds = ExportedModel(exported_model.files[".onnx"]).thresholds
    first, other = tmp_path / "deployed" / "bolt.onnx", tmp_path / "deployed" / "nut.onnx"
    set_thresholds(path, thresholds, first)
    set_thresholds(path, thresholds, other)  # of the same weights
    assert first.with_name(weights.name).read_bytes() == b"weights"
    weights.write_bytes(b"others!")
    with pytest.raises(ValueError, match="output must be in a folder without the weights of another model"):
        set_thresholds(path, thresholds, other)
    assert first.with_name(weights.name).read_bytes() == b"weights"
    # the same folder by another name
    set_thresholds(path, thresholds, path.parent / ".." / path.parent.name / "new.onnx")
    assert weights.read_bytes() == b"others!"


def test_a_model_with_a_threshold_for_images_alone(demo: Path, tmp_path: Path) -> None:
    model = build_padim()
    engine_in(tmp_path).fit(model, datamodule=demo_data(demo))
    model.post_processor = RegionPostProcessor(enable_normalization=False, enable_threshold_matching=False)
    model.post_processor._image_threshold.fill_(3.0)
    path = model.to_openvino(tmp_path)
    outputs = ExportedModel(path)(demo_images(demo, (64, 64)))
    np.testing.assert_array_equal(outputs["pred_label"].ravel(), outputs["pred_score"].ravel() > 3)
    np.testing.assert_array_equal(outputs["raw_map"], outputs["anomaly_map"])


def test_a_model_without_normalisation_and_thresholds(demo: Path, good: Path, tmp_path: Path) -> None:
    model = build_padim()
    model.post_processor.enable_normalization = model.post_processor.enable_thresholding = False
    engine_in(tmp_path).fit(model, datamodule=demo_data(demo))
    path = model.to_openvino(tmp_path)
    assert output_names(path) == ["pred_score", "anomaly_map"]
    exported = ExportedModel(path)
    outputs = exported(demo_images(demo, (64, 64)))
    np.testing.assert_array_equal(outputs["raw_score"], outputs["pred_score"])
    np.testing.assert_array_equal(outputs["raw_map"], outputs["anomaly_map"])
    with pytest.raises(ValueError, match="says no thresholds"):
        find_thresholds(exported, find_images(good))
    with pytest.raises(ValueError, match="says no thresholds"):
        set_thresholds(path, Thresholds(Scale(1, 0, 2, 0.5), None, normalized=True))


def test_what_cannot_work_is_refused(path: Path, good: Path, tmp_path: Path) -> None:
    model = ExportedModel(path)
    images = find_images(good)
    with pytest.raises(ValueError, match="image_fpr must be at least 0 and below 1, got 5"):
        find_thresholds(model, images, image_fpr=5)
    with pytest.raises(ValueError, match="paths must name at least one normal image"):
        find_thresholds(model, [])
    with pytest.raises(ValueError, match="holds no images"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match=f"output must end in {path.suffix}"):
        set_thresholds(path, model.thresholds, tmp_path / "model.bin")
    with pytest.raises(ValueError, match=r"images must be floating-point numbers in .*, got uint8; divide"):
        model(np.full((1, 3, 64, 64), 200, np.uint8))
    for images_, words in (
        (np.full((1, 3, 64, 64), 200, np.float32), r"must have values in \[0, 1\], got 200 to 200; divide"),
        (np.full((1, 3, 64, 64), np.nan, np.float32), r"must have values in \[0, 1\], got nan"),
        (np.zeros((3, 64, 64), np.float32), r"must have the shape \(B, 3, H, W\), got \(3, 64, 64\)"),
        (np.zeros((1, 64, 64, 3), np.float32), r"must have the shape \(B, 3, H, W\), got \(1, 64, 64, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            model(images_)
    with pytest.raises(ValueError, match=r"path must end in \.xml or \.onnx"):
        ExportedModel(tmp_path / "model.pt")
    gone = tmp_path / f"gone{path.suffix}"
    with pytest.raises(ValueError, match=f"path must be an exported model, got {gone}, but {gone} is no file"):
        ExportedModel(gone)
    # before any image is scored
    with pytest.raises(ValueError, match=f"output must end in {path.suffix}"):
        command.main(["--model", str(path), "--images", str(tmp_path / "none"), "--output", "model.bin"])
