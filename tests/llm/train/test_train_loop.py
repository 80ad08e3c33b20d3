"""Steps, schedules, states and metrics, on a loss that needs no model."""

import io
import json
import math
import re
import resource
import sys
from typing import NamedTuple
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import matplotlib.backends.backend_agg
import numpy as np
import optax
import pytest
from helpers import make_mesh, spread, trees_of
from test_train_batches import rows_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import data as llm_data
from qlora_jax.llm import train
from qlora_jax.llm.app.training import results as run_results
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.train import loop
from qlora_jax.llm.train.callbacks import (
    Best,
    CheckFinite,
    Evaluate,
    LogRows,
    SaveStates,
    ShowProgress,
)
from qlora_jax.llm.train.checkpoints import Checkpoints
from qlora_jax.llm.train.loop import Callback, Training
from qlora_jax.llm.train.means import make_mean_loss
from qlora_jax.llm.train.outputs import Metrics, plot_loss
from qlora_jax.llm.train.step import SumOfMeans


class Points(NamedTuple):
    """A batch for a linear regression onto `targets`, with a weight for each target."""

    ids: np.ndarray  # [B, T, K]
    targets: np.ndarray
    weights: np.ndarray

    @property
    def num_tokens(self):
        return self.targets.size

    @property
    def num_trained(self):
        return int(self.weights.sum())


def make_points(seed, rows=4, width=3, k=5):
    rng = np.random.default_rng(seed)
    ids = rng.normal(size=(rows, width, k)).astype(np.float32)
    targets = rng.normal(size=(rows, width)).astype(np.float32)
    weights = (rng.random((rows, width)) < 0.6).astype(np.float32)
    weights[0, 0] = 1
    return Points(ids, targets, weights)


class Data:
    """An endless iterator whose position is a number."""

    def __init__(self, wrong_step=None):
        self.place, self.wrong_step = 0, wrong_step

    def __iter__(self):
        return self

    def __next__(self):
        self.place += 1
        batch = make_points(self.place)
        if self.place == self.wrong_step:
            batch.ids[0, 0, 0] = np.nan
        return batch

    def get_state(self):
        return {"place": self.place}


def loss(lora, base, batch, key):
    errors = (batch.ids @ lora["w"] - batch.targets) ** 2
    metrics = {"target": jnp.stack([jnp.sum(batch.targets), batch.targets.size])}
    return jnp.sum(errors * batch.weights), jnp.sum(batch.weights), metrics


def start(optimizer):
    return train.State.create({"w": jnp.zeros(5)}, optimizer, seed=0)


