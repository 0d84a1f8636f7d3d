# SPDX-License-Identifier: Apache-2.0

"""Result pictures that show what a model reconstructed."""

from .visualizer import ReconstructionVisualizer

__all__ = ["ReconstructionVisualizer"]
