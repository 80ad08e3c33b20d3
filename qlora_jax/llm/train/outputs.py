"""Writes the outputs of a run: metrics, loss plots, an adapter and its model card."""

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

import qlora_jax as ql
from qlora_jax.io.files import new_path
from qlora_jax.trees.paths import leaves_by_path

from ..printable import printable
from ..reading import reading
from .loop import Callback, Training

NATIVE_ADAPTER = "adapter.safetensors"  # written by `qlora_jax.io.save`


class Metrics(Callback):
    """Writes `metrics.jsonl`, one line per step. Lines are never written in part.

    It is a callback of `fit`.
    """

    def __init__(self, path: str | pathlib.Path, *, after: int | None = None):
        """Opens the file, and deletes the lines of steps after `after`, or all."""
        self.path = pathlib.Path(path)
        rows = []
        if after is not None and self.path.is_file():
            rows = [row for row in read_metrics(self.path) if row["step"] <= after]
        with new_path(self.path) as new_file:
            new_file.write_text("".join(map(_to_line, rows)), "utf-8")
        # Unbuffered, so that a killed run loses no line and `write` sees all errors.
        self._file = self.path.open("ab", buffering=0)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def on_start(self, training: Training) -> None:  # noqa: D102
        if training.evaluation:  # of the initial adapter
            self.write(**training.row)

    def on_step(self, training: Training) -> None:  # noqa: D102
        self.write(**training.row)

    def write(self, **row: Any) -> None:
        """Writes a line."""
        data, old_size = _to_line(row).encode(), self._file.tell()
        try:
            # If the disk becomes full, `write` stores a part of the line, and raises no
            # error. The next call, with the rest of the line, raises it.
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._file.truncate(old_size)
            raise OSError(f"{self.path} cannot be written: {error}.") from error


def _to_line(row: dict[str, Any]) -> str:
    # JSON has no NaN or infinity, so these become null.
    def replace_nonfinite(value: Any) -> Any:
        return None if isinstance(value, float) and not np.isfinite(value) else value

    row = {name: replace_nonfinite(value) for name, value in row.items()}
    return json.dumps(row, allow_nan=False) + "\n"


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
    r"""Returns the rows of a `metrics.jsonl`, a dict for each step.

    Args:
        path: The file. An incomplete last line is ignored.

    Raises:
        ValueError: If the file does not have the metrics of a step in each line.

    Example:
        >>> import pathlib, tempfile
        >>> from qlora_jax.llm import train
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "loss": 2.5}\n{"ste')
        >>> train.read_metrics(path)
        [{'step': 1, 'loss': 2.5}]
    """
    with reading(path):
        # The text after the last line break is empty, or an incomplete line.
        lines = pathlib.Path(path).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]
        for row in rows:
            if type(row["step"]) is not int or not all(
                isinstance(x, int | float | None) for x in row.values()
            ):
                raise ValueError(f"It must have a step and numbers. Got {row!r:.80}.")
        return rows


