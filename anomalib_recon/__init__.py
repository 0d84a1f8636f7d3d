# SPDX-License-Identifier: Apache-2.0

"""Reconstruction models for visual anomaly detection, as a plugin for anomalib.

Importing this package imports neither torch nor anomalib, because torch itself imports it
(see :mod:`anomalib_recon.discovery`). The models are in :mod:`anomalib_recon.models`.
"""

__version__ = "0.1.0"
