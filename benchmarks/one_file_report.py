"""Tables of the results of `one_file.py`, beside those of `quality.py`.

    python benchmarks/one_file_report.py

Losses are in nats per token of the test rows. Means over seeds have 95% intervals by
Student's t. For each format of the file, the first row is an ordinary adapter beside
its base, without a file. The other rows are compared with it: "difference" is the loss
minus the loss of that row, and "relative, %" is the share of exact answers, as a
percentage of the share in that row.
"""

import argparse
import pathlib
from collections.abc import Sequence

from one_file import RESIDUAL, RESULTS, FileArm, make_arms
from quality import RESULTS as QUALITY
from quality import read_records
from quality_report import Results, by_arm, shown
from timing import table as as_table

HEADER = ["file", "base", "bits", "adapter", "rate", "loss"]
HEADER += ["difference", "exact match, %", "relative, %"]
# Bits per weight by format, in blocks of 64 with float32 scales.
BITS = {None: 16.0, "int8": 8.5, "nf4": 4.5, "int4": 4.5, RESIDUAL: 9.0}


def describe(arm: FileArm) -> str:
    """Returns how the adapter of an arm is trained."""
    if not arm.merge_aware:
        return "ordinary, merged and packed once"
    extra = ", after an ordinary one" * arm.starts_trained
    extra += ", small changes dropped" * bool(arm.keep)
    extra += f", rank {arm.rank}" * (arm.rank != 16)
    return f"merge-aware{extra}"


def rows_of_file(
    file_fmt: str, arms: dict[str, Results], beside: Results
) -> list[list[str]]:
    """Returns the rows of a table about files in a format.

    Args:
        file_fmt: The format.
        arms: The results of `one_file.py` for a task, by arm.
        beside: The results of `quality.py` for the task, with an ordinary adapter
            beside a base in this format.
    """
    goal_loss, goal_exact = beside.values("test"), beside.values("exact")

    def make_row(file, fmt, adapter, results, loss, exact):
        row = [file, fmt or "bfloat16", f"{BITS[fmt]:g}", adapter]
        row += [f"{results.rate:.1e}", shown(loss, 3)]
        difference = relative = ""
        if file != "none":
            difference = f"{loss.mean() - goal_loss.mean():+.3f}"
            if exact.size:
                relative = f"{100 * exact.mean() / goal_exact.mean():.0f}"
        return [*row, difference, shown(100 * exact, 1), relative]

    # `quality.py` counts exact answers only for the adapter beside its base, and not
    # for the weights after packing again.
    again, uncounted = beside.values("packed again"), goal_exact[:0]
    ordinary = file_fmt, "ordinary, beside its base", beside
    packed_again = file_fmt, "ordinary, merged and packed again", beside
    rows = [
        make_row("none", *ordinary, goal_loss, goal_exact),
        make_row(file_fmt, *packed_again, again, uncounted),
    ]
    for arm in make_arms():
        if arm.file_fmt == file_fmt and arm.name in arms:
            results = arms[arm.name]
            loss, exact = results.values("test"), results.values("exact")
            row = make_row(file_fmt, arm.fmt, describe(arm), results, loss, exact)
            rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table for each task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args(argv)
    records, ordinary = read_records(args.results), read_records(QUALITY)
    for task in dict.fromkeys(record["task"] for record in records):
        arms, beside = by_arm(records, task), by_arm(ordinary, task)
        rows = [
            row
            for file_fmt in ("nf4", "int4")
            for row in rows_of_file(file_fmt, arms, beside[file_fmt])
        ]
        print(f"\n{task}\n{as_table(HEADER, rows)}")


if __name__ == "__main__":
    main()
