# SPDX-License-Identifier: Apache-2.0

"""One class of CIFAR-10 against the nine others (section 4.1 of the ADTR paper).

The data lie in ``root``:

============================================= ======================================================================
folder                                        content
============================================= ======================================================================
``cifar-10-batches-py``, ``cifar-100-python`` the data sets as published, to write the files from
``cifar10/train``, ``cifar10/test``,          the images as files, which anomalib works on: ``cat/00012.png`` is a
``cifar100/train``                            cat, and the 13th image of that part of the data set
============================================= ======================================================================

Example:
    >>> from anomalib_recon.data import OneClassCIFAR10
    >>> datamodule = OneClassCIFAR10(normal_class="cat")

    On the command line, with as many irrelevant images to train on as normal ones::

        anomalib train --model ADTR --data OneClassCIFAR10 --data.normal_class cat --data.num_auxiliary 5000

Paper:
    Krizhevsky, Learning multiple layers of features from tiny images, 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from anomalib.data.utils import ValSplitMode, split_by_label
from anomalib.utils.path import resolve_dataset_root
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.v2 import Transform
from tqdm import tqdm

from .labelled_folder import LabelledFolder, draw

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# seconds; torchvision sets no limit itself, and would wait for minutes where a firewall drops its packets
NETWORK_TIMEOUT = 20


class OneClassCIFAR10(LabelledFolder):
    """Train on one class of CIFAR-10, test on that class and the others.

    The training set is that of the class, 5000 images, and on request irrelevant images from the training set of
    CIFAR-100. The test set has the 1000 test images of the class, and as many drawn from those of the other classes.
    There are no masks to test with: the task is to classify images.

    CIFAR-10, and CIFAR-100 if it is used, are downloaded unless they are in ``root``. On first use, the images are
    written as files, which takes half a minute.

    Args:
        root (Path | str | None): Folder of the data; ``None`` for anomalib's cache of data sets.
            Defaults to ``"./datasets/CIFAR"``.
        normal_class (int | str): Name or number of the normal class: ``"airplane"`` (0), ``"automobile"``, ``"bird"``,
            ``"cat"``, ``"deer"``, ``"dog"``, ``"frog"``, ``"horse"``, ``"ship"`` or ``"truck"`` (9).
            Defaults to ``"airplane"``.
        num_auxiliary (int): Number of images to draw from CIFAR-100 as training anomalies; in the paper as many as
            normal images, 5000.
            Defaults to ``0``.
        whole_test_set (bool): Whether to test on all 9000 images of the other classes, as many other papers do.
            Defaults to ``False``, the protocol of the ADTR paper.
        train_batch_size (int): Training batch size.
            Defaults to ``128``, that of the paper.
        eval_batch_size (int): Validation and test batch size.
            Defaults to ``128``.
        num_workers (int): Number of processes that load images.
            Defaults to ``8``.
        train_augmentations (Transform | None): Augmentations of the training images.
            Defaults to ``None``.
        val_augmentations (Transform | None): Augmentations of the validation images.
            Defaults to ``None``.
        test_augmentations (Transform | None): Augmentations of the test images.
            Defaults to ``None``.
        augmentations (Transform | None): Augmentations where no stage-specific ones are given.
            Defaults to ``None``.
        val_split_mode (ValSplitMode | str): How the validation set is made.
            Defaults to ``ValSplitMode.SAME_AS_TEST``.
        val_split_ratio (float): Share of the data used for validation.
            Defaults to ``0.5``.
        seed (int | None): Seed of the draws and of a random validation split.
            Defaults to ``None``, which is 0 in the draws.

    Raises:
        ValueError: If the class is unknown or ``num_auxiliary`` is negative; from ``setup``, if it is too large.
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/CIFAR",
        normal_class: int | str = "airplane",
        num_auxiliary: int = 0,
        whole_test_set: bool = False,
        train_batch_size: int = 128,
        eval_batch_size: int = 128,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        if normal_class not in (*CLASSES, *range(len(CLASSES))):
            msg = f"normal_class={normal_class!r} is not in CIFAR-10: choose 0 to 9 or one of {', '.join(CLASSES)}."
            raise ValueError(msg)
        if num_auxiliary < 0:
            msg = f"num_auxiliary={num_auxiliary} is negative: choose 0 or more."
            raise ValueError(msg)
        name = CLASSES[normal_class] if isinstance(normal_class, int) else normal_class
        self.root: Path
        super().__init__(
            name="OneClassCIFAR10",
            root=resolve_dataset_root(root, "CIFAR"),
            normal_dir=f"cifar10/train/{name}",
            normal_test_dir=f"cifar10/test/{name}",
            abnormal_dir=[f"cifar10/test/{other}" for other in CLASSES if other != name],
            irrelevant_dir="cifar100/train" if num_auxiliary else None,
            num_irrelevant=num_auxiliary or None,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        self.category = name
        self.num_auxiliary = num_auxiliary
        self.whole_test_set = whole_test_set

    def prepare_data(self) -> None:
        """Download what is missing, and write the images as files unless they are there.

        Raises:
            OSError: If the data is neither in ``root`` nor to be had, or the images cannot be written.
        """
        for split in ("train", "test"):
            _write_images(self.root, CIFAR10, split, self.root / "cifar10" / split)
        if self.num_auxiliary:
            _write_images(self.root, CIFAR100, "train", self.root / "cifar100" / "train")

    def _setup(self, _stage: str | None = None) -> None:
        """Make the training and test sets."""
        self.prepare_data()
        super()._setup(_stage)
        if not self.whole_test_set:
            normal, anomalous = split_by_label(self.test_data)
            self.test_data = normal + anomalous.subsample(draw(len(anomalous), len(normal), self.seed))


def _write_images(root: Path, archive: type[CIFAR10], split: str, folder: Path) -> None:
    """Write a split of a dataset of torchvision as PNG files, in one folder a class.

    The folder appears under its name only when complete.
    """
    if folder.is_dir():
        return
    dataset = _load(root, archive, split)
    try:
        folder.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=".writing-") as temporary:
            written = Path(temporary) / split
            for name in dataset.classes:
                (written / name).mkdir(parents=True)
            for index, (image, target) in enumerate(tqdm(dataset, desc=f"Writing {folder}")):
                image.save(written / dataset.classes[target] / f"{index:05d}.png")
            written.rename(folder)
    except OSError as error:
        if folder.is_dir():  # another process wrote the same images and was first
            return
        msg = f"root={root} cannot hold the images ({error.strerror}): pass a folder you can write to."
        raise OSError(msg) from error


def _load(root: Path, archive: type[CIFAR10], split: str) -> CIFAR10:
    try:
        with _network_timeout():
            return archive(root, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:  # torchvision's word for a wrong checksum is RuntimeError
        msg = (
            f"root={root} lacks an intact folder {archive.base_folder}, and it cannot be downloaded ({error}): put "
            f"{archive.url}, fetched elsewhere, into that root as {archive.filename}."
        )
        raise OSError(msg) from error


@contextmanager
def _network_timeout() -> Iterator[None]:
    previous = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(previous)