def test_a_sum_of_means_does_not_depend_on_the_batches():
    """One mean is over targets, the other over rows."""

    def count(batch):
        return jnp.stack([len(batch.targets), jnp.sum(batch.weights)])

    def totals(lora, base, batch, key):
        errors = jnp.abs(batch.ids @ lora["w"] - batch.targets)
        sums = jnp.sum(jnp.exp(-errors)), jnp.sum(errors * batch.weights)
        return jnp.stack(sums), count(batch)

    parts = [make_points(0, rows=2), make_points(1, rows=5), make_points(2, rows=1)]
    large = Points(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    assert len({x.num_trained / len(x.targets) for x in parts}) == 3
    loss = SumOfMeans(totals, count)
    step, mean_loss = train.make_step(loss, optax.sgd(0.1)), make_mean_loss(loss)
    state, report = step(start(optax.sgd(0.1)), {}, [large])
    accumulated, accumulated_report = step(start(optax.sgd(0.1)), {}, parts)
    assert_close(accumulated_report, report)
    assert_close(accumulated.lora, state.lora)
    errors = np.abs(np.float64(large.targets))  # the adapter starts at zero
    expected = np.exp(-errors).sum() / 8 + np.average(errors, weights=large.weights)
    assert_close(float(report.loss), float(expected))
    for batches in ([large], parts):
        assert_close(mean_loss({}, {"w": jnp.zeros(5)}, batches), float(expected))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_accumulated_batches_step_as_one_large_one(name):
    optimizer = train.make_optimizer(name, 0.1, clip=0.5, weight_decay=0.01)
    step = train.make_step(loss, optimizer)
    parts = [make_points(seed) for seed in range(3)]  # with 7 to 9 trained points each
    large_batch = Points(*(np.concatenate(x) for x in zip(*parts, strict=True)))
    large_state, accumulated_state = start(optimizer), start(optimizer)
    for _ in range(3):
        large_state, report_of_large = step(large_state, {}, [large_batch])
        accumulated_state, accumulated_report = step(accumulated_state, {}, parts)
        assert_close(report_of_large, accumulated_report)
    assert_close(large_state.lora, accumulated_state.lora)
    assert float(accumulated_report.tokens) == large_batch.weights.sum()
    assert_close(
        accumulated_report.metrics["target"], large_batch.targets.mean(dtype=np.float64)
    )
    # The gradient is that of the mean over all trained points.
    w, x = np.asarray(large_state.lora["w"], np.float64), large_batch.ids.reshape(-1, 5)
    errors = (x @ w - large_batch.targets.ravel()) * large_batch.weights.ravel()
    _, report = step(large_state, {}, parts)
    mean = (2 * errors[:, None] * x).sum(0) / large_batch.weights.sum()
    assert_close(report.grad_norm, np.linalg.norm(mean))


PAPERS = {"clip": 1.0, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.95}


def test_adamw_is_clipped_and_decays_as_the_paper_says():
    """Loshchilov and Hutter 2019, algorithm 2, and Pascanu et al. 2013 for clipping."""
    optimizer = train.make_optimizer("adamw", 0.1, **PAPERS)
    params = want = jnp.array([1.0, -2.0])
    state = optimizer.init(params)
    m = v = np.zeros(2)
    for t, g in enumerate([[3.0, 4.0], [0.3, -0.4], [-6.0, 8.0]], 1):
        updates, state = optimizer.update(jnp.array(g), state, params)
        params = optax.apply_updates(params, updates)
        g = np.array(g) / max(1.0, np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g * g
        adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        want = want - 0.1 * (adam + 0.2 * want)
    assert_close(params, want)


@pytest.mark.parametrize(
    "name, want",
    [
        ("constant", lambda t: 1.0),
        ("linear", lambda t: 1 - t),
        ("cosine", lambda t: (1 + math.cos(math.pi * t)) / 2),
        ("wsd", lambda t: 1.0 if t <= 0.875 else (1 - t) / 0.125),
    ],
)
def test_schedules(name, want):
    schedule = train.make_schedule(name, 2.0, 50, warmup=10)
    for step in range(51):
        share = (step - 10) / 40
        expected = step / 10 if step < 10 else want(share)
        # The share of the steps and its cosine are rounded; both have a magnitude of 1.
        assert_close(float(schedule(step)), 2 * expected, terms=64, magnitude=2.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(name="cosin"), "`name` must be one of"),
        (dict(warmup=9), "`warmup` must be at least 0 and less than the 9 steps"),
    ],
)
def test_wrong_schedules_are_refused(options, message):
    arguments = {"name": "cosine", "learning_rate": 1.0, "steps": 9} | options
    with pytest.raises(ValueError, match=message):
        train.make_schedule(**arguments)


OPTIMIZER = optax.adam(0.1)
STEP = train.make_step(loss, OPTIMIZER)


def run(folder, steps, data, on_nan="stop"):
    return fit(folder, steps, STEP, start(OPTIMIZER), data, on_nan=on_nan, save_every=2)


