# SPDX-License-Identifier: Apache-2.0

"""Result pictures that show what a model reconstructed, and where it looked."""

from .attention import draw_attention
from .visualizer import ReconstructionVisualizer

__all__ = ["ReconstructionVisualizer", "draw_attention"]
