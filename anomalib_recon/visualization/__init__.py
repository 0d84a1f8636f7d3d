# SPDX-License-Identifier: Apache-2.0

"""Result pictures that show what a model reconstructed, where it looked, and what it was wrong about."""

from .attention import AttentionVisualizer, draw_attention
from .contact_sheet import ContactSheetVisualizer
from .visualizer import ReconstructionVisualizer

__all__ = ["AttentionVisualizer", "ContactSheetVisualizer", "ReconstructionVisualizer", "draw_attention"]
