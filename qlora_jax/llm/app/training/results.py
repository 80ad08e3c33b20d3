"""Writes the results of a run: the adapter, its model card, plots and numbers."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import PyTree

from ...data.sources import find_weights
from ...train.arrays import gather
from ...train.outputs import (
    memory_of,
    model_card,
    plot_loss,
    plural,
    read_metrics,
    save_adapter,
)
from ...train.step import State
from ..processes import broadcast_text, is_first
from ..run_folder import METRICS, RESULT, write_text
from .run import Run


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        out: The run's folder.
        adapter: The folder of the adapter, in PEFT's format unless it is merge-aware.
        steps: The number of steps.
        skipped: The number of steps whose update was skipped.
        loss: The mean loss of the last 20 steps, in nats per token; for preferences,
            per pair or per labelled answer.
        valid_loss: The loss of the adapter on the validation rows, if there are any.
        exact_before: The share of exact answers before the first step, if the
            validation rows have answers and the run was evaluated at its start.
        exact_after: The share of exact answers with the adapter.
        step_seconds: The median time of the steps that did not compile a program.
        tokens_per_s: Tokens per second in these steps.
        bytes: Bytes of memory by name: of the base, the adapter, the optimizer's state
            and the teacher, if there is one, and the peak of the device or the process.
        best_step: With `keep_best`, the step whose adapter is written.
        source: Where the weights of the model were found.
    """

    out: str
    adapter: str
    steps: int
    skipped: int
    loss: float | None
    valid_loss: float | None
    exact_before: float | None
    exact_after: float | None
    step_seconds: float
    tokens_per_s: float
    bytes: Mapping[str, int]
    best_step: int | None = None
    source: str | None = None

    def __str__(self):
        loss = "none" if self.loss is None else f"{self.loss:.4f}"
        if self.valid_loss is not None:
            loss += f", validation {self.valid_loss:.4f}"
        lines = [
            f"{self.out}: loss {loss} after {plural(self.steps, 'step')}, "
            f"{self.step_seconds:.2f} s a step, {self.tokens_per_s:,.0f} tokens/s"
        ]
        if self.exact_after is not None:
            before = self.exact_before
            before = "" if before is None else f"{before:.1%} before, "
            lines.append(f"exact match {before}{self.exact_after:.1%} after")
        if self.skipped:
            lines.append(f"skipped updates: {self.skipped:,}")
        lines += [f"{name:14} {n / 1e6:8.1f} MB" for name, n in self.bytes.items()]
        step = "" if self.best_step is None else f" of step {self.best_step:,}"
        return "\n".join([*lines, f"the adapter{step} is in {self.adapter}"])


def write_results(
    run: Run,
    base: PyTree,
    teacher: PyTree | None,
    state: State,
    best_metrics: Mapping[str, float],
) -> TrainResult:
    """Writes the results in process 0, and returns them in all processes.

    `state` has the adapter to write. By default it is that of the last step, whose
    metrics are reported, and `best_metrics` is empty. With `keep_best`, it is that of
    the best step. `best_metrics` then has the number of this step as `best_step`, and
    the validation metrics to report, unless the best step is the last one.
    """
    lora = gather(state.lora)  # on a mesh, all processes must call this
    if is_first():
        state = state._replace(lora=lora)
        sizes = memory_of(base, state.lora, state.opt_state, teacher)
        config = run.config
        rows = read_metrics(run.folder / METRICS)
        result = _make_result(config.out, rows, sizes, state, best_metrics)
        result = dataclasses.replace(result, source=run.model.source)
        save_adapter(
            run.folder / "adapter",
            base,
            state.lora,
            run.model.names,
            base_model=config.model,
            revision=run.model.revision,
            card=_make_card(run, result),
        )
        title = f"{pathlib.Path(config.model).name}, {config.fmt}"
        plot_loss(rows, run.folder / "loss.png", title)
        text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
        write_text(run.folder / RESULT, text + "\n")
    broadcast_text()  # a barrier: the file is complete
    return TrainResult(**json.loads((run.folder / RESULT).read_text("utf-8")))


def _make_card(run: Run, result: TrainResult) -> str:
    config, data = run.config, run.data
    name = pathlib.Path(config.model).name
    datasets = [pathlib.Path(path).name for path in find_weights(config.data)]
    settings = config.to_settings()
    teacher = {} if run.teacher is None else {"teacher": run.teacher.source}
    best_step = {} if result.best_step is None else {"best step": result.best_step}
    return model_card(
        config.model,
        title=f"{name}, fine-tuned on {' and '.join(datasets)}",
        # The fingerprint leaves out paths and settings that do not affect the adapter.
        settings={k: x for k, x in settings.items() if k in run.fingerprint},
        data={
            "base model": result.source,
            **teacher,
            "data": config.data,
            "hash of the tokens": run.fingerprint["data"],  # identifies the data set
            "kind of rows": data.kind,
            "rows": len(data.train),
            "validation rows": len(data.valid),
            "share of tokens that is trained": data.trained_share,
        },
        results={
            "steps": result.steps,
            **best_step,
            "loss (mean of the last 20 steps)": result.loss,
            "validation loss": result.valid_loss,
            "exact match before": result.exact_before,
            "exact match after": result.exact_after,
        },
        is_merge_aware=bool(config.merge_aware),
    )


def _make_result(
    out: str,
    rows: list[dict[str, Any]],
    sizes: Mapping[str, int],
    state: State,
    best_metrics: Mapping[str, float],
) -> TrainResult:
    step_rows = [row for row in rows if row["step"]]  # step 0 is only an evaluation
    losses = [row["loss"] for row in step_rows[-20:] if row["loss"] is not None]
    # Time the steps that compiled no program or, if there are none, all steps. Only
    # rows of steps that compiled one have the key `is_compiled`.
    timed = [row for row in step_rows if "is_compiled" not in row] or step_rows
    seconds = [row["seconds"] for row in timed]
    initial = rows[0] if rows and not rows[0]["step"] else {}
    # The metrics of the best adapter replace those of the last step.
    last = {**(rows[-1] if rows else {}), **best_metrics}
    return TrainResult(
        out=out,
        adapter=str(pathlib.Path(out) / "adapter"),
        steps=int(state.step),
        skipped=int(state.skipped),
        loss=float(np.mean(losses)) if losses else None,
        valid_loss=last.get("valid_loss"),
        exact_before=initial.get("exact_match"),
        exact_after=last.get("exact_match"),
        step_seconds=float(np.median(seconds)),
        tokens_per_s=sum(row["tokens"] for row in timed) / sum(seconds),
        bytes=sizes,
        best_step=last.get("best_step"),
    )
