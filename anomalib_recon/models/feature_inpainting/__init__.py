# SPDX-License-Identifier: Apache-2.0

"""Inpainting of a frozen backbone's features: InTra's idea, in closed form."""

from .lightning_model import FeatureInpainting
from .torch_model import FeatureInpaintingModel

__all__ = ["FeatureInpainting", "FeatureInpaintingModel"]
