# SPDX-License-Identifier: Apache-2.0

"""The archives of these tests are of the published format, with random images and fewer of them."""

import hashlib
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from anomalib.data import AnomalibDataModule
from anomalib.engine import Engine
from anomalib.models import Padim
from anomalib.pre_processing import PreProcessor
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.v2 import Resize

from anomalib_recon.data import OneClassCIFAR10
from anomalib_recon.data.one_class_cifar10 import CLASSES
from anomalib_recon.metrics import RawScoreEvaluator

NOWHERE = "http://127.0.0.1:9/cifar.tar.gz"


def write(path: Path, content: dict) -> list[str]:
    """Write a file of an archive; return its name and checksum."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content))
    return [path.name, hashlib.md5(path.read_bytes()).hexdigest()]


@pytest.fixture(scope="module")
def pixels() -> dict[str, np.ndarray]:
    """Images of shape ``(n, 3, 32, 32)``: per class, 5 x 2 of CIFAR-10 to train on, 3 to test on; 20 of CIFAR-100."""
    random = np.random.default_rng(0)
    return {
        name: random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        for name, count in (("train", 100), ("test", 30), ("auxiliary", 20))
    }


@pytest.fixture
def root(tmp_path, pixels, monkeypatch) -> Path:
    """Folder with both archives, extracted; torchvision is told their checksums, and an address without a server."""

    def batch(images, key, classes):
        labels = [index % classes for index in range(len(images))]
        return {"data": images.reshape(len(images), -1), key: labels}

    folder = tmp_path / CIFAR10.base_folder
    train = [
        write(folder / f"data_batch_{index + 1}", batch(images, "labels", 10))
        for index, images in enumerate(np.split(pixels["train"], 5))
    ]
    monkeypatch.setattr(CIFAR10, "train_list", train)
    test = write(folder / "test_batch", batch(pixels["test"], "labels", 10))
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    name, checksum = write(folder / "batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": checksum})
    monkeypatch.setattr(CIFAR10, "url", NOWHERE)

    folder = tmp_path / CIFAR100.base_folder
    auxiliary = write(folder / "train", batch(pixels["auxiliary"], "fine_labels", 4))
    monkeypatch.setattr(CIFAR100, "train_list", [auxiliary])
    monkeypatch.setattr(CIFAR100, "test_list", [])
    name, checksum = write(folder / "meta", {"fine_label_names": ["apple", "bee", "can", "road"]})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": name, "key": "fine_label_names", "md5": checksum})
    monkeypatch.setattr(CIFAR100, "url", NOWHERE)
    return tmp_path


def set_up(root: Path, **arguments) -> OneClassCIFAR10:
    datamodule = OneClassCIFAR10(root=root, num_workers=0, **arguments)
    datamodule.setup()
    return datamodule


def classes(dataset) -> Counter:
    return Counter(Path(path).parent.name for path in dataset.samples.image_path)


def test_protocol_of_the_paper(root):
    datamodule = set_up(root, normal_class="cat")
    assert datamodule.category == "cat"
    assert classes(datamodule.train_data) == {"cat": 10}
    assert classes(datamodule.test_data)["cat"] == 3
    assert len(datamodule.test_data) == 6
    samples = datamodule.test_data.samples
    assert [Path(path).parent.name != "cat" for path in samples.image_path] == list(samples.label_index == 1)
    assert set(datamodule.val_data.samples.image_path) == set(samples.image_path)


def test_the_seed_draws_the_anomalies_and_all_of_them_can_be_had(root):
    drawn = {tuple(set_up(root, seed=seed).test_data.samples.image_path) for seed in (0, None, 1, 2, 3)}
    assert 1 < len(drawn) < 5
    assert classes(set_up(root, whole_test_set=True).test_data) == dict.fromkeys(CLASSES, 3)


def test_images_are_those_of_the_archive(root, pixels):
    datamodule = set_up(root, normal_class=3, num_auxiliary=20, whole_test_set=True, train_batch_size=100)
    [batch] = datamodule.train_dataloader()
    sources = {"cifar10": pixels["train"], "cifar100": pixels["auxiliary"]}
    for image, label, mask, path in zip(batch.image, batch.gt_label, batch.gt_mask, batch.image_path, strict=True):
        name = Path(path).parents[2].name
        assert np.array_equal((image * 255).round().numpy(), sources[name][int(Path(path).stem)])
        assert label == (name == "cifar100")
        assert (mask == label).all()
    assert batch.gt_label.sum() == 20
    assert len(batch.image) == 30
    for path in datamodule.test_data.samples.image_path:
        image = np.asarray(Image.open(path)).transpose(2, 0, 1)
        assert np.array_equal(image, pixels["test"][int(Path(path).stem)])


def test_files_are_written_once_and_whole(root, monkeypatch):
    saved = []

    def stop_midway(image, path):
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt
        save(image, path)

    save = Image.Image.save
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop_midway)
        with pytest.raises(KeyboardInterrupt):
            OneClassCIFAR10(root=root).prepare_data()
    assert not list(root.rglob("*.png"))
    OneClassCIFAR10(root=root).prepare_data()
    assert len(list(root.rglob("*.png"))) == 130

    for path in (root / CIFAR10.base_folder).iterdir():
        path.unlink()
    set_up(root)


def test_mistakes_are_named(root, tmp_path_factory):
    with pytest.raises(ValueError, match=r"^normal_class='lion' is not in CIFAR-10: choose 0 to 9 or one of airplane"):
        OneClassCIFAR10(normal_class="lion")
    with pytest.raises(ValueError, match=r"^normal_class=10 is not in CIFAR-10"):
        OneClassCIFAR10(normal_class=10)
    with pytest.raises(ValueError, match=r"^num_auxiliary=-1 is negative"):
        OneClassCIFAR10(num_auxiliary=-1)
    with pytest.raises(ValueError, match=r"^num_irrelevant=21 is more than the 20 images found"):
        set_up(root, num_auxiliary=21)
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(OSError, match=rf"^root={empty} lacks an intact folder cifar-10-batches-py.*: put {NOWHERE}"):
        set_up(empty)


def test_found_by_name(root):
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    for value in ("frog", "6"):
        arguments = ["--data=OneClassCIFAR10", f"--data.root={root}", f"--data.normal_class={value}"]
        datamodule = parser.instantiate_classes(parser.parse_args(arguments)).data
        assert datamodule.category == "frog"


@pytest.mark.parametrize("evaluator", [True, RawScoreEvaluator()])
def test_engine_reports_metrics_of_images_only(root, tmp_path, evaluator):
    datamodule = OneClassCIFAR10(root=root, num_workers=0, num_auxiliary=10)
    model = Padim(
        "resnet18",
        ["layer1"],
        pre_trained=False,
        n_features=16,
        pre_processor=PreProcessor(Resize((32, 32))),
        evaluator=evaluator,
    )
    engine = Engine(default_root_dir=tmp_path / "results", accelerator="cpu", enable_progress_bar=False)
    [metrics] = engine.train(model, datamodule=datamodule)
    assert metrics.keys() == {"image_AUROC", "image_F1Score"}
    pictures = list((tmp_path / "results" / "Padim" / "OneClassCIFAR10" / "airplane").rglob("images/**/*.png"))
    assert len({path.resolve() for path in pictures}) == 6
