# SPDX-License-Identifier: Apache-2.0

"""Parts that several models share."""

from .arguments import check_finite, check_whole
from .backbone import BackboneNormalize, FrozenBackbone, create_backbone, stage_strides
from .checkpoints import BackboneInCheckpoint, load_checkpoint, refuse_other_networks
from .deferred_validation import DeferredValidation, ValidationAtEnd, save_anew
from .export import CurrentOpsetExport
from .feature_cache import CachedBatch, FeatureCache
from .guards import guards
from .image_size import refuse_normalize, resolve_image_size
from .training_images import check_training_files, load_images, normal_training_set

__all__ = [
    "BackboneInCheckpoint",
    "BackboneNormalize",
    "CachedBatch",
    "CurrentOpsetExport",
    "DeferredValidation",
    "FeatureCache",
    "FrozenBackbone",
    "ValidationAtEnd",
    "check_finite",
    "check_training_files",
    "check_whole",
    "create_backbone",
    "guards",
    "load_checkpoint",
    "load_images",
    "normal_training_set",
    "refuse_normalize",
    "refuse_other_networks",
    "resolve_image_size",
    "save_anew",
    "stage_strides",
]
