# SPDX-License-Identifier: Apache-2.0

"""SAAE: Self-Attention Autoencoder for Anomaly Segmentation, Yang (2021)."""

from .lightning_model import SAAE
from .torch_model import SAAEModel

__all__ = ["SAAE", "SAAEModel"]