def fit(
    folder,
    steps,
    step,
    state,
    data,
    after=None,
    *,
    accumulation=1,
    save_every=100,
    on_nan="stop",
    evaluate=None,
    best=None,
    callbacks=(),
    **evaluation,
):
    """Trains with all callbacks of the command, in its order."""

    def take_step(state, batches):
        return step(state, {}, batches)

    evaluations = []
    if evaluate is not None:
        evaluations = [Evaluate(evaluate, best=best, **evaluation)]
    with (
        Checkpoints(folder / "state") as states,
        Metrics(folder / "metrics.jsonl", after=after) as metrics,
    ):
        return loop.fit(
            state,
            take_step,
            data,
            steps=steps,
            accumulation=accumulation,
            schedule=lambda step: 0.1,
            callbacks=[
                CheckFinite(states, metrics, on_nan),
                *evaluations,
                metrics,
                *callbacks,
                SaveStates(states, save_every, best=best),
            ],
        )


def metrics_of(folder, *names):
    rows = train.read_metrics(folder / "metrics.jsonl")
    return [tuple(row[name] for name in names) for row in rows]


def test_a_step_with_nan_is_named_and_nothing_of_it_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="step 6 has loss nan.*that of step 4"):
        run(tmp_path, 9, Data(wrong_step=6))
    with Checkpoints(tmp_path / "state") as states:
        state, metadata = states.restore(start(OPTIMIZER))
    assert int(state.step) == 4 and metadata["position"] == {"place": 4}
    assert np.isfinite(state.lora["w"]).all()
    is_nan = [loss is None for (loss,) in metrics_of(tmp_path, "loss")]
    assert is_nan == [False] * 5 + [True]


def test_a_smaller_learning_rate_is_no_advice_for_the_first_step(tmp_path):

    def wrong_loss(lora, base, batch, key):
        total = jnp.sum(lora["x"]["a"] + batch.targets[0, 0])
        return total + jnp.sum(batch.ids[0, 0, 0] * (lora["x"]["b"] + lora["c"])), 1.0

    def take_step(wrong_step):
        step = train.make_step(wrong_loss, optax.sgd(0.1))
        lora = {"c": jnp.zeros(2), "x": {"a": jnp.zeros(3), "b": jnp.zeros(2)}}
        state = train.State.create(lora, optax.sgd(0.1), seed=0)
        with Checkpoints(tmp_path / f"{wrong_step}") as states:
            loop.fit(
                state,
                lambda state, batches: step(state, {}, batches),
                Data(wrong_step=wrong_step),
                steps=2,
                callbacks=[CheckFinite(states)],
            )

    with pytest.raises(FloatingPointError, match="step 1 .*not help") as raised:
        take_step(1)
    assert "Try a smaller" not in str(raised.value)
    with pytest.raises(FloatingPointError, match="step 2 .*Try a smaller") as raised:
        take_step(2)
    assert "not help" not in str(raised.value)


def test_each_step_and_each_batch_of_it_draws_anew():
    def draw(lora, _, batch, key):
        return (jax.random.uniform(key) + 0 * lora["w"][0], 1.0)

    step, drawn = train.make_step(draw, OPTIMIZER), []
    for batches in (1, 2):
        state = start(OPTIMIZER)
        for _ in range(3):
            state, report = step(state, {}, [make_points(0)] * batches)
            drawn.append(float(report.loss))
    assert len({*drawn}) == 6


def test_a_skipped_step_leaves_adapter_and_optimizer_as_they_were(tmp_path, capsys):
    state = run(tmp_path, 6, Data(wrong_step=4), on_nan="skip")
    assert "step 4 has loss nan" in capsys.readouterr().err
    assert (int(state.step), int(state.skipped)) == (6, 1)
    expected = start(OPTIMIZER)
    for place in (1, 2, 3, 5, 6):
        expected, _ = STEP(expected, {}, [make_points(place)])
    chex.assert_trees_all_equal(state[2:4], expected[2:4])


def test_an_exploding_adapter_stops_a_run_that_skips(tmp_path):
    optimizer = optax.chain(optax.scale(1e3), optax.sgd(3e38))
    step = train.make_step(loss, optimizer)
    state, report = step(start(optimizer), {}, [make_points(1)])
    assert np.isfinite(report.loss) and np.isfinite(report.grad_norm)
    assert not report.is_finite and not np.asarray(state.lora["w"]).any()
    with pytest.raises(
        FloatingPointError, match="step 1 .*new adapter weights are not"
    ):
        fit(tmp_path, 5, step, start(optimizer), Data(), on_nan="skip")
    assert not [*(tmp_path / "state").iterdir()]


