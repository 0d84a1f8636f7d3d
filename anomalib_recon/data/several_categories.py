# SPDX-License-Identifier: Apache-2.0

"""Several categories in the layout of MVTec AD, for one model.

Example:
    >>> from anomalib_recon.data import SeveralCategories
    >>> datamodule = SeveralCategories("datasets/MVTecAD", ["bottle", "screw"])

    On the command line::

        anomalib train --model SAAE --data SeveralCategories --data.root datasets/MVTecAD \
            --data.categories "[bottle, screw]"
"""

from pathlib import Path

from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode
from torchvision.transforms.v2 import Transform


class SeveralCategories(Folder):
    """anomalib's ``Folder`` with the images of several categories in the layout of MVTec AD.

    Training, validation and test sets hold the images of all. Other layouts need no datamodule of their own: ``Folder``
    takes lists of folders.

    Args:
        root (Path | str): Folder of the categories.
        categories (list[str]): Their names, which are those of their folders.
        train_batch_size (int): Batch size in training.
            Defaults to ``32``.
        eval_batch_size (int): Batch size in validation and test.
            Defaults to ``32``.
        num_workers (int): Processes that load images.
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
        seed (int | None): Seed of the random splits.
            Defaults to ``None``.
    """

    def __init__(
        self,
        root: Path | str,
        categories: list[str],
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.5,
        seed: int | None = None,
    ) -> None:
        root = Path(root).resolve()  # the names of pictures are taken from the files' paths, which are
        super().__init__(
            name=root.name,
            root=root,
            normal_dir=[f"{category}/train/good" for category in categories],
            normal_test_dir=[f"{category}/test/good" for category in categories],
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
        self.categories = categories

    def _setup(self, _stage: str | None = None) -> None:
        """Find the folders of defects and of their masks.

        Raises:
            ValueError: If a category has no folder, or some defects have masks and others none.
        """
        folders = [Path(str(self.root)) / category for category in self.categories]
        for folder in folders:
            if not (folder / "train" / "good").is_dir():
                msg = f"categories must have images in ROOT/CATEGORY/train/good, but {folder} has none; check root."
                raise ValueError(msg)
        tests = [path for folder in folders for path in sorted((folder / "test").glob("*/")) if path.name != "good"]
        self.abnormal_dir = [path.absolute() for path in tests]
        masks = [path.absolute().parents[1] / "ground_truth" / path.name for path in tests]
        missing = [path for path in masks if not path.is_dir()]
        if 0 < len(missing) < len(masks):
            msg = f"categories must all have masks, or none, but there is no folder {missing[0]}; add it."
            raise ValueError(msg)
        self.mask_dir = masks if masks and not missing else None
        super()._setup(_stage)
