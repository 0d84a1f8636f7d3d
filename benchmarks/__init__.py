# SPDX-License-Identifier: Apache-2.0

"""Scripts that measure, to be run from the root of the project: ``python -m benchmarks.scale --help``."""