def memory_kinds(state):
    return [x.sharding.memory_kind for x in jax.tree.leaves(state) if x.ndim]


def test_a_state_in_host_memory_is_skipped_and_restored(tmp_path):
    optimizer = train.make_optimizer("adamw", 0.1, clip=0.5, offload=True)
    step = train.make_step(loss, optimizer)
    nan_batch = make_points(2)
    nan_batch.ids[0, 0, 0] = np.nan
    state, _ = step(start(optimizer), {}, [make_points(1)])
    with Checkpoints(tmp_path) as states:
        states.save(state, {})
        states.wait()
        state, report = step(state, {}, [nan_batch])
        assert not report.is_finite and int(state.skipped) == 1
        again, _ = states.restore(state)
    assert memory_kinds(again.opt_state) == memory_kinds(state.opt_state)
    assert {*memory_kinds(state.opt_state)} == {"pinned_host"}
    assert {*memory_kinds(again.lora)} == {"device"}
    # The step after a skipped one equals the step from the state before it.
    resident = train.make_optimizer("adamw", 0.1, clip=0.5)
    expected = start(resident)
    for place in (1, 3):
        expected, _ = train.make_step(loss, resident)(
            expected, {}, [make_points(place)]
        )
    for next_state in (state, again):
        next_state, _ = step(next_state, {}, [make_points(3)])
        np.testing.assert_array_equal(next_state.lora["w"], expected.lora["w"])


def test_a_split_state_in_host_memory_is_restored(tmp_path):
    params = {"kernel": jnp.ones((3, 256, 256))}
    _, lora = ql.init(jax.random.key(0), params, ql.QLoRAConfig(rank=64))
    spec = jax.sharding.PartitionSpec(None, ("a", "b"))
    lora = spread(lora, make_mesh("Auto"), *spec)
    optimizer = train.make_optimizer("adamw", 0.1, offload=True)
    state = train.State.create(lora, optimizer, seed=0)

    def ones(x):
        return jax.device_put(np.ones(x.shape, x.dtype), x.sharding)

    filled = state._replace(opt_state=jax.tree.map(ones, state.opt_state))
    with Checkpoints(tmp_path) as states:
        states.save(filled, {})
        states.wait()
        restored, _ = states.restore(state)
    chex.assert_trees_all_equal(restored, filled)
    for x, y in zip(*map(jax.tree.leaves, (restored, filled)), strict=True):
        assert x.sharding == y.sharding
    for x in jax.tree.leaves(restored.opt_state):
        assert not x.ndim or x.sharding.memory_kind == "pinned_host"
        assert not x.ndim or x.sharding.spec == spec


class StopAt(Callback):
    """Ends a run after a step."""

    def __init__(self, step):
        self.step = step

    def on_step(self, training):
        training.is_over |= training.step == self.step


LOSSES = [1.0, 9.0, 7.0, 5.0, 6.0, math.nan, 5.0, 4.0]  # the first is of the base


def test_the_best_state_is_kept_and_a_run_without_a_better_one_ends(tmp_path):
    """Both with and without interruptions; an equal loss is not better."""
    steps_of_states = {}
    for name, stops in (("one", ()), ("two", (4, 6))):
        folder, state, data, after = tmp_path / name, start(OPTIMIZER), Data(), None
        folder.mkdir()
        best = Best()
        for stop in (*stops, 8):
            options: dict = dict(best=best, every=1, patience=3)
            options["callbacks"] = [StopAt(stop)]
            options["evaluate"] = lambda x: {"valid_loss": LOSSES[int(x.step)]}
            state = fit(folder, 8, STEP, state, data, after, **options)
            with Checkpoints(folder / "state") as states:
                steps, (state, metadata) = states.steps, states.restore(state)
            after, best = int(state.step), Best(**metadata["best"])
        assert best == Best(3, 5.0, since=3) and after == 6
        steps_of_states[name] = steps
    assert steps_of_states == {"one": [3, 6], "two": [3, 4, 6]}
    # Resuming a run that has ended runs no steps.
    assert int(fit(folder, 8, STEP, state, data, after, **options).step) == 6


