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
        ValueError: If the config has none of the named models and data sets, or ``--output`` holds runs with other
            settings.
    """
    options, further = build_parser().parse_known_args(args)
    runs = read_runs(options.config, options.output, further)
    if not options.only_report:
        chosen = [
            run
            for run in runs
            if run.model in (options.models or [run.model]) and run.data in (options.datasets or [run.data])
        ]
        if not chosen:
            names = sorted({run.model for run in runs} | {run.data for run in runs})
            msg = f"--models and --datasets leave nothing of {options.config}: choose among {', '.join(names)}."
            raise ValueError(msg)
        for run in chosen:
            run.check()
        for run in chosen:
            run.run()
    print(f"\n{write_report(runs, options.title, options.output)}")


if __name__ == "__main__":
    main(sys.argv[1:])
