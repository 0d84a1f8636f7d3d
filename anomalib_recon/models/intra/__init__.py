# SPDX-License-Identifier: Apache-2.0

"""InTra: Inpainting Transformer for Anomaly Detection, https://arxiv.org/abs/2104.13897."""

from .lightning_model import InTra
from .torch_model import InTraModel

__all__ = ["InTra", "InTraModel"]
