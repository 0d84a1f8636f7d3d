# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_recon.data import LabelledFolder
from tests.conftest import draw_stripes, save, write_stripes

FOLDERS = {
    "name": "stripes",
    "normal_dir": "train/good",
    "normal_test_dir": "test/good",
    "abnormal_dir": ["test/hole", "test/large"],
    "mask_dir": ["ground_truth/hole", "ground_truth/large"],
    "train_abnormal_dir": ["test/hole", "test/large"],
    "train_mask_dir": ["ground_truth/hole", "ground_truth/large"],
    "num_workers": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """12 normal images, 4 good and 6 + 3 defective test images, 5 irrelevant ones; `large` and those are larger."""
    root = write_stripes(tmp_path_factory.mktemp("data")) / "stripes"
    random = np.random.default_rng(1)
    for index in range(3):
        image, mask = draw_stripes(random, (80, 96), hole=True)
        save(image, root / "test" / "large" / f"{index:03d}.png")
        save(mask, root / "ground_truth" / "large" / f"{index:03d}_mask.png")
    for index in range(5):
        save(random.random((90, 70)), root.parent / "irrelevant" / f"{index // 3}" / f"{index}.PNG")
    return root


def set_up(root: Path, **arguments) -> LabelledFolder:
    datamodule = LabelledFolder(**{**FOLDERS, "root": root, **arguments})
    datamodule.setup()
    return datamodule


def resolved(dataset) -> set[Path]:
    return {Path(path).resolve() for path in dataset.samples.image_path}


def test_masks_are_zeros_the_drawn_holes_or_ones(data):
    datamodule = set_up(
        data, num_train_abnormal=7, irrelevant_dir=data.parent / "irrelevant", augmentations=Resize((64, 64))
    )
    batches = list(datamodule.train_dataloader())
    paths = [Path(path) for batch in batches for path in batch.image_path]
    labels = torch.cat([batch.gt_label for batch in batches])
    masks = torch.cat([batch.gt_mask for batch in batches])
    assert masks.shape == (12 + 7 + 5, 64, 64)
    assert labels.sum() == 7 + 5
    for path, label, mask in zip(paths, labels, masks, strict=True):
        assert label == (path.parent.name != "good")
        if path.parent.name == "good":
            assert not mask.any()
        elif path.is_relative_to(data.parent / "irrelevant"):
            assert mask.all()
        elif path.parent.name == "hole":
            assert mask.sum() == 12 * 12
        else:
            assert 0.5 < mask.sum() / (12 * 12 * 64 * 64 / (80 * 96)) < 1.5


def test_images_of_different_sizes_share_a_batch(data):
    [batch] = set_up(data, num_train_abnormal=8, train_batch_size=100).train_dataloader()
    assert batch.image.shape == (20, 3, 80, 96)
    assert torch.equal(batch.gt_mask.flatten(1).any(dim=1), batch.gt_label)


def test_masks_may_be_of_another_size_than_their_images(data, tmp_path):
    masks = tmp_path / "masks"
    for path in (data / "ground_truth" / "hole").iterdir():
        mask = np.asarray(Image.open(path)) / 255
        save(mask.repeat(2, axis=0).repeat(3, axis=1), masks / path.name)
    given = {"abnormal_dir": "test/hole", "mask_dir": "ground_truth/hole", "train_abnormal_dir": "test/hole"}
    datasets = [
        set_up(data, **given, train_mask_dir=folder, num_train_abnormal=4).train_data
        for folder in ("ground_truth/hole", masks)
    ]
    for item, other in zip(*datasets, strict=True):
        assert torch.equal(item.gt_mask, other.gt_mask)


def test_defects_without_masks_leave_no_mask_in_any_batch(data):
    datamodule = set_up(data, train_mask_dir=None, num_train_abnormal=2, irrelevant_dir=data.parent / "irrelevant")
    assert datamodule.train_data.task == "classification"
    batches = list(datamodule.train_dataloader())
    assert all(batch.gt_mask is None for batch in batches)
    assert sum(batch.gt_label.sum() for batch in batches) == 2 + 5
    assert next(iter(datamodule.test_dataloader())).gt_mask is not None


@pytest.mark.parametrize("mode", ["from_test", "same_as_test", "from_train", "none"])
@pytest.mark.parametrize("normal_test_dir", ["test/good", None])
def test_no_image_is_trained_on_and_tested_on(data, tmp_path, mode, normal_test_dir):
    links = tmp_path / "chosen"  # a selection of defects, as links to the test images
    links.mkdir()
    for index in range(4):
        (links / f"{index:03d}.png").symlink_to(data / "test" / "hole" / f"{index:03d}.png")
    datamodule = set_up(
        data,
        train_abnormal_dir=links,
        train_mask_dir="ground_truth/hole",
        irrelevant_dir=data.parent / "irrelevant",
        val_split_mode=mode,
        normal_test_dir=normal_test_dir,
    )
    trained, tested = resolved(datamodule.train_data), resolved(datamodule.test_data)
    validated = resolved(datamodule.val_data) if mode != "none" else set()
    assert {path for path in trained if path.parent.name == "hole"} == resolved_links(links)
    assert trained.isdisjoint(tested | validated)
    assert {path.parent.name for path in tested | validated} == {"good", "hole", "large"}
    assert sum(path.parent.name in {"hole", "large"} for path in tested | validated) == 9 - 4
    assert (tested == validated) == (mode == "same_as_test")


def resolved_links(folder: Path) -> set[Path]:
    return {path.resolve() for path in folder.iterdir()}


def test_the_seed_draws_the_defects(data):
    def defects(seed):
        samples = set_up(data, num_train_abnormal=4, seed=seed).train_data.samples
        return list(samples.image_path[samples.label_index == 1])

    assert defects(None) == defects(None)
    assert len({tuple(defects(seed)) for seed in range(5)}) > 1
    assert all(len(defects(seed)) == 4 for seed in range(5))


def test_without_labelled_images_it_is_anomalibs_folder(data):
    datamodule = set_up(data, train_abnormal_dir=None, train_mask_dir=None)
    assert not datamodule.train_data.has_anomalous
    assert len(datamodule.train_data) == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_abnormal_dir": None}, "^train_mask_dir=.* is given without train_abnormal_dir"),
        ({"num_train_abnormal": 0}, "^num_train_abnormal=0 is less than 1"),
        ({"num_irrelevant": 3}, "^num_irrelevant=3 is given without irrelevant_dir"),
        ({"train_abnormal_dir": "no", "train_mask_dir": None}, "^train_abnormal_dir names .*no, which is not a folder"),
        ({"irrelevant_dir": "no"}, "^irrelevant_dir names .*no, which is not a folder"),
        ({"irrelevant_dir": "empty"}, "^irrelevant_dir names .*empty, which has no image"),
        ({"train_mask_dir": "ground_truth/hole"}, "^train_mask_dir names 1 folders and train_abnormal_dir 2"),
        (
            {"train_mask_dir": ["ground_truth/large", "ground_truth/large"]},
            "^train_mask_dir has no mask of .*003.png, named 003 or 003_mask",
        ),
        ({"num_train_abnormal": 10}, "^num_train_abnormal=10 is more than the 9 images found"),
        ({}, "^All images of abnormal_dir=.* are trained on"),
        (
            {"train_abnormal_dir": "train/good", "train_mask_dir": None},
            "^train_abnormal_dir and a folder of normal images both hold .*000.png",
        ),
        ({"irrelevant_dir": "test/hole"}, "^irrelevant_dir and another folder of this datamodule both hold .*000.png"),
    ],
)
def test_mistakes_are_named(data, arguments, message):
    (data / "empty").mkdir(exist_ok=True)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        set_up(data, **arguments)


