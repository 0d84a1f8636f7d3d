# SPDX-License-Identifier: Apache-2.0

"""PatchAE: Patch-wise Auto-Encoder for Visual Anomaly Detection, https://arxiv.org/abs/2308.00429."""

from .lightning_model import PatchAE
from .torch_model import PatchAEModel

__all__ = ["PatchAE", "PatchAEModel"]
