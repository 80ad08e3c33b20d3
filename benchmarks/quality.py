"""The quality of fine-tuning over a 4-bit base, a 16-bit base, and of all weights.

    python benchmarks/quality.py FOLDER [--tasks text,words,sums] [--minutes 600]
    python benchmarks/quality.py FOLDER --table

Each arm of a task is trained at three learning rates, and then at higher or lower rates
until the best rate is neither the highest nor the lowest. The validation rows that
select it differ from the test rows. Two more seeds for adapters and data order are
trained at the best rate. Every run appends its results to `quality.jsonl`, and finished
runs are skipped, so the script can be stopped and restarted at any time.

The model of `text` is trained from scratch once, and saved in FOLDER. `sums` needs
`reasoning-gym`. `--table` prints the tables of the results: losses are in nats per
token of the test rows, for the task `text` perplexities. Means over seeds have 95%
intervals by Student's t.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import argparse
import datetime
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_models import TASKS, TESTS, Task, make_task
from timing import table as as_table
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.app.open_model import open_model
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.jax_engine import LAYERS
from qlora_jax.llm.train.answers import exact_match, generate_answers
from qlora_jax.llm.train.means import make_mean_loss

sys.path.append(str(pathlib.Path(__file__).parents[1] / "examples"))

RESULTS = pathlib.Path(__file__).with_name("quality.jsonl")
SEEDS = (0, 1, 2)
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


@dataclass(frozen=True)
class Arm:
    """The trained parameters and the base of a run.

    Attributes:
        name: Its name.
        fmt: The number format of the base; None for bfloat16.
        double_quant: Whether its scales are quantized too.
        rank: Of the adapters; None to train all weights.
        targets: Where adapters are.
        tasks: The tasks that it is for.
        seeds: How many seeds are trained at the best rate.
    """

    name: str
    fmt: str | None = None
    double_quant: bool | None = None
    rank: int | None = 16
    targets: str = LAYERS
    tasks: Sequence[str] = tuple(TASKS)
    seeds: int = len(SEEDS)


TEXT = ("text",)
ARMS = [
    Arm("full", rank=None),
    Arm("lora"),
    Arm("nf4", "nf4", False),
    Arm("nf4 double", "nf4", True),
    Arm("int4", "int4", False),
    Arm("fp4", "fp4", False, tasks=TEXT),
    Arm("rank 1", "nf4", True, rank=1, tasks=TEXT, seeds=1),
    Arm("rank 4", "nf4", True, rank=4, tasks=TEXT, seeds=1),
    Arm("rank 64", "nf4", True, rank=64, tasks=TEXT, seeds=1),
    Arm("attention", "nf4", True, targets=r"layers/self_attn/.*", tasks=TEXT, seeds=1),
]


class Bench:
    """A task and an arm, ready to train."""

    def __init__(self, folder: pathlib.Path, task: Task, arm: Arm):
        local_model = folder / task.model
        model = open_model(str(local_model) if local_model.exists() else task.model)
        self.task, self.arm = task, arm
        is_full = arm.rank is None
        module = Decoder(model.decoder, dtype=jnp.bfloat16)
        self.model = ql.linen.wrap(module, scanned=module.scanned)
        self.packing = None
        if arm.fmt is not None:
            self.packing = ql.QLoRAConfig(
                fmt=arm.fmt, double_quant=arm.double_quant, targets=LAYERS
            )
        dtype = jnp.float32 if is_full else jnp.bfloat16
        base = model.read(dtype=dtype, packing_config=self.packing, progress=False).base
        loss = train.decoder_loss(self.model)
        self.base = {} if is_full else base
        self.trained = base if is_full else {}
        self.loss = self._loss_of_all if is_full else loss
        self._mean = make_mean_loss(self.loss)
        now = datetime.datetime(2026, 11, 28)  # a date for chat templates
        self.tokenizer = data.open_tokenizer(model.path, now=now)
        self.data = self._read(folder / task.name)
        old = folder / task.name / "old.jsonl"
        self.old = self._read(old).train if old.exists() else []

    def _read(self, path: pathlib.Path) -> data.Dataset:
        is_text = self.task.name == "text"
        return data.read_dataset(
            str(path),
            self.tokenizer,
            vocab_size=self.model.config.vocab_size,
            max_length=self.task.max_length,
            too_long="split" if is_text else "error",
        )

    def _loss_of_all(self, params: Any, _: Any, batch: Any, key: Any) -> tuple:
        """Returns the loss of a batch where all weights are trained, the head too."""
        logits = self.model.apply(
            {"params": params},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
        )
        token_losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch.targets
        )
        return jnp.sum(token_losses * batch.weights), jnp.sum(batch.weights)

    def init(self, seed: int) -> Any:
        """Returns the trained parameters before the first step."""
        if self.arm.rank is None:
            return self.trained
        config = ql.QLoRAConfig(rank=self.arm.rank, fmt=None, targets=self.arm.targets)
        return ql.init(jax.random.key(seed), self.base, config)[1]

    def mean(self, trained: Any, rows: Sequence, base: Any = None) -> float:
        """Returns the mean loss of rows, in nats per token."""
        size, length = 4 * self.task.batch_size, self.task.max_length
        batches = data.eval_batches(rows, batch_size=size, max_length=length)
        return self._mean(self.base if base is None else base, trained, batches)

    def exact(self, trained: Any, base: Any = None) -> float | None:
        """Returns the share of exact answers; None for a task without answers."""
        examples = self.data.test_examples
        if not examples:
            return None
        is_full = self.arm.rank is None
        base = self.base if base is None else base
        parts = (trained, {}) if is_full else (base, trained)

        def encode(text):
            return self.tokenizer.encode(text, add_special_tokens=False)

        longest = max(len(encode(example.answer)) for example in examples)
        generated = generate_answers(
            self.model,
            dict(zip(("params", "lora"), parts, strict=True)),
            self.tokenizer,
            [example.prompt for example in examples],
            max_new_tokens=longest + 4,
            batch_size=TESTS // 4,
            progress=False,
        )
        return exact_match([answer.text for answer in generated], examples)

    def before(self) -> dict[str, Any]:
        """Returns the record of the untrained model."""
        trained = self.init(0)
        row = {"rate": None, "seed": None, "exact": self.exact(trained)}
        if self.old:
            row["old"] = self.mean(trained, self.old)
        return row | {"test": self.mean(trained, self.data.test)}

    def train(self, seed: int, rate: float) -> Any:
        """Returns the trained parameters."""
        task = self.task
        schedule = optax.warmup_cosine_decay_schedule(
            0.0, rate, task.steps // 10, task.steps, end_value=rate / 20
        )
        optimizer = train.make_optimizer("adamw", schedule, beta2=0.99)
        start = jax.tree.map(jnp.copy, self.init(seed))  # the state is donated
        state = train.State.create(start, optimizer, seed)
        step = train.make_step(self.loss, optimizer)
        batches = data.batches(
            self.data.train,
            batch_size=task.batch_size,
            max_length=task.max_length,
            seed=seed,
            packing=False,
        )
        for batch in tqdm(itertools.islice(batches, task.steps), total=task.steps):
            state, _ = step(state, self.base, [batch])
        return state.lora

    def fit(self, seed: int, rates: Sequence[float]) -> list[dict[str, Any]]:
        """Returns the record of a run at each learning rate."""
        began = time.perf_counter()
        trained = [self.train(seed, rate) for rate in rates]
        losses = [self.mean(parameters, self.data.valid) for parameters in trained]
        rows = [{"valid": x if math.isfinite(x) else None} for x in losses]
        best = losses.index(min(losses, key=_order))
        rows[best] |= self.measure(trained[best])
        seconds = (time.perf_counter() - began) / len(rates)
        run_facts = {"seed": seed, "seconds": round(seconds, 1)}
        return [
            {"rate": r} | run_facts | row for r, row in zip(rates, rows, strict=True)
        ]

    def measure(self, trained: Any) -> dict[str, Any]:
        """Returns measurements that only the best of several runs gets."""
        row: dict[str, Any] = {"exact": self.exact(trained)}
        row["test"] = self.mean(trained, self.data.test)
        if self.arm.fmt is not None:
            merged = jax.jit(ql.merge)(self.base, trained)
            row["merged"] = self.mean({}, self.data.test, merged)
            packed = jax.jit(ql.quantize, static_argnums=1)(merged, self.packing)
            row["packed again"] = self.mean({}, self.data.test, packed)
        return row


def _order(loss: float | None) -> float:
    """Returns a sort key for losses, in which non-finite losses are the highest."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def losses_by_rate(rows: Sequence[dict]) -> dict[float, float]:
    """Returns the validation loss of seed 0 at each rate, infinite if not finite."""
    return {row["rate"]: _order(row["valid"]) for row in rows if row["seed"] == 0}


