# SPDX-License-Identifier: Apache-2.0

"""Demo data: small inspection tasks that are drawn, not downloaded.

Each category holds 60 normal pictures for training and 40 for testing, 10 of them normal and 6 of each of five defect
types with pixel-precise ground truth, all 256 x 256 RGB PNG files:

========= ============================= ================= ========================== ===============
category  structural                    missing part      contamination              misplacement
========= ============================= ================= ========================== ===============
grid      cut                           broken_wire       clogged, fibre             bent_wire
leather   cut                           worn              glue, stain                fold
plate     chipped_edge, scratch         missing_part      swarf                      misplaced_label
========= ============================= ================= ========================== ===============

Example:
    >>> from anomalib_recon.data import DemoAD
    >>> datamodule = DemoAD(category="grid")
    >>> datamodule.prepare_data()

    On the command line::

        anomalib train --model InTra --data DemoAD --data.category grid

Notes:
    The pictures show how a model is used and whether it works at all. Scores on them say nothing about real
    inspection tasks.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.data import MVTecAD
from anomalib.utils.path import resolve_dataset_root

from . import drawing


class DemoAD(MVTecAD):
    """Drawn categories in the layout of MVTec AD.

    The pictures of a category are drawn on first use, in less than half a minute, and lie in
    ``root/v<version of the drawings>-seed<picture_seed>/category``.

    Args:
        root (Path | str | None): Folder of the data set; ``None`` for anomalib's cache of data sets.
            Defaults to ``"./datasets/DemoAD"``.
        category (str): ``"grid"`` (a woven wire mesh), ``"leather"`` or ``"plate"`` (a machined plate).
            Defaults to ``"grid"``.
        picture_seed (int): Non-negative seed of the drawings: the same seed gives the same pictures.
            Defaults to ``0``.
        train_batch_size (int): Training batch size.
            Defaults to ``8``.
        eval_batch_size (int): Validation and test batch size.
            Defaults to ``8``.
        num_workers (int): Number of processes that load pictures.
            Defaults to ``0``.
        **kwargs (Any): The other arguments of ``MVTecAD``; its ``seed`` is that of random splits, not of the pictures.

    Raises:
        ValueError: If the category is unknown or ``picture_seed`` is negative.
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/DemoAD",
        category: str = "grid",
        picture_seed: int = 0,
        train_batch_size: int = 8,
        eval_batch_size: int = 8,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        if category not in drawing.CATEGORIES:
            msg = f"category={category!r} is not drawn: choose one of {', '.join(drawing.CATEGORIES)}."
            raise ValueError(msg)
        if picture_seed < 0:
            msg = f"picture_seed={picture_seed} is negative: choose 0 or more."
            raise ValueError(msg)
        super().__init__(
            root=resolve_dataset_root(root, "DemoAD") / f"v{drawing.VERSION}-seed{picture_seed}",
            category=category,
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            **kwargs,
        )
        self.picture_seed = picture_seed

    def prepare_data(self) -> None:
        """Draw the category unless it is there.

        It appears under its name only when complete, so a run that is stopped leaves nothing that looks whole.

        Raises:
            OSError: If the pictures cannot be written.
        """
        folder = self.root / self.category
        if folder.is_dir():
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=self.root, prefix=".drawing-") as temporary:
                drawn = Path(temporary) / self.category
                drawing.draw_category(drawn, self.category, self.picture_seed)
                drawn.rename(folder)
        except OSError as error:
            if folder.is_dir():  # another process drew the same pictures and was first
                return
            msg = (
                f"root={self.root.parent} cannot hold the pictures ({error.strerror}): pass a folder you can write to."
            )
            raise OSError(msg) from error

    def _setup(self, _stage: str | None = None) -> None:
        """Set up the datasets, drawing them if they are not there."""
        self.prepare_data()
        super()._setup(_stage)
