# SPDX-License-Identifier: Apache-2.0

"""Images with 16 bits of grey, from the folder to the export: no level between black and white is lost."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, PredictDataset, get_datamodule
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.models import Padim
from lightning import seed_everything
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_recon import parity
from anomalib_recon.card import card_of
from anomalib_recon.data import DeepGreyFolder, DeepGreyPredictDataset
from anomalib_recon.deploy import ExportedModel, GreyLevels, find_images, find_thresholds, read_image
from anomalib_recon.deploy import thresholds as thresholds_command
from anomalib_recon.deploy.grey_levels import levels_from
from anomalib_recon.experiments.compare.plots import PICTURE_SIZE, thumbnail
from anomalib_recon.models import InTra
from anomalib_recon.training.image_files import check_image_files, check_image_modes
from anomalib_recon.visualization import ContactSheetVisualizer, ReconstructionVisualizer
from tests.conftest import draw_stripes, export_all, save
from tests.tiny_models import Probe, Trained, build, engine_in

# all values of the synthetic images: 40 levels of 65 536, which are a single one of 256
LOWEST, HIGHEST = 30_000, 30_040
LEVELS = {"black_level": 29_990, "white_level": 30_050}
FOLDERS = {
    "normal_dir": "good", "normal_test_dir": "good_test", "abnormal_dir": "hole", "mask_dir": "masks",
    "train_batch_size": 12, "eval_batch_size": 5, "num_workers": 0, "val_split_mode": "same_as_test",
}  # fmt: skip
SMALL = {
    "image_size": 64, "patch_size": 8, "window_size": 5, "embed_dim": 32, "depth": 1, "num_heads": 2,
    "windows_per_image": 60, "windows_per_step": 64, "learning_rate": 2e-3, "in_channels": 1,
}  # fmt: skip


def scaled(pixels: np.ndarray) -> np.ndarray:
    """Pixels of a file between the levels, computed anew."""
    black, white = LEVELS["black_level"], LEVELS["white_level"]
    return np.clip((pixels.astype(np.float64) - black) / (white - black), 0, 1)


def save_deep(values: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.round(LOWEST + (HIGHEST - LOWEST) * values).astype(np.uint16)).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 normal images, 4 more to test, and 6 with a hole in the stripes; PNG and TIFF files."""
    root, random = tmp_path_factory.mktemp("deep"), np.random.default_rng(0)
    for folder, count in {"good": 12, "good_test": 4, "hole": 6}.items():
        for index in range(count):
            image, mask = draw_stripes(random, (64, 64), hole=folder == "hole")
            save_deep(image, root / folder / f"{index:03d}.{'tiff' if index % 2 else 'png'}")
            if folder == "hole":
                save(mask, root / "masks" / f"{index:03d}.png")
    return root


def data(root: Path, **arguments: Any) -> DeepGreyFolder:
    return DeepGreyFolder(**{"name": "deep", "root": root, **FOLDERS, **LEVELS, **arguments})


def command_line(words: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in words.items()]


def model_arguments() -> list[str]:
    return ["--model", "InTra", *command_line({f"model.{name}": value for name, value in SMALL.items()})]


def pictures_in(folder: Path) -> list[Path]:
    """Result pictures, whose files end as those of the images."""
    return sorted(path for path in folder.rglob("*") if path.suffix in {".png", ".tiff"})


class Run(NamedTuple):
    """A training on the command line."""

    checkpoint: str
    metrics: dict[str, float]
    pictures: list[Path]


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("results")
    seed_everything(0)
    cli = AnomalibCLI(
        [
            "train", *model_arguments(), "--data", "DeepGreyFolder", "--data.name", "deep", "--data.root", str(root),
            # in batches of one, as a prediction: others round differently, and a pixel at the threshold changes sides
            *command_line(
                {f"data.{name}": value for name, value in {**FOLDERS, **LEVELS, "eval_batch_size": 1}.items()}
            ),
            "--default_root_dir", str(folder), "--trainer.max_epochs", "6", "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false",
        ]
    )  # fmt: skip
    trainer = cli.engine.trainer
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Run(trainer.checkpoint_callback.best_model_path, metrics, pictures_in(folder))


@pytest.fixture(scope="module")
def model(run: Run) -> InTra:
    return InTra.load_from_checkpoint(run.checkpoint, map_location="cpu").eval()