@pytest.mark.parametrize("at_start", [True, False])
def test_the_evaluation_before_the_first_step_can_be_left_out(tmp_path, at_start):
    steps = []

    def evaluate(state):
        steps.append(int(state.step))
        return {"valid_loss": 1.0}

    options: dict = dict(evaluate=evaluate, every=2, at_start=at_start)
    fit(tmp_path, 4, STEP, start(OPTIMIZER), Data(), None, **options)
    assert steps == ([0, 2, 4] if at_start else [2, 4])
    first = metrics_of(tmp_path, "step")[0]
    assert first == ((0,) if at_start else (1,))


class Widths(Data):
    """Batches of two widths, two batches in each step."""

    def __next__(self):
        self.place += 1
        return make_points(self.place, width=(3, 3, 5, 3, 3, 5, 5, 5)[self.place % 8])


def test_steps_that_compile_are_marked(tmp_path):
    traced, steps = [], []

    def counted_loss(*args):  # runs where a program is traced
        traced.append(1)
        return loss(*args)

    step = train.make_step(counted_loss, OPTIMIZER)

    def record_step(row):
        return steps.append((row.get("is_compiled", False), len(traced)))

    options = dict(accumulation=2, callbacks=[LogRows(record_step)])
    fit(tmp_path, 12, step, start(OPTIMIZER), Widths(), **options)
    counts = np.diff([0] + [count for _, count in steps])
    assert [is_compiled for is_compiled, _ in steps] == [x > 0 for x in counts]
    assert 3 <= sum(counts > 0) < 6


def test_at_least_one_batch_is_needed():
    for call in (
        lambda: STEP(start(OPTIMIZER), {}, []),
        lambda: make_mean_loss(loss)({}, {}, iter([])),
    ):
        with pytest.raises(ValueError, match="`batches` must have a batch. Got none"):
            call()


def test_the_last_step_may_have_fewer_batches(tmp_path):
    """5 batches, of which 2 make a step."""
    parts, steps = [make_points(seed) for seed in range(5)], []

    def step(state, batches):
        steps.append([x.targets[0, 0] for x in batches])
        return STEP(state, {}, batches)

    class Parts(Data):
        def __next__(self):
            if self.place == 5:
                raise StopIteration
            self.place += 1
            return parts[self.place - 1]

    loop.fit(start(OPTIMIZER), step, Parts(), steps=3, accumulation=2)
    first = [x.targets[0, 0] for x in parts]
    assert steps == [first[:2], first[2:4], first[4:]]


@pytest.mark.parametrize("accumulation", [2, 0])
def test_batches_that_are_too_few_are_named(accumulation):
    message = "`accumulation` must be positive. Got 0"
    if accumulation:
        message = "must not end before step 3, and needs 2 .* ended after step 1"
    with pytest.raises(ValueError, match=message):
        data = iter([make_points(i) for i in range(3)])
        step, state = train.make_step(loss, OPTIMIZER), start(OPTIMIZER)
        loop.fit(
            state,
            lambda state, batches: step(state, {}, batches),
            data,
            steps=3,
            accumulation=accumulation,
        )


