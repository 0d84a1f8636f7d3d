# SPDX-License-Identifier: Apache-2.0

"""Post-processors of anomaly scores, for our models and anomalib's."""

from .post_processor import FalsePositiveRatePostProcessor
from .product_post_processor import ProductPostProcessor
from .raw_score_export import RawScoreExport
from .region_post_processor import RegionPostProcessor

__all__ = ["FalsePositiveRatePostProcessor", "ProductPostProcessor", "RawScoreExport", "RegionPostProcessor"]
