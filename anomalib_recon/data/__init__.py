# SPDX-License-Identifier: Apache-2.0

"""Data for trying the models without a download."""

from anomalib_recon.discovery import publish

from .demo import DemoAD

__all__ = ["DemoAD"]

publish(__name__)