def test_times_are_without_the_steps_that_compile(tmp_path):
    row = dict(loss=1.0, tokens=100)
    rows = [row | dict(step=0, seconds=5.0)]
    rows += [row | dict(step=1, seconds=90.0, is_compiled=True)]
    rows += [row | dict(step=n, seconds=n / 10) for n in (2, 3, 7)]
    state = start(OPTIMIZER)
    result = run_results._make_result("out", rows, {}, state, {})
    assert (result.step_seconds, result.tokens_per_s) == (0.3, pytest.approx(300 / 1.2))
    compiled_only = run_results._make_result("out", rows[:2], {}, state, {})
    assert (compiled_only.step_seconds, compiled_only.tokens_per_s) == (
        90,
        pytest.approx(100 / 90),
    )


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "eval_every, shown",
    [
        (3, [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18]),
        (None, [2, 4, 6, 8, 10, 12, 14, 16, 18]),
    ],
)
def test_progress_is_shown_with_the_validation_loss(
    tmp_path, capsys, monkeypatch, terminal, eval_every, shown
):
    bar, numbers = mock.MagicMock(disable=not terminal), []
    monkeypatch.setattr("qlora_jax.llm.train.callbacks.tqdm", lambda *args, **kw: bar)

    def evaluate(state):
        step = int(state.step)
        losses = {"valid_sample_loss": 2 + step / 8}
        # Only the first and the last evaluation use all validation rows.
        return losses | ({"valid_loss": step / 8} if step in (0, 18) else {})

    def record_step(row):
        return numbers.append(row["step"])

    with ShowProgress() as progress:
        callbacks = [LogRows(record_step), progress]
        options = dict(evaluate=evaluate, every=eval_every, callbacks=callbacks)
        fit(tmp_path, 18, STEP, start(OPTIMIZER), Data(), **options)
    assert numbers == [*range(19)]
    assert metrics_of(tmp_path, "step") == [(step,) for step in range(19)]
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step ")]
    assert [int(line.split()[1]) for line in lines] == ([] if terminal else shown)
    texts = [call.args[0] for call in bar.set_postfix_str.call_args_list]
    if not terminal:
        assert lines == [f"step {n} of 18: {texts[n - 1]}" for n in shown]
    evaluated = range(0, 18, eval_every) if eval_every else [0]
    for step, text in enumerate(texts[:-1], 1):
        last = max(n for n in evaluated if n <= step)
        kind, value = ("", 0) if not last else (" sample", 2 + last / 8)
        assert f", validation{kind} {value:.4f} at step {last}, " in text
    assert ", validation 2.2500 at step 18, " in texts[-1]
    assert texts[0].endswith("s with compilation") and texts[1].endswith("tokens/s")


REWARDS = {"rewards/chosen": 0.25, "rewards/rejected": -0.125, "rewards/margins": 0.375}


class Terminal(io.StringIO):
    """A terminal of 110 columns."""

    def isatty(self):
        return True


@pytest.mark.parametrize("metrics", [{}, REWARDS], ids=["texts", "pairs"])
def test_the_progress_bar_fits_on_a_terminal(monkeypatch, metrics):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("COLUMNS", "111")  # tqdm takes one less
    monkeypatch.setenv("LINES", "40")
    with ShowProgress() as progress:
        training = Training(1000, iter([]), state=None, step=299)
        progress.on_start(training)
        training.step = 300
        training.row = {
            "loss": 0.1234,
            "tokens_per_s": 310.0,
            "seconds": 1.0,
            **metrics,
        }
        training.evaluation = {} if metrics else {"valid_sample_loss": 0.0045}
        progress.on_step(training)
        progress._bar.refresh()
    line = terminal.getvalue().split("\r")[-2]
    assert len(line) <= 110 and re.search(r"\|[^|]{10}\| ", line), line
    assert line.rstrip().endswith(", 310 tokens/s")
    assert not metrics or "rewards 0.250 and -0.125, margin 0.375" in line


def test_a_state_of_another_run_is_refused(tmp_path):
    with Checkpoints(tmp_path) as states:
        states.save(start(OPTIMIZER), {})
        states.wait()
        other_state = train.State.create({"v": jnp.ones(2)}, OPTIMIZER, seed=0)
        message = r"lora.v was nothing, is float32\[2\].*"
        message += r"lora.w was float32\[5\], is nothing"
        with pytest.raises(ValueError, match=message):
            states.restore(other_state)


