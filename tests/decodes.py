# SPDX-License-Identifier: Apache-2.0

"""Image files that are decoded, counted where Pillow does it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from PIL import ImageFile


@contextmanager
def count_decodes() -> Iterator[Counter[str]]:
    """Count how often each file is decoded, in this process."""
    counts: Counter[str] = Counter()
    load = ImageFile.ImageFile.load

    def count_and_load(image: ImageFile.ImageFile) -> object:
        if image.tile:  # not yet decoded
            counts[str(image.filename)] += 1
        return load(image)

    with patch.object(ImageFile.ImageFile, "load", count_and_load):
        yield counts
