# SPDX-License-Identifier: Apache-2.0

"""Files that are written whole or not at all."""

import os
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only


@rank_zero_only
def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and its folder; of several processes the first one does.

    Args:
        path (Path): The file.
        content (bytes): What it is to hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
