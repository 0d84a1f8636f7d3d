# SPDX-License-Identifier: Apache-2.0

"""The papers' tables, trained anew: ``python -m anomalib_recon.experiments.reproduce --help``."""
