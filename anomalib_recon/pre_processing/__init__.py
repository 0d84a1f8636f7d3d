# SPDX-License-Identifier: Apache-2.0

"""A pre-processor whose exported resize is the one the model was trained with."""

from .pre_processor import ExactResizePreProcessor, flatten_transform

__all__ = ["ExactResizePreProcessor", "flatten_transform"]
