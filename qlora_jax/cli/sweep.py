"""Several learning rates or seeds of one run, trained side by side over one base."""

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import qlora_jax as ql

from .processes import agree, is_first, tell
from .run import Run
from .run_folder import FAILED, METRICS, RESULT, write_text
from .run_results import TrainResult
from .train_config import SWEPT, TrainConfig


@dataclass(frozen=True)
class SweepResult:
    """The result of several runs that were trained side by side.

    Attributes:
        out: The folder of the runs.
        runs: The result of each, by the name of its folder in `out`; None if it failed.
        best: The name of the run of the lowest validation loss; without validation
            rows, None.
        adapter: The folder of its adapter, as PEFT has it.

    Example:
        >>> from qlora_jax import cli
        >>> result = cli.TrainResult(
        ...     "runs/seed=0", "runs/seed=0/adapter", steps=9, skipped=0, loss=0.02,
        ...     valid_loss=0.03, exact_before=None, exact_after=None, step_seconds=2.5,
        ...     tokens_per_s=600, bytes={})
        >>> runs = {"seed=0": result, "seed=1": None}
        >>> print(cli.SweepResult("runs", runs, "seed=0", "runs/adapter"))
        seed=0  loss 0.0200  validation 0.0300
        seed=1  failed
        the adapter of seed=0, of the lowest validation loss, is in runs/adapter
    """

    out: str
    runs: Mapping[str, TrainResult | None]
    best: str | None
    adapter: str | None

    def __str__(self):
        width = max(map(len, self.runs))
        lines = [f"{name:{width}}  {_told(run)}" for name, run in self.runs.items()]
        if self.best is not None:
            lines.append(
                f"the adapter of {self.best}, of the lowest validation loss, is in "
                f"{self.adapter}"
            )
        return "\n".join(lines)


def _told(run: TrainResult | None) -> str:
    if run is None:
        return "failed"
    numbers = {"loss": run.loss, "validation": run.valid_loss}
    told = [f"{name} {x:.4f}" for name, x in numbers.items() if x is not None]
    if run.exact_after is not None:
        told.append(f"exact {run.exact_after:.1%}")
    return "  ".join(told)


def members_of(config: TrainConfig) -> list[TrainConfig]:
    """Returns the settings of each run.

    A run that failed is left out when the others are resumed.
    """
    if not config.is_sweep:
        return [config]
    swept = {name: getattr(config, name) for name in SWEPT}
    several = {name: x for name, x in swept.items() if isinstance(x, list)}
    data_seed = config.data_seed
    if data_seed is None:  # all have one order of the data
        data_seed = config.seed[0] if isinstance(config.seed, list) else config.seed
    found = []
    for values in itertools.product(*several.values()):
        chosen = dict(zip(several, values, strict=True))
        name = "_".join(f"{key}={value}" for key, value in chosen.items())
        out = pathlib.Path(config.out) / name
        chosen |= {"out": str(out), "data_seed": data_seed}
        if not (config.resume and (out / FAILED).is_file()):
            found.append(dataclasses.replace(config, **chosen))
    return found


def note_failure(run: Run, error: FloatingPointError) -> None:
    """Prints that a run failed, and writes why in its folder."""
    tell(f"{run.folder.name} ends: {error}")
    if is_first():
        write_text(run.folder / FAILED, f"{error}\n")


def finish_sweep(
    config: TrainConfig, runs: Sequence[Run], results: Sequence[TrainResult | None]
) -> SweepResult:
    """Copies the best adapter, draws the losses and writes the results."""
    folder = pathlib.Path(config.out)
    names = [run.folder.name for run in runs]
    found = dict(zip(names, results, strict=True))
    for path in sorted(folder.glob(f"*/{FAILED}")):
        found.setdefault(path.parent.name, None)
    losses = {k: x.valid_loss for k, x in found.items() if x is not None}
    known = {k: loss for k, loss in losses.items() if loss is not None}
    best = min(known, key=known.__getitem__, default=None)
    adapter = None if best is None else str(folder / "adapter")
    result = SweepResult(config.out, found, best, adapter)
    if is_first():
        if best is not None and adapter is not None:
            shutil.rmtree(adapter, ignore_errors=True)
            shutil.copytree(folder / best / "adapter", adapter)
        rows = {name: ql.train.read_metrics(folder / name / METRICS) for name in found}
        title = f"{pathlib.Path(config.model).name}, {runs[0].config.fmt}"
        ql.train.plot_losses(rows, folder / "loss.png", title)
        text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
        write_text(folder / RESULT, text + "\n")
    agree()
    return result
