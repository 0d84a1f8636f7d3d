# SPDX-License-Identifier: Apache-2.0

"""What happens around a fit: its images, cached features, held-out images, its end, and checkpoints."""

from .checkpoints import RandomState, checkpoint_files, load_checkpoint
from .end_of_fit import EndOfFit
from .feature_cache import FeatureBatch, FeatureCache
from .guards import FiniteLoss, ReadableImages
from .held_out import HeldOutImages
from .images import (
    check_training_files,
    evaluation,
    lacks_validation_images,
    map_images,
    normal_images,
    own_share,
    score_images,
)
from .products import check_products, find_products
from .progress import ProgressLines
from .schedule import check_end, one_cycle, one_cycle_factor, share_of_fit

__all__ = [
    "EndOfFit",
    "FeatureBatch",
    "FeatureCache",
    "FiniteLoss",
    "HeldOutImages",
    "ProgressLines",
    "RandomState",
    "ReadableImages",
    "check_end",
    "check_products",
    "check_training_files",
    "checkpoint_files",
    "evaluation",
    "find_products",
    "lacks_validation_images",
    "load_checkpoint",
    "map_images",
    "normal_images",
    "one_cycle",
    "one_cycle_factor",
    "own_share",
    "score_images",
    "share_of_fit",
]
