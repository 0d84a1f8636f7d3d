# SPDX-License-Identifier: Apache-2.0

"""The config files of this package."""

from pathlib import Path
from typing import Any

import yaml


def config_path(name: str) -> Path:
    """Find a config file of this package.

    Args:
        name (str): Path inside the folder ``configs``, such as ``"quickstart/intra.yaml"``.

    Returns:
        Path: The file, in the installed package or in the checkout.
    """
    package = Path(__file__).parent
    installed = package / "configs" / name
    return installed if installed.exists() else package.parent / "configs" / name


def read_config(name: str) -> dict[str, Any]:
    """Read a config file of this package.

    Args:
        name (str): Path inside the folder ``configs``.

    Returns:
        dict[str, Any]: What it holds.
    """
    return yaml.safe_load(config_path(name).read_text(encoding="utf-8"))
