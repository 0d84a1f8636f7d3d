# SPDX-License-Identifier: Apache-2.0

"""ADTR: Anomaly Detection Transformer with Feature Reconstruction, https://arxiv.org/abs/2209.01816."""

from .lightning_model import ADTR
from .torch_model import ADTRModel

__all__ = ["ADTR", "ADTRModel"]
