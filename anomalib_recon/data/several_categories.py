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
from typing import Any

from anomalib.data import Folder
from anomalib.data.utils import ValSplitMode


class SeveralCategories(Folder):
    """anomalib's ``Folder`` with the images of several categories in the layout of MVTec AD.

    Training, validation and test sets hold the images of all. Other layouts need no datamodule of their own: ``Folder``
    takes lists of folders.

    Args:
        root (Path | str): Folder of the categories.
        categories (list[str]): Their names, which are those of their folders.
        val_split_mode (ValSplitMode | str): How the validation set is made.
            Defaults to ``ValSplitMode.SAME_AS_TEST``.
        **kwargs (Any): The other arguments of ``Folder``.
    """

    def __init__(
        self,
        root: Path | str,
        categories: list[str],
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        **kwargs: Any,
    ) -> None:
        root = Path(root).resolve()  # names of pictures are taken from the paths of files, which are resolved, too
        super().__init__(
            name=root.name,
            root=root,
            normal_dir=[f"{category}/train/good" for category in categories],
            normal_test_dir=[f"{category}/test/good" for category in categories],
            abnormal_dir=None,  # both are found by _setup
            mask_dir=None,
            val_split_mode=val_split_mode,
            **kwargs,
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
        found = [path for folder in folders for path in sorted((folder / "test").glob("*"))]
        tests = [path for path in found if path.is_dir() and path.name != "good"]
        self.abnormal_dir = [path.absolute() for path in tests]
        masks = [path.absolute().parents[1] / "ground_truth" / path.name for path in tests]
        missing = [path for path in masks if not path.is_dir()]
        if 0 < len(missing) < len(masks):
            msg = f"categories must all have masks, or none, but there is no folder {missing[0]}; add it."
            raise ValueError(msg)
        self.mask_dir = masks if masks and not missing else None
        super()._setup(_stage)
