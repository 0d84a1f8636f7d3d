# SPDX-License-Identifier: Apache-2.0

"""Exported models without torch: run them, and set other thresholds.

Importing this package imports numpy alone; openvino, onnxruntime and Pillow are imported when they are needed.
"""

from .calibration import find_thresholds, set_thresholds
from .grey_levels import GreyLevels
from .images import find_images, read_image, resize
from .metadata import Scale, Thresholds
from .model import ExportedModel

__all__ = [
    "ExportedModel",
    "GreyLevels",
    "Scale",
    "Thresholds",
    "find_images",
    "find_thresholds",
    "read_image",
    "resize",
    "set_thresholds",
]
