# SPDX-License-Identifier: Apache-2.0

"""Metrics of the scores a model gives, not of what post-processing makes of them.

anomalib's post-processor normalises scores and clamps them to [0, 1] before the metrics see them, and scores that
become equal distort AUROC. Without normalisation torchmetrics takes scores outside [0, 1] for logits and applies a
sigmoid, which is 1 for every score above about 17. :class:`RawScoreEvaluator` with :class:`AUROC` and
:class:`AUPRO` reports what scikit-learn gives on the raw scores, for any anomalib model, while thresholds, labels,
pictures and exports stay anomalib's: ``Padim(evaluator=RawScoreEvaluator())``, or on the command line
``--model.evaluator anomalib_recon.metrics.RawScoreEvaluator``.
"""

from .evaluator import RawScoreEvaluator
from .score_curve import AUPRO, AUROC

__all__ = ["AUPRO", "AUROC", "RawScoreEvaluator"]
