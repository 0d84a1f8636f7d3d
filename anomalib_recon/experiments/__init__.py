# SPDX-License-Identifier: Apache-2.0

"""Commands that train many runs: comparisons of models, the papers' tables, the rule for InTra's image size."""
