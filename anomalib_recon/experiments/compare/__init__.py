# SPDX-License-Identifier: Apache-2.0

"""Models side by side on the same data: ``python -m anomalib_recon.experiments.compare --help``."""
