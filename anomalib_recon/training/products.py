# SPDX-License-Identifier: Apache-2.0

"""Which product an image shows, by its path."""

from collections.abc import Iterable, Sequence
from pathlib import Path


def check_products(products: Sequence[str]) -> list[str]:
    """Refuse names that cannot tell products apart.

    Args:
        products (Sequence[str]): Names of folders.

    Returns:
        list[str]: The names.

    Raises:
        ValueError: If there is none, or one is there twice.
    """
    names = [products] if isinstance(products, str) else list(products)
    if not names or len(set(names)) < len(names):
        msg = f"products must be the names of different folders, got {products}; name each product once."
        raise ValueError(msg)
    return names


def find_products(paths: Iterable[str | Path], products: Sequence[str]) -> list[int]:
    """Find the product of each image: the one whose name is that of a folder in the image's path.

    Args:
        paths (Iterable[str | Path]): Paths of images.
        products (Sequence[str]): Names of folders.

    Returns:
        list[int]: Places of the products in ``products``.

    Raises:
        ValueError: If a path has the folder of none, or of several.
    """
    found = []
    for path in paths:
        folders = set(Path(path).parts[:-1])
        matching = [index for index, name in enumerate(products) if name in folders]
        if len(matching) != 1:
            msg = (
                f"products must name one folder in the path of each image, got {list(products)}, of which "
                f"{len(matching)} are in {path}; add the product, or rename its folder."
            )
            raise ValueError(msg)
        found.append(matching[0])
    return found
