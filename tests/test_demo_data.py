# SPDX-License-Identifier: Apache-2.0

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anomalib.data
import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models.image.padim.torch_model import PadimModel
from jsonargparse import ArgumentParser
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import Resize

from anomalib_recon.data import DemoAD, drawing

FAMILIES = {"structural", "missing part", "contamination", "misplacement"}


@pytest.fixture(scope="module")
def leather(drawn: Path) -> DemoAD:
    """A whole category."""
    datamodule = DemoAD(root=drawn, category="leather", augmentations=Resize((128, 128)))
    datamodule.prepare_data()
    return datamodule


@pytest.fixture
def few_pictures(monkeypatch):
    monkeypatch.setattr(drawing, "TRAIN_PICTURES", 2)
    monkeypatch.setattr(drawing, "GOOD_TEST_PICTURES", 1)
    monkeypatch.setattr(drawing, "PICTURES_PER_DEFECT", 2)


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_layout_and_counts(leather):
    folder = leather.root / "leather"
    expected = {"train/good": 60, "test/good": 10}
    for kind in drawing.CATEGORIES["leather"].defects:
        expected |= {f"test/{kind}": 6, f"ground_truth/{kind}": 6}
    files = contents(folder)
    assert {name: sum(file.startswith(f"{name}/") for file in files) for name in expected} == expected
    assert len(files) == sum(expected.values())
    assert "ground_truth/cut/005_mask.png" in files
    for file in files:
        with Image.open(folder / file) as picture:
            assert picture.size == (256, 256)
            assert picture.mode == ("L" if file.startswith("ground_truth") else "RGB")


@pytest.mark.parametrize("category", drawing.CATEGORIES)
def test_defect_types_cover_the_four_families(category):
    assert set(drawing.CATEGORIES[category].defects.values()) == FAMILIES


@pytest.mark.parametrize("category", drawing.CATEGORIES)
def test_masks_show_where_the_defect_is(drawn, category):
    datamodule = DemoAD(root=drawn, category=category)
    datamodule.prepare_data()
    for kind in drawing.CATEGORIES[category].defects:
        paths = sorted((datamodule.root / category / "ground_truth" / kind).glob("*.png"))
        areas = [(np.asarray(Image.open(path)) > 0).mean() for path in paths]
        assert min(areas) > 0.001, kind
        assert max(areas) < 0.1, kind
        assert areas[-1] > areas[0], f"{kind} does not grow"


@pytest.mark.parametrize("category", drawing.CATEGORIES)
def test_normal_pictures_have_no_mask_and_vary(category):
    (first, mask), (second, _) = (drawing.draw(category, "test", "good", number, seed=0) for number in (0, 1))
    assert not mask.any()
    assert np.abs(first.astype(int) - second).mean() > 2


@pytest.mark.usefixtures("few_pictures")
@pytest.mark.parametrize("category", drawing.CATEGORIES)
def test_the_seed_decides_every_byte(tmp_path, category):
    first, again, other = (
        DemoAD(root=tmp_path / name, category=category, picture_seed=seed)
        for name, seed in (("first", 3), ("second", 3), ("second", 4))
    )
    for datamodule in (first, again, other):
        datamodule.prepare_data()
    pictures = contents(first.root)
    assert len(set(pictures.values())) == len(pictures) == 2 + 1 + 2 * 2 * 5
    assert contents(again.root) == pictures
    assert set(contents(other.root).values()).isdisjoint(pictures.values())


@pytest.mark.usefixtures("few_pictures")
def test_a_stopped_run_leaves_nothing_and_the_next_one_succeeds(tmp_path, monkeypatch):
    numbers = []

    def stop_midway(category, split, kind, number, seed):
        numbers.append(number)
        if len(numbers) == 5:
            raise KeyboardInterrupt
        return draw(category, split, kind, number, seed)

    draw = drawing.draw
    monkeypatch.setattr(drawing, "draw", stop_midway)
    with pytest.raises(KeyboardInterrupt):
        DemoAD(root=tmp_path).prepare_data()
    assert contents(tmp_path) == {}
    DemoAD(root=tmp_path).prepare_data()
    assert len(contents(tmp_path)) == 2 + 1 + 2 * 2 * 5


@pytest.mark.usefixtures("few_pictures")
def test_two_runs_at_once_share_one_result(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(DemoAD.prepare_data, [DemoAD(root=tmp_path), DemoAD(root=tmp_path)]))
    assert len(contents(tmp_path)) == 2 + 1 + 2 * 2 * 5


@pytest.mark.usefixtures("few_pictures")
def test_pictures_are_reused(tmp_path):
    DemoAD(root=tmp_path).setup()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    DemoAD(root=tmp_path).setup()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^category='bottle' is not drawn: choose one of grid, leather, plate\.$"):
        DemoAD(category="bottle")
    with pytest.raises(ValueError, match="picture_seed=-1 is negative"):
        DemoAD(picture_seed=-1)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^root=.*file cannot hold the pictures .*: pass a folder you can write to\.$"):
        DemoAD(root=tmp_path / "file").prepare_data()


def test_anomalib_reads_it(leather):
    leather.setup()
    assert (leather.name, leather.category) == ("DemoAD", "leather")
    assert (len(leather.train_data), len(leather.val_data), len(leather.test_data)) == (60, 40, 40)
    train_batch = next(iter(leather.train_dataloader()))
    assert train_batch.image.shape == (8, 3, 128, 128)
    assert not train_batch.gt_label.any()
    for loader in (leather.val_dataloader(), leather.test_dataloader()):
        batches = list(loader)
        labels = torch.cat([batch.gt_label for batch in batches])
        masks = torch.cat([batch.gt_mask for batch in batches])
        assert labels.sum() == 30
        assert masks.shape == (40, 128, 128)
        assert torch.equal(masks.flatten(1).any(dim=1), labels.bool())


def test_found_by_name(tmp_path, monkeypatch):
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    config = parser.parse_args(["--data", "DemoAD", "--data.category", "plate", "--data.root", str(tmp_path)])
    assert parser.instantiate_classes(config).data.category == "plate"
    monkeypatch.setattr(anomalib.data, "DemoAD", DemoAD, raising=False)
    datamodule = get_datamodule({"class_path": "DemoAD", "init_args": {"category": "plate", "root": str(tmp_path)}})
    assert isinstance(datamodule, DemoAD)


def test_untrained_padim_does_not_solve_it(leather):
    torch.manual_seed(0)
    model = PadimModel("resnet18", ["layer1", "layer2", "layer3"], pre_trained=False)
    leather.setup()
    with torch.no_grad():
        for batch in leather.train_dataloader():
            model(batch.image)
        model.fit()
        model.eval()
        scored = [(batch.gt_label, model(batch.image).pred_score.flatten()) for batch in leather.test_dataloader()]
    labels, scores = (torch.cat(column) for column in zip(*scored, strict=True))
    assert 0.6 < roc_auc_score(labels, scores) < 0.97
