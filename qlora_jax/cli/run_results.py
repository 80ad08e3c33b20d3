"""Writes the results of a run: adapter, model card, plot, numbers."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import qlora_jax as ql

from .._jax.progress import plural
from ..train.arrays import gather
from ..train.data.rows import find_weights
from .processes import agree, is_first
from .run import Run
from .run_folder import METRICS, RESULT, write_text


@dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    Attributes:
        out: The run's folder.
        adapter: The folder of the adapter, as PEFT has it.
        steps: Steps of the run.
        skipped: Steps whose update was skipped.
        loss: Mean loss of the last 20 steps, in nats a token.
        valid_loss: Loss of the adapter on the validation rows, if there are some.
        exact_before: Share of exact answers before the first step, if the validation
            rows have answers.
        exact_after: The same with the adapter.
        step_seconds: Median time of the steps that did not compile a program.
        tokens_per_s: Tokens per second of these steps.
        bytes: Memory by use, and the peak.
        best_step: With `keep_best`, the step that the adapter is of.
        source: Where the weights of the model were found.

    Example:
        >>> from qlora_jax import cli
        >>> print(cli.TrainResult(
        ...     "run", "run/adapter", steps=200, skipped=0, loss=0.02, valid_loss=0.03,
        ...     exact_before=0.0, exact_after=0.975, step_seconds=2.5, tokens_per_s=600,
        ...     bytes={"adapter": 19500000}))
        run: loss 0.0200, validation 0.0300 after 200 steps, 2.50 s a step, 600 tokens/s
        exact match 0.0% before, 97.5% after
        adapter            19.5 MB
        the adapter is in run/adapter
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
        number = lambda x: "none" if x is None else f"{x:.4f}"
        loss = f"loss {number(self.loss)}"
        if self.valid_loss is not None:
            loss += f", validation {number(self.valid_loss)}"
        lines = [
            f"{self.out}: {loss} after {plural(self.steps, 'step')}, "
            f"{self.step_seconds:.2f} s a step, {self.tokens_per_s:,.0f} tokens/s"
        ]
        if self.exact_after is not None:
            had = self.exact_before
            before = "" if had is None else f"{had:.1%} before, "
            lines.append(f"exact match {before}{self.exact_after:.1%} after")
        if self.skipped:
            lines.append(f"updates that were skipped: {self.skipped:,}")
        lines += [f"{name:14} {n / 1e6:8.1f} MB" for name, n in self.bytes.items()]
        of = "" if self.best_step is None else f" of step {self.best_step:,}"
        return "\n".join([*lines, f"the adapter{of} is in {self.adapter}"])


def finish(
    run: Run, base: Any, state: "ql.train.State", kept: Mapping[str, float]
) -> TrainResult:
    """Writes the results in process 0, and returns them in all.

    `kept` has the numbers of an adapter that is not the last one.
    """
    lora = gather(state.lora)
    if is_first():
        _write(run, base, state._replace(lora=lora), kept)
    agree()
    return TrainResult(**json.loads((run.folder / RESULT).read_text("utf-8")))


def _write(
    run: Run, base: Any, state: "ql.train.State", kept: Mapping[str, float]
) -> None:
    config, folder, data = run.config, run.folder, run.data
    rows = ql.train.read_metrics(folder / METRICS)
    result = _result(config.out, rows, base, state, kept)
    result = dataclasses.replace(result, source=run.model.source)
    name = pathlib.Path(config.model).name
    sets = " and ".join(pathlib.Path(x).name for x in find_weights(config.data))
    settings = dataclasses.asdict(config)
    card = ql.train.model_card(
        config.model,
        title=f"{name}, fine-tuned on {sets}",
        settings={k: x for k, x in settings.items() if k in run.stamp},
        data={
            "base model": result.source,
            "data": config.data,
            "hash of the tokens": run.stamp["data"],
            "kind of rows": data.kind,
            "rows": len(data.train),
            "validation rows": len(data.valid),
            "share of tokens that is trained": data.trained_share,
        },
        results={
            "steps": result.steps,
            **{k.replace("_", " "): x for k, x in kept.items() if k == "best_step"},
            "loss (mean of the last 20 steps)": result.loss,
            "validation loss": result.valid_loss,
            "exact match before": result.exact_before,
            "exact match after": result.exact_after,
        },
    )
    ql.train.save_adapter(
        folder / "adapter",
        base,
        state.lora,
        run.model.names,
        base_model=config.model,
        card=card,
    )
    ql.train.plot_loss(rows, folder / "loss.png", f"{name}, {config.fmt}")
    text = json.dumps(dataclasses.asdict(result), indent=1, allow_nan=False)
    write_text(folder / RESULT, text + "\n")


def _result(
    out: str,
    rows: list[dict[str, Any]],
    base: Any,
    state: "ql.train.State",
    kept: Mapping[str, float],
) -> TrainResult:
    steps = [row for row in rows if row["step"]]
    losses = [row["loss"] for row in steps[-20:] if row["loss"] is not None]
    # Steps that compiled a program are left out, unless all of them did.
    timed = [row for row in steps if "is_compiled" not in row] or steps
    seconds = [row["seconds"] for row in timed]
    last = {**(rows[-1] if rows else {}), **kept}
    return TrainResult(
        out=out,
        adapter=str(pathlib.Path(out) / "adapter"),
        steps=int(state.step),
        skipped=int(state.skipped),
        loss=float(np.mean(losses)) if losses else None,
        valid_loss=last.get("valid_loss"),
        exact_before=rows[0].get("exact_match") if rows else None,
        exact_after=last.get("exact_match"),
        step_seconds=float(np.median(seconds)),
        tokens_per_s=sum(row["tokens"] for row in timed) / sum(seconds),
        bytes=ql.train.memory_of(base, state.lora, state.opt_state),
        best_step=last.get("best_step"),
    )
