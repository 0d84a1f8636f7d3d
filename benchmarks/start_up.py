# SPDX-License-Identifier: Apache-2.0

"""What the package adds to the start of other programs that it is installed beside.

``python -m benchmarks.start_up --turns 7 --output start_up.json``

``import torch`` and ``anomalib --help``, each in a process of its own, with the package's hook and without it
(``ANOMALIB_RECON_AUTOLOAD=0``), in turns. CPU seconds are those of the process with all its threads; they hold on a
machine that others use. Prints the medians and writes all figures as JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from anomalib_recon.files import write_whole

PROGRAMS = {
    "import torch": "import torch",
    "anomalib --help": "import sys; from anomalib.cli.cli import main; sys.argv = ['anomalib', '--help']; main()",
}


def run(program: str, autoload: str) -> dict[str, float]:
    """Wall and CPU seconds of a process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "ANOMALIB_RECON_AUTOLOAD": autoload}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": time.perf_counter() - start, "cpu": cpu}


def measure(program: str, turns: int) -> dict[str, Any]:
    run(program, "1")  # files come from the disk once
    rows = [{autoload: run(program, autoload) for autoload in ("0", "1")} for _ in range(turns)]
    figures: dict[str, Any] = {"runs": rows}
    for key in ("wall", "cpu"):
        without, with_hook = (statistics.median(row[autoload][key] for row in rows) for autoload in ("0", "1"))
        figures[key] = {"seconds_without": without, "seconds_with": with_hook, "added": with_hook / without - 1}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    for name in args.programs:
        figures[name] = measure(PROGRAMS[name], args.turns)
        for key in ("wall", "cpu"):
            median = figures[name][key]
            seconds = f"{median['seconds_without']:.2f} s without, {median['seconds_with']:.2f} s with"
            print(f"{name}, {key}: {seconds}, {median['added']:+.1%}", flush=True)
    if args.output:
        write_whole(args.output, json.dumps(figures, indent=2).encode())


if __name__ == "__main__":
    main()
