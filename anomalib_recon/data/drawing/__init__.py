# SPDX-License-Identifier: Apache-2.0

"""Drawn categories for :class:`anomalib_recon.data.DemoAD`: what they are and how their folders are filled."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from PIL import Image

from . import grid, leather, plate
from .canvas import Flaw, Mask, Picture, Surface, photograph

# Part of the folder's name: raise it with any change of the drawings, so that old pictures are not taken for new ones.
VERSION = 1

TRAIN_PICTURES = 60
GOOD_TEST_PICTURES = 10
PICTURES_PER_DEFECT = 6

Family: TypeAlias = Literal["structural", "missing part", "contamination", "misplacement"]


@dataclass(frozen=True)
class Category:
    """One kind of thing to inspect.

    Args:
        render: Draws one scene from its random numbers, with a defect or without.
        defects: The defect types by the name of their folder, each with its family.
    """

    render: Callable[[np.random.Generator, Flaw], Surface]
    defects: dict[str, Family]


CATEGORIES = {
    "grid": Category(
        grid.render,
        {
            "bent_wire": "misplacement",
            "broken_wire": "missing part",
            "clogged": "contamination",
            "cut": "structural",
            "fibre": "contamination",
        },
    ),
    "leather": Category(
        leather.render,
        {
            "cut": "structural",
            "fold": "misplacement",
            "glue": "contamination",
            "stain": "contamination",
            "worn": "missing part",
        },
    ),
    "plate": Category(
        plate.render,
        {
            "chipped_edge": "structural",
            "misplaced_label": "misplacement",
            "missing_part": "missing part",
            "scratch": "structural",
            "swarf": "contamination",
        },
    ),
}


def draw(category: str, split: str, kind: str, number: int, seed: int) -> tuple[Picture, Mask]:
    """Draw one picture and its ground truth.

    The defects of one type grow with their number, from subtle to plain.

    Args:
        category: A name in :data:`CATEGORIES`.
        split: ``"train"`` or ``"test"``.
        kind: ``"good"`` or one of the category's defects.
        number: Number of the picture within its folder, below :data:`PICTURES_PER_DEFECT` for a defect.
        seed: Non-negative seed of the whole set. The same arguments always give the same picture.

    Returns:
        Picture ``(256, 256, 3)`` of type uint8 and mask ``(256, 256)`` of type bool.
    """
    render = CATEGORIES[category].render
    entropy = [seed, *f"{category}/{split}/{kind}/{number}".encode()]
    scene, defect, camera = np.random.SeedSequence(entropy).spawn(3)

    def surface(shown: str) -> Surface:
        """Render the scene with the defect or, as ``"good"``, without it."""
        flaw = Flaw(shown, number / (PICTURES_PER_DEFECT - 1), np.random.default_rng(defect))
        return render(np.random.default_rng(scene), flaw)

    clean = surface("good")
    return photograph(clean, clean if kind == "good" else surface(kind), np.random.default_rng(camera))


def draw_category(folder: Path, category: str, seed: int) -> None:
    """Fill a folder with all pictures and masks of a category, in the layout of MVTec AD.

    Args:
        folder: The category's folder; it must not exist.
        category: A name in :data:`CATEGORIES`.
        seed: Non-negative seed of the pictures.
    """
    counts = {("train", "good"): TRAIN_PICTURES, ("test", "good"): GOOD_TEST_PICTURES}
    counts |= {("test", kind): PICTURES_PER_DEFECT for kind in CATEGORIES[category].defects}
    for (split, kind), count in counts.items():
        pictures, masks = folder / split / kind, folder / "ground_truth" / kind
        pictures.mkdir(parents=True)
        if kind != "good":
            masks.mkdir(parents=True)
        for number in range(count):
            picture, mask = draw(category, split, kind, number, seed)
            Image.fromarray(picture).save(pictures / f"{number:03}.png")
            if kind != "good":
                Image.fromarray(mask).convert("L").save(masks / f"{number:03}_mask.png")