def test_metrics_end_with_a_complete_line_if_the_disk_is_full(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Metrics(path) as metrics:
        metrics.write(step=1, loss=float("nan"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, before[1]))
        try:
            reason = "metrics.jsonl cannot be written: .*too large"
            with pytest.raises(OSError, match=reason):
                metrics.write(step=2, loss=0.125)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == '{"step": 1, "loss": null}\n'


def test_metrics_go_on_after_the_step_of_the_state(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(5)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    with Metrics(path, after=3) as metrics:
        metrics.write(step=4, loss=2.0)
    rows = [(step, 1.0) for step in range(4)]
    assert metrics_of(tmp_path, "step", "loss") == [*rows, (4, 2.0)]


def test_the_plot_has_a_point_for_each_evaluation(tmp_path, monkeypatch):
    canvas, drawn = matplotlib.backends.backend_agg.FigureCanvasAgg, []
    write = canvas.print_figure

    def record_lines(self, *args, **options):
        [axes] = self.figure.axes
        lines = [(x.get_label(), x.get_marker(), x.get_xydata()) for x in axes.lines]
        drawn.append({label: (mark, xy.tolist()) for label, mark, xy in lines})
        return write(self, *args, **options)

    monkeypatch.setattr(canvas, "print_figure", record_lines)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 101)]
    for row in rows[9::10]:
        row["valid_sample_loss"] = 2 / row["step"]
    rows[99]["valid_loss"] = 0.5
    plot_loss(rows, tmp_path / "loss.png")
    plot_loss([{"step": 1, "loss": 1.0, "valid_loss": 2.0}], tmp_path / "one.png")
    sample_points = [[float(step), 2 / step] for step in range(10, 101, 10)]
    assert drawn[0]["validation, some rows"] == ("o", sample_points)
    assert drawn[0]["validation, all rows"] == ("D", [[100, 0.5]])
    mark, means = drawn[0]["mean of 5 steps"]
    assert means[0] == [5, pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)]
    assert drawn[1] == {"each step": ("None", [[1, 1]]), "validation": ("o", [[1, 2]])}


@pytest.mark.slow
@pytest.mark.parametrize("packing, count", [(True, 1), (False, 3)])
def test_the_loss_of_rows_is_that_of_optax_on_each_row_alone(packing, count):
    config = DecoderConfig(61, 16, 32, 2, num_heads=2, num_kv_heads=1)
    decoder = Decoder(config)
    tokens = np.zeros((1, 2), np.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens)["params"]
    targets = "layers/.*/(q|down)_proj/kernel"
    base, lora = trees_of(params, rank=2, block_size=16, targets=targets)
    rows = rows_of((7, 3, 9, 4, 2), vocab=61)
    model = ql.linen.wrap(decoder, scanned=decoder.scanned)
    settings = dict(batch_size=2, max_length=16, seed=0, num_epochs=1)
    batches = [*llm_data.batches(rows, packing=packing, **settings)]
    assert len(batches) == count
    step = train.make_step(train.decoder_loss(model), optax.sgd(1.0))
    copy = jax.tree.map(jnp.copy, lora)  # the state is donated
    state, report = step(train.State.create(copy, optax.sgd(1.0), 0), base, batches)

    ids, labels = np.zeros((2, 5, 9), np.int32)
    labels -= 100
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = row.ids
        labels[index, : len(row.ids)] = row.labels
    counts = labels[:, 1:] != -100

    def mean_loss(lora):
        logits = model.apply({"params": base, "lora": lora}, ids)[:, :-1]
        token_labels = np.maximum(labels[:, 1:], 0)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, token_labels)
        return jnp.sum(losses * counts) / counts.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(lora)
    assert_close(report.loss, loss)
    assert_close(report.grad_norm, optax.tree.norm(grads))
    expected = jax.tree.map(lambda x, g: x - g, lora, grads)
    assert_close(state.lora, expected, terms=64)
