# SPDX-License-Identifier: Apache-2.0

"""Post-processors of anomaly scores, for our models and anomalib's."""

from .post_processor import FalsePositiveRatePostProcessor
from .region import RegionOfInterest, read_region
from .region_post_processor import RegionPostProcessor

__all__ = ["FalsePositiveRatePostProcessor", "RegionOfInterest", "RegionPostProcessor", "read_region"]
