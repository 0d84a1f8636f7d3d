# SPDX-License-Identifier: Apache-2.0

"""Post-processors of anomaly scores, for our models and anomalib's."""

from .post_processor import FalsePositiveRatePostProcessor
from .raw_score_export import RawScoreExport

__all__ = ["FalsePositiveRatePostProcessor", "RawScoreExport"]