@pytest.fixture(scope="module")
def exported(run: Run, model: InTra, tmp_path_factory: pytest.TempPathFactory) -> dict[ExportType, Path]:
    return export_all(Trained(model, run.checkpoint, Probe()), tmp_path_factory.mktemp("exported"))


@pytest.fixture(params=[ExportType.OPENVINO, ExportType.ONNX], ids=lambda kind: kind.value)
def path(request: pytest.FixtureRequest, exported: dict[ExportType, Path]) -> Path:
    """Each of the exports in turn."""
    if request.param == ExportType.ONNX:
        pytest.importorskip("onnxruntime")
    return exported[request.param]


def test_items_hold_every_level_between_black_and_white(root: Path) -> None:
    datamodule = data(root)
    datamodule.setup()
    assert [len(part) for part in (datamodule.train_data, datamodule.test_data)] == [12, 10]
    plain = Folder("plain", root=root, **FOLDERS)
    plain.setup()
    assert datamodule.test_data.samples.equals(plain.test_data.samples)
    assert datamodule.task == plain.task
    for item, expected in zip(datamodule.test_data, plain.test_data, strict=True):
        pixels = np.asarray(Image.open(item.image_path))
        assert item.image.shape == (3, 64, 64)
        assert item.image.dtype == torch.float32
        np.testing.assert_allclose(item.image, np.stack([scaled(pixels)] * 3), atol=1e-7)
        assert len(item.image.unique()) == len(np.unique(pixels)) > 20
        assert item.gt_label == expected.gt_label
        assert torch.equal(item.gt_mask, expected.gt_mask)
    # what anomalib reads, and what 8 bits of the whole range would hold, is a single value
    assert len(plain.train_data[0].image.unique()) == 1
    assert len(np.unique(np.asarray(Image.open(item.image_path)) // 256)) == 1


@pytest.mark.parametrize("mode", ["from_test", "from_train", "same_as_test", "none"])
def test_splits_and_augmentations_are_those_of_folder(root: Path, mode: str) -> None:
    arguments = {"val_split_mode": mode, "seed": 3, "augmentations": RandomHorizontalFlip(p=1)}
    deep, plain = data(root, **arguments), Folder("plain", root=root, **{**FOLDERS, **arguments})
    for datamodule in (deep, plain):
        datamodule.setup()
    for part in ("train_data", "test_data") if mode == "none" else ("train_data", "val_data", "test_data"):
        assert getattr(deep, part).samples.image_path.equals(getattr(plain, part).samples.image_path)
    item = next(item for item in deep.test_data if item.gt_label)
    pixels = np.asarray(Image.open(item.image_path))
    np.testing.assert_allclose(item.image[0], scaled(pixels)[:, ::-1], atol=1e-7)
    mask = np.asarray(Image.open(root / "masks" / f"{Path(item.image_path).stem}.png")) > 0
    np.testing.assert_array_equal(item.gt_mask, mask[:, ::-1])


def test_normal_test_images_are_split_off(root: Path) -> None:
    datamodule = data(root, normal_test_dir=None, test_split_ratio=0.25)
    datamodule.setup()
    assert [len(part) for part in (datamodule.train_data, datamodule.test_data)] == [9, 9]
    assert len(next(iter(datamodule.test_dataloader())).image.unique()) > 20


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("image.png", np.array([[0, 1000], [1001, 65_535]], np.uint16)),
        ("image.tiff", np.array([[0, 1000], [1001, 65_535]], np.uint16)),
        ("big_endian.tiff", np.array([[0, 1000], [1001, 65_535]], ">u2")),
        ("32 bits.tiff", np.array([[-7, 1000], [1001, 1_000_000]], np.int32)),
        ("float.tiff", np.array([[-0.5, 1000.25], [1001, np.inf]], np.float32)),
    ],
)
def test_files_of_all_depths_are_read(tmp_path: Path, name: str, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(tmp_path / name)
    expected = ((pixels.astype(np.float64) - 900) / 200).clip(0, 1)
    image = read_image(tmp_path / name, GreyLevels(900, 1100))
    np.testing.assert_allclose(image, [expected] * 3, atol=1e-7)
    assert image[0, 1, 0] != image[0, 0, 1]
    [item] = DeepGreyPredictDataset(tmp_path, 900, 1100)
    np.testing.assert_array_equal(item.image, image)
    check_image_files([tmp_path / name], deep_grey=True)


COLOURS = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
NOT_DEEP: dict[str, tuple[Callable[[Path], None], str]] = {
    "grey.png": (lambda path: Image.fromarray(COLOURS[..., 0]).save(path), "mode L, not of more than 8 bits of grey;"),
    "colour.png": (lambda path: Image.fromarray(COLOURS).save(path), "mode RGB, not of more than 8 bits of grey;"),
    "alpha.png": (lambda path: Image.fromarray(COLOURS).convert("LA").save(path), "mode LA, not of more than 8 bits"),
    "palette.png": (lambda path: Image.fromarray(COLOURS).convert("P").save(path), "mode P, not of more than 8 bits"),
    "nan.tiff": (lambda path: Image.fromarray(np.full((9, 9), np.nan, np.float32)).save(path), "values that are NaN;"),
}


@pytest.mark.parametrize("name", NOT_DEEP)
def test_what_is_not_deep_grey_is_refused(tmp_path: Path, name: str) -> None:
    write, words = NOT_DEEP[name]
    write(tmp_path / name)
    message = rf"^The image {re.escape(str(tmp_path / name))} has [^\n]*{words}[^\n]*$"
    with pytest.raises(ValueError, match=message):
        check_image_files([tmp_path / name], deep_grey=True)
    with pytest.raises(ValueError, match=message):
        DeepGreyPredictDataset(tmp_path)[0]
    if "NaN" not in words:
        with pytest.raises(ValueError, match=message):
            check_image_modes([tmp_path / name], deep_grey=True)


def test_an_image_with_8_bits_among_the_others_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    for path in (root / "good").iterdir():
        (tmp_path / path.name).symlink_to(path)
    NOT_DEEP["grey.png"][0](tmp_path / "stray.png")
    engine = engine_in(tmp_path / "results")
    datamodule = data(tmp_path, normal_dir=tmp_path, abnormal_dir=None, normal_test_dir=None, mask_dir=None)
    with pytest.raises(ValueError, match=r"stray.png has pixels of mode L, not of more than 8 bits of grey"):
        engine.fit(build("InTra"), datamodule=datamodule)
    assert engine.trainer.global_step == 0


def test_anomalibs_datamodules_refuse_deep_images_and_name_ours(root: Path, model: InTra, tmp_path: Path) -> None:
    engine, words = engine_in(tmp_path), r"mode I;16, which anomalib would clip[^\n]*by DeepGreyFolder"
    with pytest.raises(ValueError, match=words):
        engine.fit(build("SAAE"), datamodule=Folder("plain", root=root, **FOLDERS))
    with pytest.raises(ValueError, match=words):
        engine.test(model, datamodule=Folder("plain", root=root, **FOLDERS))
    with pytest.raises(ValueError, match=f"{words}, or DeepGreyPredictDataset"):
        engine.predict(model, dataset=PredictDataset(root / "hole"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"white_level": 29_990}, "white_level must be above black_level, and both finite, got 29990 and 29990"),
        ({"black_level": float("nan")}, "white_level must be above black_level, and both finite, got 30050 and nan"),
        ({"white_level": float("inf")}, "white_level must be above black_level, and both finite, got inf and 29990"),
        ({"val_split_mode": "synthetic"}, "val_split_mode=synthetic makes anomalies of images with 8 bits; choose"),
        ({"test_split_mode": "synthetic"}, "test_split_mode=synthetic makes anomalies of images with 8 bits; choose"),
    ],
)
def test_wrong_arguments_are_named(root: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        data(root, **arguments)


def test_get_datamodule_finds_it(root: Path) -> None:
    arguments = {"name": "deep", "root": str(root), **FOLDERS, **LEVELS}
    datamodule = get_datamodule({"class_path": "DeepGreyFolder", "init_args": arguments})
    assert isinstance(datamodule, DeepGreyFolder)
    assert datamodule.levels == GreyLevels(**LEVELS)


def test_a_defect_of_a_few_levels_is_found(run: Run, model: InTra, root: Path) -> None:
    scores, labels, maps, masks = [], [], [], []
    for folder in ("good_test", "hole"):
        for path in find_images(root / folder):
            grey = torch.from_numpy(scaled(np.asarray(Image.open(path)))).float()
            with torch.no_grad():
                raw = model.model(grey.expand(1, 3, -1, -1))
            mask = np.asarray(Image.open(root / "masks" / f"{path.stem}.png")) > 0 if folder == "hole" else np.zeros(1)
            scores.append(raw.pred_score.item())
            labels.append(folder == "hole")
            maps.append(raw.anomaly_map.numpy().ravel())
            masks.append(np.broadcast_to(mask, (64, 64)).ravel())
    expected = {
        "image_AUROC": roc_auc_score(labels, scores),
        "pixel_AUROC": roc_auc_score(np.concatenate(masks), np.concatenate(maps)),
    }
    assert expected["image_AUROC"] > 0.9
    assert expected["pixel_AUROC"] > 0.9
    for name, value in expected.items():
        assert run.metrics[name] == pytest.approx(value, abs=1e-3)


def test_levels_of_a_training_are_those_of_its_use(model: InTra, root: Path, tmp_path: Path, run: Run) -> None:
    assert model.grey_levels == GreyLevels(**LEVELS)
    engine, words = engine_in(tmp_path), r"black_level=0 and white_level=65535, but [^\n]* 29990 and 30050; pass those"
    whole_range = data(root, black_level=0, white_level=65_535)
    with pytest.raises(ValueError, match=words):
        engine.test(model, datamodule=whole_range)
    with pytest.raises(ValueError, match=words):
        engine.predict(model, dataset=DeepGreyPredictDataset(root / "hole"))
    with pytest.raises(ValueError, match=words):
        engine.fit(InTra(**SMALL), datamodule=whole_range, ckpt_path=run.checkpoint)
    Image.new("L", (64, 64), 100).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"was trained on images of black_level=29990 .* read these by DeepGreyFolder"):
        engine.predict(model, dataset=PredictDataset(tmp_path / "grey.png"))


