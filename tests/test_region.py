# SPDX-License-Identifier: Apache-2.0

"""A region of interest: what lies outside it does not count, as if the images were cropped to it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from anomalib import LearningType, metrics
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, InferenceBatch
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torch import nn

from anomalib_recon.metrics import AUROC, RawScoreEvaluator
from anomalib_recon.post_processing import FalsePositiveRatePostProcessor, RegionPostProcessor
from tests.conftest import save
from tests.tiny_models import build, checkpoint_of, demo_data, engine_in

HEIGHT, WIDTH, LEFT = 12, 16, 10
SPLITS = {"test_split_mode": "from_dir", "val_split_mode": "same_as_test"}
POLYGON = [(0, 0), (LEFT / WIDTH, 0), (LEFT / WIDTH, 1), (0, 1)]


class Brightness(nn.Module):
    """The map is the image, and the score the mean of the highest tenth."""

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        anomaly_map = 7 * images.mean(dim=1, keepdim=True) + 20
        count = max(1, round(0.1 * anomaly_map[0].numel()))
        return InferenceBatch(pred_score=anomaly_map.flatten(1).topk(count).values.mean(dim=1), anomaly_map=anomaly_map)


class Tiny(AnomalibModule):
    """A model in which every pixel is scored by itself."""

    learning_type = LearningType.ONE_CLASS
    trainer_arguments = {"num_sanity_val_steps": 0, "max_epochs": 1}  # noqa: RUF012  # a property in the base class

    def __init__(self, pre_processor=True, post_processor=True, evaluator=True, visualizer=False):
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.model = Brightness()

    @staticmethod
    def configure_pre_processor(image_size=None) -> PreProcessor:
        return PreProcessor()

    @staticmethod
    def configure_evaluator() -> RawScoreEvaluator:
        return RawScoreEvaluator()

    def configure_optimizers(self):
        return None

    def training_step(self, batch, batch_idx):
        return torch.zeros((), requires_grad=True)

    def validation_step(self, batch, *args, **kwargs):
        return batch.update(**self.model(batch.image)._asdict())


def write(root: Path, width: int) -> Path:
    """Noise with bright defects, cropped to a width; defects right of ``LEFT`` make no anomaly where they are cut."""
    random = np.random.default_rng(0)
    for index in range(40):
        image, mask = random.random((HEIGHT, WIDTH)), np.zeros((HEIGHT, WIDTH))
        if index >= 20:
            row, col = random.integers(0, HEIGHT - 3), random.integers(0, WIDTH - 3)
            mask[row : row + 3, col : col + 3] = 1
            image = np.where(mask > 0, (image + 0.4).clip(0, 1), image)
        image, mask = image[:, :width], mask[:, :width]
        folder = ("train" if index % 2 else "good") if index < 20 else ("bad" if mask.any() else "good")
        save(image, root / folder / f"{index:03d}.png")
        if folder == "bad":
            save(mask, root / "masks" / f"{index:03d}.png")
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {width: write(tmp_path_factory.mktemp(f"width_{width}"), width) for width in (WIDTH, LEFT)}


def mask_file(folder: Path) -> Path:
    mask = np.zeros((3 * HEIGHT, 3 * WIDTH))
    mask[:, : 3 * LEFT] = 1
    save(mask, folder / "region.png")
    return folder / "region.png"


def run(root: Path, post_processor: PostProcessor, evaluator: Any = True) -> tuple[Tiny, dict[str, float]]:
    folders = {"normal_dir": "train", "normal_test_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks"}
    datamodule = Folder(name="noise", root=root, **folders, num_workers=0, eval_batch_size=7, **SPLITS)
    model = Tiny(post_processor=post_processor, evaluator=evaluator)
    engine = Engine(default_root_dir=root, accelerator="cpu", enable_progress_bar=False, logger=False)
    engine.fit(model, datamodule=datamodule)
    return model, engine.test(model, datamodule=datamodule, verbose=False)[0]


def test_raw_scores_are_compared_with_raw_thresholds(roots: dict[int, Path]) -> None:
    raw, metrics = run(roots[WIDTH], RegionPostProcessor(enable_normalization=False))
    _, expected = run(roots[WIDTH], RegionPostProcessor())
    assert metrics == pytest.approx(expected, abs=1e-6)  # F1 scores among them
    predictions = raw(torch.rand(20, 3, HEIGHT, WIDTH))
    assert torch.equal(
        predictions.pred_mask.flatten(), (predictions.anomaly_map > raw.post_processor.pixel_threshold).flatten()
    )


@pytest.mark.parametrize("of", [RegionPostProcessor, FalsePositiveRatePostProcessor])
@pytest.mark.parametrize("pixel_size", ["model", "original"])
def test_metrics_and_thresholds_are_those_of_cropped_images(
    of: type[RegionPostProcessor], pixel_size: str, roots: dict[int, Path], tmp_path: Path
) -> None:
    whole = run(
        roots[WIDTH], of(region=mask_file(tmp_path), top_fraction=0.1), RawScoreEvaluator(pixel_size=pixel_size)
    )
    cropped = run(roots[LEFT], of(), RawScoreEvaluator(pixel_size=pixel_size))
    assert whole[1] == pytest.approx(cropped[1], abs=1e-6)
    assert len(whole[1]) == 5
    for name, value in cropped[0].post_processor.named_buffers():
        assert torch.allclose(whole[0].post_processor.get_buffer(name), value), name
    # which is not what the whole images have
    assert run(roots[WIDTH], of(top_fraction=0.1))[1]["pixel_AUROC"] != pytest.approx(whole[1]["pixel_AUROC"], abs=1e-3)


def test_a_polygon_is_the_mask_it_draws(roots: dict[int, Path], tmp_path: Path) -> None:
    drawn = RegionPostProcessor(POLYGON).region.at((HEIGHT, WIDTH))
    assert torch.equal(drawn, RegionPostProcessor(mask_file(tmp_path)).region.at((HEIGHT, WIDTH)))
    assert drawn[:, :LEFT].all()
    assert not drawn[:, LEFT:].any()
    # a triangle has half of the square around it
    triangle = RegionPostProcessor([(0, 0), (1, 0), (0, 1)]).region.at((200, 300))
    assert float(triangle.float().mean()) == pytest.approx(0.5, abs=0.005)


def test_nothing_outside_is_predicted_nor_changes_a_prediction(roots: dict[int, Path]) -> None:
    model, _ = run(roots[WIDTH], FalsePositiveRatePostProcessor(pixel_fpr=0.1, image_fpr=0.5, region=POLYGON))
    images = torch.rand(5, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    predictions = model.eval()(images)
    assert not predictions.anomaly_map[..., LEFT:].any()
    assert not predictions.pred_mask[..., LEFT:].any()
    assert predictions.pred_mask.any()
    images[..., LEFT:] = 1
    for before, after in zip(predictions, model(images), strict=True):
        assert torch.equal(before, after)
    images[0, :, :4, :4] = 0
    images[1, :, :4, :4] = 1
    after = model(images)
    assert not after.pred_mask[0, :, :4, :4].any()
    assert after.pred_mask[1, :, :4, :4].all()
    assert after.pred_score[1] >= predictions.pred_score[1]


def test_exports_have_the_region(roots: dict[int, Path], tmp_path: Path) -> None:
    model, _ = run(roots[WIDTH], RegionPostProcessor(POLYGON, top_fraction=0.1))
    images = torch.rand(5, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(images)
    path = model.to_openvino(tmp_path, input_size=(HEIGHT, WIDTH))
    outputs = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())
    for name in ("pred_score", "anomaly_map", "pred_label", "pred_mask"):
        np.testing.assert_allclose(outputs[name], getattr(expected, name).numpy(), atol=1e-5)


def test_a_checkpoint_brings_its_region(demo: Path, tmp_path: Path) -> None:
    model = build("SAAE", post_processor=FalsePositiveRatePostProcessor(region=POLYGON, top_fraction=0.01))
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=demo_data(demo))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    loaded = type(model).load_from_checkpoint(checkpoint_of(engine))
    for expected, value in zip(model.eval()(images), loaded.eval()(images), strict=True):
        assert torch.allclose(expected.float(), value.float())
    assert not loaded(images).anomaly_map[..., 40:].any()
    # a region that is passed takes precedence
    other = RegionPostProcessor([(0.5, 0), (1, 0), (1, 1), (0.5, 1)])
    loaded = type(model).load_from_checkpoint(checkpoint_of(engine), post_processor=other)
    assert loaded.eval()(images).anomaly_map[..., 40:].any()
    assert not loaded(images).anomaly_map[..., :32].any()
    # and so does what it scores by
    other = RegionPostProcessor(POLYGON, top_fraction=0.5)
    loaded = type(model).load_from_checkpoint(checkpoint_of(engine), post_processor=other)
    assert loaded.post_processor.top_fraction == 0.5


def test_a_built_in_model_has_a_region_by_command(demo: Path, tmp_path: Path) -> None:
    post_processor = "--model.post_processor"
    cli = AnomalibCLI([
        "train", "--data", "DemoAD", "--data.root", str(demo), "--default_root_dir", str(tmp_path),
        "--model", "Padim", "--model.backbone", "resnet18", "--model.pre_trained", "false",
        "--model.layers", "[layer1]", "--model.n_features", "16",
        "--model.evaluator", "anomalib_recon.metrics.RawScoreEvaluator", "--model.visualizer", "false",
        post_processor, "anomalib_recon.post_processing.RegionPostProcessor",
        f"{post_processor}.region", "[[0.1, 0.2], [0.9, 0.2], [0.9, 0.7], [0.1, 0.7]]",
    ])  # fmt: skip
    inside = cli.model.post_processor.region.at((100, 100))
    assert inside[20:70, 10:90].all()
    assert int(inside.sum()) == 50 * 80
    path = checkpoint_of(cli.engine)
    loaded = Padim.load_from_checkpoint(path, post_processor=RegionPostProcessor(), weights_only=True).eval()
    predictions = loaded(torch.rand(1, 3, 256, 256))
    assert not predictions.anomaly_map[..., :51, :].any()
    assert predictions.anomaly_map.any()
    assert (
        Engine(default_root_dir=tmp_path, accelerator="cpu")
        .export(loaded, ExportType.ONNX, export_root=tmp_path)
        .is_file()
    )


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ([(0, 0), (1, 1)], "three or more corners"),
        ([(0, 0), (300, 0), (300, 200)], "divide pixels by the size of the image"),
        ("missing.png", r"missing\.png, which cannot be read"),
        ("black.png", "leaves none"),
        ("text.png", r"text\.png, which cannot be read"),
    ],
)
def test_a_bad_region_is_refused(region: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (5, 5)).save("black.png")
    Path("text.png").write_text("no image", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        RegionPostProcessor(region)


def test_what_cannot_have_a_region_is_refused(roots: dict[int, Path], caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="top_fraction must be from 0 to 1"):
        RegionPostProcessor(POLYGON, top_fraction=10)
    with pytest.raises(ValueError, match="only scores"):
        RegionPostProcessor(POLYGON)(InferenceBatch(pred_score=torch.zeros(2)))
    strip = RegionPostProcessor([(0.5, 0), (0.502, 0), (0.502, 1), (0.5, 1)])
    with pytest.raises(ValueError, match=r"region must hold a pixel of the anomaly map, which has the size \(64, 64\)"):
        strip(InferenceBatch(anomaly_map=torch.rand(1, 1, 64, 64)))
    with pytest.raises(ValueError, match=r"region must hold a pixel of the anomaly map, .* \(32, 32\)"):
        strip.setup(SimpleNamespace(), SimpleNamespace(input_size=(32, 32)), "fit")
    whole_maps = metrics.AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_")
    with pytest.raises(ValueError, match=r"pixel_AUPRO of anomalib needs whole maps"):
        run(roots[WIDTH], RegionPostProcessor(POLYGON), RawScoreEvaluator(test_metrics=[whole_maps]))
    of_pixels = AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_")
    run(roots[WIDTH], RegionPostProcessor(POLYGON), metrics.Evaluator(test_metrics=[of_pixels]))
    assert "pixel_AUROC counts pixels outside the region" in caplog.text
