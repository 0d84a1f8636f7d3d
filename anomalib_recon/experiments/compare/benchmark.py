# SPDX-License-Identifier: Apache-2.0

"""``anomalib benchmark`` for models that differ in their arguments or metrics.

``python -m anomalib_recon.experiments.compare.benchmark --config configs/compare/benchmark.yaml`` takes the configs of
``anomalib benchmark`` and writes the same files. anomalib 2.7 fills a table with the columns of its first job, and
fails after all trainings when a later job has other arguments or metrics, as ours have beside the built-in models.
"""

from typing import Any

import pandas as pd
from anomalib.pipelines import Benchmark
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator
from anomalib.pipelines.benchmark.job import BenchmarkJob
from anomalib.pipelines.components.base import Runner


class MixedBenchmark(Benchmark):
    """anomalib's benchmark, whose table has the columns of all jobs."""

    @staticmethod
    def _setup_runners(args: dict) -> list[Runner]:
        runners = Benchmark._setup_runners(args)
        for runner in runners:
            assert isinstance(runner.generator, BenchmarkJobGenerator)
            runner.generator = _MixedGenerator(runner.generator.accelerator)
        return runners


class _MixedJob(BenchmarkJob):
    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        return pd.DataFrame(results)


class _MixedGenerator(BenchmarkJobGenerator):
    @property
    def job_class(self) -> type:
        return _MixedJob


if __name__ == "__main__":
    MixedBenchmark().run()