def plan(
    rows: Sequence[dict], start: float, seeds: int
) -> tuple[int, list[float]] | None:
    """Returns the seed and the learning rates to train at next; None at the end.

    Args:
        rows: The records of an arm's runs.
        start: The middle of the first three rates.
        seeds: How many seeds are trained at the best rate.
    """
    first = losses_by_rate(rows)
    if len(first) < 3:
        return 0, [x for x in (start / 2, start, 2 * start) if x not in first]
    best = min(first, key=first.__getitem__)
    if best == max(first):
        return 0, [2 * best]
    if best == min(first):
        return 0, [best / 2]
    done = {row["seed"] for row in rows if row["rate"] == best}
    missing = [seed for seed in SEEDS[:seeds] if seed not in done]
    return (missing[0], [best]) if missing else None


def read_records(path: pathlib.Path, **fields: str) -> list[dict[str, Any]]:
    """Returns the records of a file that have these fields; empty without a file."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [x for x in map(json.loads, lines) if x.items() >= fields.items()]


def study(
    folder: pathlib.Path, task: Task, arm: Arm, path: pathlib.Path, end: float
) -> None:
    """Trains an arm until it is finished or time is up, and appends its records.

    Args:
        folder: The folder of the tasks' data and models.
        task: The task.
        arm: The arm.
        path: The file of the records.
        end: When no other run is started, in seconds of `time.monotonic`.
    """
    study_key = {"task": task.name, "arm": arm.name}
    start = task.full_rate if arm.rank is None else task.rate
    bench = None
    while time.monotonic() < end:
        rows = read_records(path, **study_key)
        runs = [x for x in rows if x["rate"] is not None]
        left = plan(runs, start, arm.seeds)
        if rows and left is None:
            return
        bench = bench or Bench(folder, task, arm)
        new_rows = bench.fit(*left) if rows and left else [bench.before()]
        lines = [json.dumps(study_key | row) + "\n" for row in new_rows]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        print(*lines, sep="", end="", flush=True)


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


def print_tables(records: Sequence[dict[str, Any]]) -> None:
    """Prints the tables of all tasks."""
    for name in dict.fromkeys(record["task"] for record in records):
        arms = by_arm(records, name)
        print(f"\n{name}\n" + as_table(HEADER, table(arms, name == "text")))
        if name == "text":
            print("\nbefore training\n" + as_table(UNTRAINED, untrained(arms)))


def main(argv: list[str] | None = None) -> None:
    """Trains all arms that have no results yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    if args.table:
        return print_tables(read_records(args.results))
    end = time.monotonic() + 60 * args.minutes
    for task in (TASKS[name] for name in args.tasks.split(",")):
        make_task(args.folder, task)
        for arm in ARMS:
            if task.name in arm.tasks:
                study(args.folder, task, arm, args.results, end)


if __name__ == "__main__":
    main()