def test_predictions_on_the_command_line_are_those_of_a_test(root: Path, run: Run, tmp_path: Path) -> None:
    words = {"data.path": root / "hole", **{f"data.{name}": value for name, value in LEVELS.items()}}
    AnomalibCLI(
        [
            "predict", *model_arguments(), "--ckpt_path", run.checkpoint, "--data", "DeepGreyPredictDataset",
            *command_line(words), "--default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false",
        ]
    )  # fmt: skip
    pictures = pictures_in(tmp_path)
    tested = [path for path in run.pictures if path.parent.name == "hole"]
    assert [path.stem for path in pictures] == [path.stem for path in tested]
    for path, other in zip(pictures, tested, strict=True):  # a test shows the mask, too
        shown, expected = (np.asarray(Image.open(picture).convert("RGB")).astype(int) for picture in (path, other))
        np.testing.assert_allclose(shown[64:, -512:], expected[64:, -512:], atol=2)


def test_pictures_show_the_image_between_the_levels(root: Path, run: Run) -> None:
    assert len(run.pictures) == 10
    for path in run.pictures:
        [file] = (root / path.parent.name).glob(f"{path.stem}.*")
        grey = Image.fromarray((255 * scaled(np.asarray(Image.open(file)))).astype(np.uint8)).convert("RGB")
        with Image.open(path) as picture:
            assert picture.size == (6 * 256, 256)
            shown = np.asarray(picture.convert("RGB").crop((0, 64, 256, 256))).astype(int)
        np.testing.assert_allclose(shown, np.asarray(grey.resize((256, 256)))[64:], atol=2)
        assert np.ptp(shown) > 100


