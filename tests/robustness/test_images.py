# SPDX-License-Identifier: Apache-2.0

"""Image files of all kinds, from the folder to the score."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, Folder, PredictDataset
from anomalib.data.errors import MisMatchError
from anomalib.data.utils import read_image, read_mask
from PIL import Image

from anomalib_recon.training.image_files import check_image_files, check_mask_files
from tests.conftest import write_stripes
from tests.tiny_models import Trained, build, engine_in

from .conftest import data

NOT_AS_ROOT = pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="this user can read every file")
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))


def rotated_by_exif(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    PICTURE.save(path, exif=exif)


GOOD: dict[str, Callable[[Path], None]] = {
    "grey.png": lambda path: PICTURE.convert("L").save(path),
    "grey with alpha.png": lambda path: PICTURE.convert("LA").save(path),
    "rgba.png": lambda path: PICTURE.convert("RGBA").save(path),
    "palette.png": lambda path: PICTURE.convert("P").save(path),
    "black and white.png": lambda path: PICTURE.convert("1").save(path),
    "cmyk.jpg": lambda path: PICTURE.convert("CMYK").save(path),
    "turned.jpg": rotated_by_exif,
    "one pixel.png": lambda path: PICTURE.resize((1, 1)).save(path),
    "narrow.png": lambda path: PICTURE.resize((400, 20)).save(path),
    "prüfbild 検査 é.PNG": PICTURE.save,
    "pages.tiff": lambda path: PICTURE.save(path, save_all=True, append_images=[PICTURE.rotate(90)]),
    "another.webp": PICTURE.save,
}


def half_of(path: Path) -> None:
    PICTURE.save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def declared_huge(path: Path) -> None:
    """A file of a few bytes that says it is an image of 30 000 x 30 000 pixels."""
    whole = io.BytesIO()
    Image.new("1", (8, 8)).save(whole, "bmp")
    header = bytearray(whole.getvalue())
    header[18:26] = (30_000).to_bytes(4, "little") * 2
    path.write_bytes(header)


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "half.png": (half_of, "cannot be read"),
    "half.jpg": (half_of, "cannot be read"),
    "empty.png": (Path.touch, "cannot be read"),
    "text.png": (lambda path: path.write_text("no image"), "cannot be read"),
    "huge.bmp": (declared_huge, "cannot be read"),
    "16 bits.png": (lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path), "mode I(;16)?,"),
    "32 bits.tiff": (lambda path: Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(path), "mode I"),
    "float.tiff": (lambda path: Image.fromarray(np.ones((9, 9), np.float32)).save(path), "mode F"),
}


def write_good(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, write in GOOD.items():
        write(folder / file_name)


@pytest.mark.parametrize("file_name", GOOD)
def test_images_that_anomalib_reads_are_let_through(tmp_path: Path, file_name: str) -> None:
    path = tmp_path / file_name
    GOOD[file_name](path)
    check_image_files([path])
    expected = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal((read_image(path, as_tensor=True) * 255).round().permute(1, 2, 0), expected)


@pytest.mark.parametrize("file_name", BAD)
def test_images_that_would_break_or_be_clipped_are_refused(tmp_path: Path, file_name: str) -> None:
    write, words = BAD[file_name]
    path = tmp_path / file_name
    write(path)
    with pytest.raises(ValueError, match=words) as error:
        check_image_files([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "gif", "webp"])
def test_damaged_files_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    whole = io.BytesIO()
    PICTURE.save(whole, "jpeg" if suffix == "jpg" else suffix)
    random = np.random.default_rng(0)
    outcomes = set()
    for index in range(60):
        damaged = np.frombuffer(whole.getvalue(), np.uint8).copy()
        # headers matter more than pixels
        places = random.integers(0, 200 if index % 2 else len(damaged), 3)
        damaged[places] = random.integers(0, 256, 3)
        path = tmp_path / f"{index}.{suffix}"
        path.write_bytes(damaged.tobytes()[: random.integers(1, 2 * len(damaged))])
        try:
            check_image_files([path])
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            outcomes.add("refused")
        else:
            assert read_image(path, as_tensor=True).isfinite().all()
            outcomes.add("read")
    assert "refused" in outcomes


@NOT_AS_ROOT
def test_files_without_permission_are_refused(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "secret.png")
    (tmp_path / "secret.png").chmod(0)
    with pytest.raises(ValueError, match=r"secret.png cannot be read \(.*Permission denied"):
        check_image_files([tmp_path / "secret.png"])


def test_masks_may_have_any_mode_but_must_be_whole(tmp_path: Path) -> None:
    drawn = np.zeros((20, 30), np.uint16)
    drawn[3:7, 2:9] = 1000
    Image.fromarray(drawn).save(tmp_path / "deep.png")
    check_mask_files([tmp_path / "deep.png"])
    assert np.array_equal(read_mask(tmp_path / "deep.png", as_tensor=True), drawn > 0)
    half_of(tmp_path / "half.png")
    with pytest.raises(ValueError, match=r"half.png cannot be read"):
        check_mask_files([tmp_path / "half.png"])


def folder_of(root: Path) -> Folder:
    """The stripes, with files of all extensions."""
    return Folder(
        "stripes", root=root, normal_dir="train/good", normal_test_dir="test/good", abnormal_dir="test/hole",
        mask_dir="ground_truth/hole", val_split_mode="same_as_test", train_batch_size=8, num_workers=0,
    )  # fmt: skip


def test_training_and_test_images_of_all_kinds(name: str, tmp_path: Path) -> None:
    root = write_stripes(tmp_path / "a folder with spaces") / "stripes"
    write_good(root / "train" / "good")
    write_good(root / "test" / "good")
    for index, path in enumerate(sorted((root / "ground_truth" / "hole").iterdir())):
        mask = Image.open(path)
        # one of another size, one with other values than 0 and 255
        (mask.resize((33, 21)) if index == 0 else mask.point(lambda value: value // 9)).save(path)
    model = build(name)
    engine = engine_in(tmp_path / "results")
    datamodule = folder_of(root)
    [metrics] = engine.train(model, datamodule=datamodule)
    assert len(datamodule.train_data) == 12 + len(GOOD)
    assert all(0 <= value <= 1 for value in metrics.values())
    assert len(metrics) == 5
    assert model.post_processor.image_threshold.isfinite()


def test_predicted_images_of_all_kinds(trained: Trained, tmp_path: Path) -> None:
    write_good(tmp_path / "images")
    Image.new("L", (4000, 3000), 128).save(tmp_path / "images" / "photo.jpg")
    batches = engine_in(tmp_path / "results").predict(trained.model, data_path=tmp_path / "images")
    assert len(batches) == len(GOOD) + 1
    model = trained.model.eval()
    for batch in batches:
        with torch.no_grad():
            expected = model(read_image(batch.image_path[0], as_tensor=True)[None])
        assert batch.pred_score.isfinite().all()
        torch.testing.assert_close(batch.pred_score, expected.pred_score, atol=1e-4, rtol=1e-4)
        assert batch.anomaly_map.shape[-2:] == (64, 64)


def with_test_image(root: Path, file_name: str) -> Path:
    """The stripes, with one more image to test, and its mask."""
    folder = write_stripes(root) / "stripes"
    BAD[file_name][0](folder / "test" / "hole" / file_name)
    masks = folder / "ground_truth" / "hole"
    shutil.copy(masks / "000_mask.png", masks / f"{Path(file_name).stem}_mask.png")
    return root


@pytest.mark.parametrize("file_name", ["text.png", "16 bits.png"])
def test_no_image_is_scored_if_the_header_of_one_is_bad(trained: Trained, tmp_path: Path, file_name: str) -> None:
    root = with_test_image(tmp_path / "data", file_name)
    engine = engine_in(tmp_path / "results")
    with pytest.raises(ValueError, match=f"{file_name}.*{BAD[file_name][1]}"):
        engine.predict(trained.model, data_path=root / "stripes" / "test")
    with pytest.raises(ValueError, match=f"{file_name}.*{BAD[file_name][1]}"):
        engine.test(trained.model, datamodule=data(root))


def test_a_truncated_image_ends_a_test_when_it_is_read(trained: Trained, tmp_path: Path) -> None:
    root = with_test_image(tmp_path / "data", "half.png")
    with pytest.raises(OSError, match="truncated"):
        engine_in(tmp_path / "results").test(trained.model, datamodule=data(root))


def spoil_mask(folder: Path) -> None:
    half_of(folder / "ground_truth" / "hole" / "003_mask.png")


def spoil_training_image(folder: Path) -> None:
    half_of(folder / "train" / "good" / "half.png")


def spoil_all_training_images(folder: Path) -> None:
    shutil.rmtree(folder / "train")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_mask, "003_mask.png cannot be read"),
        (spoil_training_image, "half.png cannot be read"),
        (spoil_all_training_images, "None of the 0 images of the training or validation set is normal; check the root"),
    ],
)
def test_bad_data_is_refused_before_training(
    name: str, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    root = write_stripes(tmp_path / "data")
    spoil(root / "stripes")
    engine = engine_in(tmp_path / "results")
    with pytest.raises(ValueError, match=words):
        engine.train(build(name), datamodule=data(root))
    assert engine.trainer.global_step == 0
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("make", [data, lambda root: folder_of(root / "stripes")], ids=["MVTecAD", "Folder"])
def test_a_missing_mask_is_refused_by_anomalib(tmp_path: Path, make: Callable[[Path], AnomalibDataModule]) -> None:
    root = write_stripes(tmp_path)
    next(root.rglob("000_mask.png")).unlink()
    with pytest.raises((ValueError, MisMatchError)):
        make(root).setup()


def test_folders_must_have_ascii_names_for_anomalib(tmp_path: Path) -> None:
    root = write_stripes(tmp_path / "für é")
    with pytest.raises(ValueError, match="Path contains non-printable characters"):
        data(root).setup()


def lock(folder: Path) -> None:
    folder.mkdir()
    PICTURE.save(folder / "0.png")
    folder.chmod(0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda folder: None, "Path does not exist: ", id="missing"),
        pytest.param(Path.mkdir, r"Found 0 (\S+ )?images in ", id="empty"),
        pytest.param(lock, "permissions denied for the path: ", id="unreadable", marks=NOT_AS_ROOT),
    ],
)
def test_a_folder_without_images_is_refused_by_anomalib(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    folder = tmp_path / "good"
    make(folder)
    with pytest.raises((OSError, RuntimeError, ValueError), match=f"{words}{folder}"):
        Folder("good", normal_dir=folder, test_split_mode="none", val_split_mode="none").setup()
    with pytest.raises((OSError, RuntimeError, ValueError), match=f"{words}{folder}"):
        PredictDataset(folder)


@pytest.mark.parametrize(("count", "refused"), [(1, {"InTra"}), (2, set())])
def test_few_training_images(name: str, tmp_path: Path, count: int, refused: set[str]) -> None:
    folder = tmp_path / "good"
    folder.mkdir()
    for index in range(count):
        PICTURE.save(folder / f"{index}.png")
    datamodule = Folder(
        "few", normal_dir=folder, test_split_mode="none", val_split_mode="same_as_test", num_workers=0
    )  # fmt: skip
    model = build(name)
    if name in refused:  # one image cannot be held out as well as trained on
        with pytest.raises(ValueError, match="none is left to train on; add images"):
            engine_in(tmp_path).fit(model, datamodule=datamodule)
    else:
        engine_in(tmp_path, limit_val_batches=0).fit(model, datamodule=datamodule)
        model.eval()
        assert model(torch.rand(1, 3, 50, 60)).anomaly_map.isfinite().all()
