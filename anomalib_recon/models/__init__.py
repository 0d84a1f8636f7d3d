# SPDX-License-Identifier: Apache-2.0

"""The models. A class named in ``__all__`` is found by anomalib under its name."""

from anomalib_recon import discovery

from .adtr import ADTR
from .feature_inpainting import FeatureInpainting
from .intra import InTra
from .patch_ae import PatchAE
from .saae import SAAE

__all__ = ["ADTR", "SAAE", "FeatureInpainting", "InTra", "PatchAE"]

discovery.publish(__name__)
