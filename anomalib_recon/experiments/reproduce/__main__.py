# SPDX-License-Identifier: Apache-2.0

"""Train a table of a paper anew, category by category, and set the results beside the paper's figures.

An interrupted call continues: what is finished is not trained again, and an interrupted training goes on from its last
whole epoch. Several calls may work on different --categories at a time; each rewrites the table from all results.
Further arguments are those of `anomalib train` and hold for every training, such as --trainer.precision bf16-mixed or
--model.backbone_weights FILE. One device is used unless --trainer.devices 2 --trainer.strategy ddp or the like says
otherwise; several multiply the batch size, but for InTra.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .runs import Runs
from .summary import Results, markdown, write_summary
from .table import Row, Table, read_table, table_names


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    assert __doc__
    parser = argparse.ArgumentParser(
        "python -m anomalib_recon.experiments.reproduce", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("table", choices=table_names(), metavar="TABLE", help=", ".join(table_names()))
    parser.add_argument("--root", type=Path, help="folder of the data set, with a folder for each category")
    parser.add_argument("--categories", nargs="+", help="those of the paper that are in --root, unless named")
    parser.add_argument("--methods", nargs="+", help="rows of the table; all of them, unless named")
    parser.add_argument("--output", type=Path, default=Path("results/reproduce"), help="folder of all results")
    parser.add_argument("--seed", type=int, default=0, help="seed of each training (default: 0)")
    parser.add_argument("--only_table", action="store_true", help="train nothing, write the table of what is finished")
    return parser


def chosen_methods(table: Table, names: Sequence[str] | None) -> list[Row]:
    """Rows of a table by their names, all by default.

    Raises:
        ValueError: If the table has no such row.
    """
    for name in names or ():
        if name not in table.rows:
            msg = f"--methods {name!r} is not in table {table.name}: choose from {', '.join(map(repr, table.rows))}."
            raise ValueError(msg)
    return [row for name, row in table.rows.items() if names is None or name in names]


def chosen_cells(
    table: Table, methods: Sequence[Row], names: Sequence[str] | None, root: Path
) -> list[tuple[Row, str]]:
    """What to train: methods on the named categories, or on those of the paper that are there.

    Raises:
        ValueError: If a named category is not there, or none at all.
    """

    def is_there(category: str) -> bool:
        return table.dataset.is_downloaded or (root / category).is_dir()

    absent = [name for name in names or () if not is_there(name)]
    if absent:
        msg = f"--categories {' '.join(absent)}: no such folder in --root {root}; name a folder in MVTec AD's layout."
        raise ValueError(msg)
    cells = [(row, name) for row in methods for name in names or table.categories_of(row) if is_there(name)]
    if not cells:
        msg = f"--root {root} has none of the paper's categories: pass the folder of the data set, or --categories."
        raise ValueError(msg)
    return cells


def finished_results(runs: Runs) -> Results:
    """Results of all cells that are finished, those of earlier and of other calls included."""
    found = {}
    for row in runs.table.rows.values():
        folders = {path.parent.name for path in runs.folder_of(row, "any").parent.glob("*/result.json")}
        paper_first = [name for name in runs.table.dataset.categories if name in folders]
        for category in (*paper_first, *sorted(folders.difference(paper_first))):
            found[row.name, category] = runs.result(row, category) or {}
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Raises:
        ValueError: If there is nothing to train, or ``--output`` holds trainings with other settings.
    """
    options, further = build_parser().parse_known_args(args)
    table = read_table(options.table)
    root = options.root or Path(table.dataset.root)
    runs = Runs(table, root, options.output / table.name, further, options.seed)
    if not options.only_table:
        methods = chosen_methods(table, options.methods)
        cells = chosen_cells(table, methods, options.categories, root)
        others = [(table.rows[name], category) for name, category in finished_results(runs)]
        # refused before hours of training, not after; a mean of all categories is one of equal trainings
        for row, category in [*cells, *((row, category) for row, category in others if row in methods)]:
            runs.check(row, category)
        for row, category in cells:
            runs.run(row, category)
            write_summary(table, finished_results(runs), runs.folder)
    results = finished_results(runs)
    write_summary(table, results, runs.folder)
    print(f"\n{markdown(table, results)}\n{runs.folder / 'table.md'}")


if __name__ == "__main__":
    main(sys.argv[1:])
