# SPDX-License-Identifier: Apache-2.0

"""Plain torch that several models share: backbones, their dense features, resize and checks of arguments."""

from .arguments import (
    check_choice,
    check_dropout,
    check_finite,
    check_fraction,
    check_image_size,
    check_named_once,
    check_not_negative,
    check_positive,
    check_share,
    check_whole,
)
from .attention import attend, multihead_attention
from .backbone import BackboneNormalize, FrozenBackbone, create_backbone, stage_strides
from .covariance import FeatureCovariance
from .dense_features import create_dense_features, divide_feature_map, vision_transformer_blocks
from .feature_scale import FeatureScale, ScaleBy
from .residual_distance import ResidualDistance
from .resize import AntialiasResize
from .tiling import Tiling, tiler_arguments
from .top_mean import TopMean, top_mean
from .whitening import PrincipalWhitening, Whitening

__all__ = [
    "AntialiasResize",
    "BackboneNormalize",
    "FeatureCovariance",
    "FeatureScale",
    "FrozenBackbone",
    "PrincipalWhitening",
    "ResidualDistance",
    "ScaleBy",
    "Tiling",
    "TopMean",
    "Whitening",
    "attend",
    "check_choice",
    "check_dropout",
    "check_finite",
    "check_fraction",
    "check_image_size",
    "check_named_once",
    "check_not_negative",
    "check_positive",
    "check_share",
    "check_whole",
    "create_backbone",
    "create_dense_features",
    "divide_feature_map",
    "multihead_attention",
    "stage_strides",
    "tiler_arguments",
    "top_mean",
    "vision_transformer_blocks",
]