def test_found_by_name(data):
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    arguments = {**FOLDERS, "root": str(data), "num_train_abnormal": 3}
    text = [f"--data.{name}={value}" for name, value in arguments.items()]
    datamodule = parser.instantiate_classes(parser.parse_args(["--data=LabelledFolder", *text])).data
    assert isinstance(datamodule, LabelledFolder)
    assert datamodule.train_abnormal_dir == ["test/hole", "test/large"]
    datamodule.setup()
    assert datamodule.train_data.samples.label_index.sum() == 3
    assert isinstance(get_datamodule({"class_path": "LabelledFolder", "init_args": arguments}), LabelledFolder)


def test_engine_trains_and_tests(data, tmp_path):
    datamodule = LabelledFolder(**FOLDERS, root=data, num_train_abnormal=3, val_split_mode="same_as_test")
    pre_processor = PreProcessor(Resize((64, 64)))
    model = Padim("resnet18", ["layer1"], pre_trained=False, n_features=16, pre_processor=pre_processor)
    engine = Engine(default_root_dir=tmp_path, accelerator="cpu", enable_progress_bar=False)
    [metrics] = engine.train(model, datamodule=datamodule)
    assert 0 <= metrics["pixel_AUROC"] <= 1
    assert len(list(tmp_path.rglob("images/**/*.png"))) == 4 + 6
