# SPDX-License-Identifier: Apache-2.0

"""The config files of this package."""

from pathlib import Path


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
