# SPDX-License-Identifier: Apache-2.0

"""The models. A class named in ``__all__`` is found by anomalib under its name."""

from .intra import InTra

__all__ = ["InTra"]
