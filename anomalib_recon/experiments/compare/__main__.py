# SPDX-License-Identifier: Apache-2.0

"""Train models on the same data, measure accuracy, speed and size, and write a report.

The config names models, anomalib's own among them, and data sets; see configs/compare. An interrupted call continues:
what is finished is not done again. Several calls may work on different --models or --datasets at a time. Further
arguments are those of `anomalib train` and hold for every training, such as --trainer.accelerator cpu.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .report import write_report
from .runs import read_runs


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    assert __doc__
    parser = argparse.ArgumentParser(
        "python -m anomalib_recon.experiments.compare", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="the comparison")
    parser.add_argument("--output", type=Path, default=Path("results/compare"), help="folder of all results")
    parser.add_argument("--models", nargs="+", help="train these only")
    parser.add_argument("--datasets", nargs="+", help="train on these only")
    parser.add_argument("--title", default="Comparison of anomaly detection models", help="heading of the report")
    parser.add_argument("--only_report", action="store_true", help="train nothing, report what is finished")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Raises:
        ValueError: If the config lacks a named model or data set, or ``--output`` holds runs with other settings.
    """
    options, further = build_parser().parse_known_args(args)
    runs = read_runs(options.config, options.output, further)
    if not options.only_report:
        models = _chosen("--models", options.models, [run.model for run in runs])
        datasets = _chosen("--datasets", options.datasets, [run.data for run in runs])
        for run in runs:  # those that are not chosen, too, as the report has them
            run.check()
        chosen = [run for run in runs if run.model in models and run.data in datasets]
        for run in chosen:
            run.read()
        for run in chosen:
            run.run()
    print(f"\n{write_report(runs, options.title, options.output)}")


def _chosen(argument: str, names: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    for name in names or ():
        if name not in known:
            msg = f"{argument} {name!r} is not in the config: choose from {', '.join(map(repr, dict.fromkeys(known)))}."
            raise ValueError(msg)
    return names or known


if __name__ == "__main__":
    main(sys.argv[1:])