def test_items_of_predictions_are_drawn_one_by_one_and_together(root: Path, model: InTra, tmp_path: Path) -> None:
    batches = engine_in(tmp_path).predict(model, datamodule=data(root, eval_batch_size=3))
    assert len(batches[0]) == 3
    together = ReconstructionVisualizer()(batches[0])
    assert [picture.size for picture in together] == [(6 * 256, 256)] * 3
    assert all(np.ptp(np.asarray(picture)[64:, :256].astype(int)) > 100 for picture in together)
    [alone] = [ReconstructionVisualizer(fields=["image"])(item) for item in list(batches[0])[:1]]
    np.testing.assert_array_equal(np.asarray(alone)[64:, :256], np.asarray(together[0])[64:, :256])


def test_thumbnails_of_a_comparison_show_the_image_between_the_levels(root: Path) -> None:
    path = find_images(root / "hole")[0]
    picture = thumbnail(str(path), GreyLevels(**LEVELS))
    assert picture.shape == (PICTURE_SIZE, PICTURE_SIZE, 3)
    assert np.ptp(picture) > 0.4


def test_an_export_scores_files_as_the_checkpoint(
    root: Path, run: Run, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"model": "InTra", "ckpt": run.checkpoint, "data": root / "hole", "score_bound": 1e-3, "map_bound": 1e-3}
    arguments = [*command_line(words), "--exports", str(path)]
    assert parity.main(arguments) == 0
    assert re.search(r"(OpenVINO|ONNX) .*\| yes +\|", capsys.readouterr().out)
    with pytest.raises(ValueError, match="read with black_level=5 and white_level=65535, but the model was trained"):
        parity.main([*arguments, "--black_level=5"])


