"""Tables and a picture of the results of `quality.py`.

    python benchmarks/quality_report.py [--picture FILE]

Losses are in nats per token of the test rows; for the task `text`, perplexities. Means
over seeds have 95% intervals by Student's t.
"""

import argparse
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from quality import RESULTS, losses_by_rate, read_records
from timing import table as as_table

# Quantiles of Student's t by degrees of freedom, for 95% intervals.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
# The arms whose bases differ.
BASES = {
    "full": "float32",
    "lora": "bfloat16",
    "nf4": "nf4",
    "nf4 double": "nf4 double",
}
BASES |= {"int4": "int4", "fp4": "fp4"}
HEADER = ["arm", "rate", "before", "after", "exact before, %", "exact after, %"]
HEADER += ["merged in float", "packed again"]
UNTRAINED = ["base", "perplexity of its text", "change, %", "of the new text"]


class Results:
    """The records of an arm of a task."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        runs = [row for row in rows if row["rate"] is not None]
        (self.before,) = (row for row in rows if row["rate"] is None)
        losses = sorted(losses_by_rate(runs).items())
        self.curve = {rate: loss for rate, loss in losses if math.isfinite(loss)}
        self.rate = min(self.curve, key=self.curve.__getitem__)
        self.best = [row for row in runs if row["rate"] == self.rate]

    def values(self, name: str) -> np.ndarray:
        """Returns a number for each seed at the best rate; empty if there is none."""
        entries = [row.get(name) for row in self.best]
        return np.array([x for x in entries if x is not None], np.float64)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Returns the mean and half of its 95% interval, or nan for a single value."""
    count = len(values)
    if count < 2:
        return float(values.mean()), math.nan
    error = values.std(ddof=1) / math.sqrt(count)
    return float(values.mean()), STUDENT[count - 1] * float(error)


def shown(values: np.ndarray, digits: int) -> str:
    """Returns the mean with its interval as text."""
    if not values.size:
        return ""
    mean, half = interval(values)
    margin = "" if math.isnan(half) else f" ± {half:.{digits}f}"
    return f"{mean:.{digits}f}{margin}"


def by_arm(records: Sequence[dict[str, Any]], task: str) -> dict[str, Results]:
    """Returns the results of a task's arms that have runs."""
    rows: dict[str, list] = {}
    for record in records:
        if record["task"] == task:
            rows.setdefault(record["arm"], []).append(record)
    return {
        arm: Results(arm_rows) for arm, arm_rows in rows.items() if len(arm_rows) > 1
    }


def table(arms: dict[str, Results], is_text: bool) -> list[list[str]]:
    """Returns the rows of a task's table."""
    scale, digits = (np.exp, 2) if is_text else (np.asarray, 4)
    rows = []
    for arm, results in arms.items():
        losses = (results.values(x) for x in ("test", "merged", "packed again"))
        after, merged, again = (shown(scale(x), digits) for x in losses)
        exact_before = results.before["exact"]
        rows.append(
            [
                arm,
                f"{results.rate:.1e}",
                f"{scale(results.before['test']):.{digits}f}",
                after,
                "" if exact_before is None else f"{100 * exact_before:.1f}",
                shown(100 * results.values("exact"), 1),
                merged,
                again,
            ]
        )
    return rows


def untrained(arms: dict[str, Results]) -> list[list[str]]:
    """Returns the rows of the table of the bases before training, the best first."""
    before = {arm: x.before for arm, x in arms.items() if arm in BASES}
    exact = before["lora"]["old"]
    rows = []
    for arm, row in sorted(before.items(), key=lambda pair: pair[1]["old"]):
        old, new = np.exp(row["old"]), np.exp(row["test"])
        change = 100 * math.expm1(row["old"] - exact)
        rows.append([BASES[arm], f"{old:.3f}", f"{change:+.2f}", f"{new:.3f}"])
    return rows


def draw(tasks: dict[str, dict[str, Results]]) -> Figure:
    """Draws the test losses of each seed, and the losses by learning rate."""
    figure = Figure(figsize=(12, 4 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), 2, squeeze=False, width_ratios=(2, 3))
    for (task, arms), (left, right) in zip(tasks.items(), panels, strict=True):
        for position, (arm, results) in enumerate(arms.items()):
            values = results.values("test")
            mean, half = interval(values)
            (line,) = right.plot(*zip(*results.curve.items(), strict=True), "o-")
            line.set_label(arm)
            color = line.get_color()
            left.plot(
                np.full(values.shape, position), values, "o", color=color, alpha=0.5
            )
            if not math.isnan(half):
                left.errorbar(position, mean, half, fmt="_", color=color, capsize=6)
        left.set_xticks(range(len(arms)), list(arms), rotation=30, ha="right")
        left.set_title(f"{task}: test loss at the best rate", size=12)
        right.set_title(f"{task}: loss on validation rows by learning rate", size=12)
        right.set_xscale("log")
        right.set_xlabel("learning rate")
        right.legend(frameon=False, fontsize=9)
        for axes in (left, right):
            axes.set_ylabel("nats a token")
            axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: list[str] | None = None) -> None:
    """Prints the tables, and draws the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--picture", metavar="FILE")
    args = parser.parse_args(argv)
    records = read_records(args.results)
    names = dict.fromkeys(record["task"] for record in records)
    tasks = {name: by_arm(records, name) for name in names}
    for name, arms in tasks.items():
        print(f"\n{name}")
        print(as_table(HEADER, table(arms, name == "text")))
    if "text" in tasks:
        print("\nbefore training")
        print(as_table(UNTRAINED, untrained(tasks["text"])))
    if args.picture:
        draw(tasks).savefig(args.picture, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
