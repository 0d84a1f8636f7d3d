# SPDX-License-Identifier: Apache-2.0

"""Post-processors of anomaly scores, for our models and anomalib's."""

from .post_processor import FalsePositiveRatePostProcessor

__all__ = ["FalsePositiveRatePostProcessor"]