def test_thresholds_of_an_export_are_found_with_the_levels(
    root: Path, model: InTra, path: Path, tmp_path: Path
) -> None:
    output, images = tmp_path / path.name, find_images(root / "good_test")
    words = {"model": path, "images": root / "good_test", "image_fpr": 0.3, "output": output}
    found = thresholds_command.main(command_line(words))
    batch = torch.from_numpy(np.stack([[scaled(np.asarray(Image.open(path)))] * 3 for path in images])).float()
    with torch.no_grad():
        raw = model.model(batch)
    # 0.3 of 4 images is 1, which may lie above the threshold
    assert found.image.threshold == pytest.approx(np.sort(raw.pred_score)[-2], rel=1e-3)
    allowed = int(0.005 * 4 * 64**2)
    assert found.pixel.threshold == pytest.approx(np.sort(raw.anomaly_map.ravel())[-1 - allowed], rel=1e-3)
    new = ExportedModel(output)
    assert new.thresholds == found
    assert new.levels == GreyLevels(**LEVELS)
    image = read_image(images[0], new.levels)[None]
    assert new(image)["raw_score"].item() == pytest.approx(raw.pred_score[0].item(), rel=1e-3)
    other = find_thresholds(new, images, image_fpr=0.3, levels=GreyLevels(0, 65_535))
    assert other.image.threshold != pytest.approx(found.image.threshold, rel=0.1)
    assert thresholds_command.main(command_line({**words, "black_level": 0, "white_level": 65_535})) == other


def test_anomalibs_inferencer_takes_the_array(root: Path, exported: dict[ExportType, Path]) -> None:
    file = find_images(root / "hole")[0]
    model = ExportedModel(exported[ExportType.OPENVINO])
    image = read_image(file, model.levels)
    inferencer = OpenVINOInferencer(exported[ExportType.OPENVINO], config={"INFERENCE_PRECISION_HINT": "f32"})
    expected = model(image[None])["pred_score"].item()
    assert inferencer.predict(image).pred_score.item() == pytest.approx(expected, abs=1e-4)


def test_a_model_card_shows_how_files_are_read(model: InTra) -> None:
    text = card_of(model, "cloth", "a synthetic cloth", "cc0-1.0", {})
    assert "\nfrom anomalib_recon.data import DeepGreyPredictDataset\nfrom anomalib_recon.pretrained" in text
    assert 'Engine().predict(model, dataset=DeepGreyPredictDataset("IMAGES", 29990, 30050))\n' in text


def test_one_level_of_the_two_is_enough() -> None:
    parse = thresholds_command.build_parser().parse_args
    assert levels_from(parse(["--model=a.xml", "--images=b", "--black_level=5"])) == GreyLevels(5, 65_535)
    assert levels_from(parse(["--model=a.xml", "--images=b"])) is None
    with pytest.raises(ValueError, match="white_level must be above black_level"):
        levels_from(parse(["--model=a.xml", "--images=b", "--white_level=-5"]))


def test_a_model_with_a_backbone_trains_and_tests(root: Path, tmp_path: Path) -> None:
    model, engine = build("FeatureInpainting", visualizer=ContactSheetVisualizer()), engine_in(tmp_path)
    [metrics] = engine.train(model, datamodule=data(root))
    assert metrics["pixel_AUROC"] > 0.6
    assert len(list(tmp_path.rglob("contact_sheet.png"))) == 1


def test_a_built_in_model_trains_and_tests(root: Path, tmp_path: Path) -> None:
    model = Padim(
        backbone="resnet18", layers=["layer1"], n_features=16, pre_trained=False,
        pre_processor=Padim.configure_pre_processor((64, 64)), visualizer=ReconstructionVisualizer(),
    )  # fmt: skip
    [metrics] = engine_in(tmp_path).train(model, datamodule=data(root))
    assert metrics["image_AUROC"] > 0.6
    picture = np.asarray(Image.open(pictures_in(tmp_path)[0]).convert("RGB"))
    assert np.ptp(picture[64:, :256].astype(int)) > 100