def plot_loss(
    rows: list[dict[str, Any]], path: str | pathlib.Path, title: str = ""
) -> None:
    """Plots the loss of each step, its running mean, and the validation losses."""
    # Importing matplotlib takes long, and only plots need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # `matplotlib.pyplot` would keep global state and may want a display.
    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    (steps, losses), valid, sampled = (
        _points(rows, key) for key in ("loss", "valid_loss", "valid_sample_loss")
    )
    if steps:
        axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="each step")
    if (window := len(steps) // 20) > 1:
        means = np.convolve(losses, np.ones(window) / window, "valid")
        label = f"mean of {window} steps"
        axes.plot(steps[window - 1 :], means, color="#1f4e8c", linewidth=2, label=label)
    if valid[0]:
        # If a run evaluates a sample of the validation rows at intervals, it evaluates
        # all of them only at its start and end. A line between these two points would
        # mislead.
        marker, scope = ("D", ", all rows") if sampled[0] else ("o-", "")
        label = f"validation{scope}"
        axes.plot(*valid, marker, color="#c8553d", markersize=5, label=label)
    if sampled[0]:
        label = "validation, some rows"
        axes.plot(*sampled, "o-", color="#e39a6f", markersize=4, label=label)
    # Only preference runs have this metric. Their losses are not per token.
    unit = "" if any("rewards/margins" in row for row in rows) else ", nats per token"
    axes.set(xlabel="step", ylabel=f"loss{unit}", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter("{x:g}")
    # If losses differ by more than about a factor of 20, minor labels would overlap.
    axes.yaxis.set_minor_formatter("{x:g}" if high < 20 * low else "")
    axes.grid(True, which="both", alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    with new_path(path) as new_file:
        canvas.print_figure(new_file, dpi=120, format="png")


def _points(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    rows = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in rows], [row[key] for row in rows]


def memory_of(
    base: PyTree, lora: PyTree, opt_state: PyTree, teacher: PyTree | None = None
) -> dict[str, int]:
    """Returns the bytes of each tree, and the peak memory of the device or process."""
    trees = {"base": base, "adapter": lora, "optimizer": opt_state}
    if teacher is not None:
        trees["teacher"] = teacher
    sizes = {
        name: sum(int(x.nbytes) for x in jax.tree.leaves(tree))
        for name, tree in trees.items()
    }
    stats = jax.local_devices()[0].memory_stats() or {}  # CPUs have none
    if "peak_bytes_in_use" in stats:
        return sizes | {"device peak": int(stats["peak_bytes_in_use"])}
    try:
        import resource
    except ImportError:  # on Windows
        return sizes
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, else kilobytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return sizes | {"process peak": peak}


def save_adapter(
    folder: str | pathlib.Path,
    base: PyTree,
    lora: PyTree,
    names: ql.io.Names,
    *,
    base_model: str,
    revision: str | None = None,
    card: str,
) -> None:
    """Writes an adapter with its model card, and replaces an older one.

    It is written in PEFT's format, unless it is merge-aware. PEFT would add such an
    adapter to a base without packing the sum, so it is written as `qlora_jax.io.save`
    does, to `adapter.safetensors`.
    """
    adapters = leaves_by_path(lora).values()
    # The folder appears with all of its files, or not at all.
    with new_path(folder) as new_folder:
        if any(isinstance(adapter, ql.MergeAware) for adapter in adapters):
            new_folder.mkdir()
            ql.io.save(new_folder / NATIVE_ADAPTER, lora)
        else:
            config = ql.io.peft_config(
                base, lora, names, base_model=base_model, revision=revision
            )
            ql.io.save_peft(new_folder, base, lora, names, config)
        (new_folder / "README.md").write_text(card, "utf-8")


def model_card(
    base_model: str,
    *,
    title: str,
    settings: Mapping[str, Any],
    data: Mapping[str, Any],
    results: Mapping[str, Any],
    is_merge_aware: bool = False,
) -> str:
    """Returns the README.md of an adapter, with the header that the hub reads."""
    library, kind = "peft", "LoRA"
    usage = "It loads with PEFT: `PeftModel.from_pretrained(model, folder)`."
    if is_merge_aware:
        library, kind = "qlora-jax", "merge-aware"
        usage = (
            "It was trained as a part of packed weights, so it cannot be used beside a "
            "base. `qlora-jax export` writes the packed weights."
        )
    lines = [
        "---",
        f"base_model: {json.dumps(base_model)}",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [lora, qlora, qlora-jax]",
        "---",
        "",
        f"# {printable(title)}",
        "",
        f"A {kind} adapter of `{printable(base_model)}`, trained with qlora_jax "
        f"{ql.__version__}.",
        usage,
    ]
    for heading, rows in (("Results", results), ("Data", data), ("Settings", settings)):
        lines += ["", f"## {heading}", "", "| | |", "|---|---|"]
        for key, value in rows.items():
            if value is not None:
                cell = f"{value:.6g}" if isinstance(value, float) else str(value)
                cell = printable(cell.replace("|", "\\|").replace("\n", " "))
                lines.append(f"| {printable(key)} | {cell} |")
    return "\n".join(lines) + "\n"


def plural(number: int, noun: str, nouns: str | None = None) -> str:
    """Returns a number and its noun, such as "1 step" and "1,200 steps"."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
