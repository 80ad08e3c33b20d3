"""Metrics, loss plot and memory report."""

import contextlib
import itertools
import json
import pathlib
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

import qlora_jax as ql


class Metrics:
    """Writes `metrics.jsonl`, one line a step, never part of a line.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax import train
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> with train.Metrics(path) as metrics:
        ...     metrics.write(step=1, loss=2.5)
        >>> train.read_metrics(path)
        [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: str | pathlib.Path, *, after: int | None = None):
        """Opens the file.

        Args:
            path: The file. Only its lines up to step `after` are kept.
            after: The step that a run continues from; None for a new run.
        """
        self.path = pathlib.Path(path)
        rows = []
        if after is not None and self.path.is_file():
            rows = [row for row in read_metrics(self.path) if row["step"] <= after]
        with ql.io.new_path(self.path) as new:
            new.write_text("".join(map(_line, rows)), "utf-8")
        self._file = self.path.open("ab", buffering=0)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *unused: Any) -> None:
        self._file.close()

    def write(self, **row: Any) -> None:
        """Writes a line.

        Args:
            **row: The numbers; `step` is one of them.

        Raises:
            OSError: If it cannot be written. The file keeps the lines before.
        """
        data, size = _line(row).encode(), self._file.tell()
        try:
            written = self._file.write(data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes were written")
        except OSError as error:
            self._file.truncate(size)
            raise OSError(f"{self.path} cannot be written: {error}.") from error


def _line(row: dict[str, Any]) -> str:
    # JSON has no NaN: a number that is not finite is null.
    is_bad = lambda x: isinstance(x, float) and not np.isfinite(x)
    row = {key: None if is_bad(x) else x for key, x in row.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    r"""Returns the rows of a `metrics.jsonl`, a dict for each step.

    Args:
        path: The file. An incomplete last line is left out.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax import train
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "loss": 2.5}\n{"ste')
        >>> train.read_metrics(path)
        [{'step': 1, 'loss': 2.5}]
    """
    lines = pathlib.Path(path).read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_loss(
    rows: list[dict[str, Any]], path: str | pathlib.Path, title: str = ""
) -> None:
    """Draws the loss of each step, its running mean, and the validation losses.

    Args:
        rows: From `read_metrics`.
        path: The PNG file to write.
        title: The title.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax import train
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "loss.png"
        >>> train.plot_loss([{"step": 1, "loss": 2.5, "valid_loss": 2.0}], path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    with _axes(path, title, rows) as axes:
        losses, valid, sampled = (
            _points(rows, key) for key in ("loss", "valid_loss", "valid_sample_loss")
        )
        if losses[0]:
            axes.plot(*losses, color="#9db7d5", linewidth=1, label="each step")
        means, window = _running_mean(rows)
        if window > 1:
            label = f"mean of {window} steps"
            axes.plot(*means, color="#1f4e8c", linewidth=2, label=label)
        if valid[0]:
            # A line from the first evaluation to the last would look like values.
            marks, of = ("D", ", all rows") if sampled[0] else ("o-", "")
            label = f"validation{of}"
            axes.plot(*valid, marks, color="#c8553d", markersize=5, label=label)
        if sampled[0]:
            label = "validation, some rows"
            axes.plot(*sampled, "o-", color="#e39a6f", markersize=4, label=label)


def plot_losses(
    rows: Mapping[str, list[dict[str, Any]]], path: str | pathlib.Path, title: str = ""
) -> None:
    """Draws the losses of several runs: running means, and validation losses as points.

    Args:
        rows: Those of each run, from `read_metrics`, by its name.
        path: The PNG file to write.
        title: The title.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax import train
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "loss.png"
        >>> rows = {"seed=0": [{"step": 1, "loss": 2.5}], "seed=1": []}
        >>> train.plot_losses(rows, path)
        >>> path.read_bytes()[1:4]
        b'PNG'
    """
    with _axes(path, title, itertools.chain(*rows.values())) as axes:
        for number, (name, found) in enumerate(rows.items()):
            (means, _), color = _running_mean(found), f"C{number}"
            axes.plot(*means, color=color, label=name)
            axes.plot(*_points(found, "valid_loss"), "D", color=color, markersize=5)
            sampled = _points(found, "valid_sample_loss")
            axes.plot(*sampled, "o", color=color, markersize=3)


@contextlib.contextmanager
def _axes(path: str | pathlib.Path, title: str, rows: Iterable[Any]) -> Iterator[Any]:
    """Gives the axes of a picture of losses, and writes it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    yield axes
    unit = "" if any("rewards/margins" in row for row in rows) else ", nats a token"
    axes.set(xlabel="step", ylabel=f"loss{unit}", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")
    axes.grid(True, which="both", alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    with ql.io.new_path(path) as new:
        canvas.print_figure(new, dpi=120, format="png")


def _running_mean(rows: list[dict[str, Any]]) -> tuple[tuple[Any, Any], int]:
    """Returns steps with the running mean of the losses, and its window."""
    steps, losses = _points(rows, "loss")
    window = max(1, len(steps) // 20)
    means = np.convolve(losses, np.ones(window) / window, "valid") if steps else []
    return (steps[window - 1 :], means), window


def _points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in found], [row[key] for row in found]


def memory_of(base: Any, lora: Any, opt_state: Any) -> dict[str, int]:
    """Returns bytes of base, adapter and optimizer, and the peak of device or process.

    Args:
        base: The base tree.
        lora: The lora tree.
        opt_state: The optimizer's state.

    Example:
        >>> import jax.numpy as jnp
        >>> from qlora_jax import train
        >>> train.memory_of({}, {"w": jnp.ones(4)}, {})["adapter"]
        16
    """
    nbytes = lambda tree: sum(int(x.nbytes) for x in jax.tree.leaves(tree))
    found = {"base": base, "adapter": lora, "optimizer": opt_state}
    return {name: nbytes(tree) for name, tree in found.items()} | _peak()


def _peak() -> dict[str, int]:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"device peak": int(stats["peak_bytes_in_use"])}
    # ru_maxrss counts kilobytes, on macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"process peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
