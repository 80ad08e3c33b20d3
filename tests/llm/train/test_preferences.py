"""The loss of preferences: padded, packed and empty rows, and memory."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import trees_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.app.open_model import OpenModel
from qlora_jax.llm.app.train_config import TrainConfig
from qlora_jax.llm.app.training.program import lower_step
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.jax_engine import JaxEngine
from qlora_jax.llm.train.means import make_means

CONFIG = DecoderConfig(64, 32, 64, 1, num_heads=4, num_kv_heads=2)


def make_row(rng, prompt, size, label):
    """Returns the prompt with a random completion."""
    ids = np.concatenate([prompt, rng.integers(1, 64, size)]).astype(np.int32)
    labels = np.where(np.arange(len(ids)) < len(prompt), -100, ids).astype(np.int32)
    return data.Row(ids, labels, "d:1", len(prompt), label)


@functools.cache
def pairs(count=5):
    rng, rows = np.random.default_rng(0), []
    for _ in range(count):
        prompt = rng.integers(1, 64, rng.integers(1, 6))
        good, bad = (
            make_row(rng, prompt, rng.integers(1, 6), x) for x in (True, False)
        )
        rows.append(good._replace(rejected=bad))
    return rows


@functools.cache
def trees():
    ids = np.ones((1, 4), np.int32)
    params = Decoder(CONFIG).init(jax.random.key(0), ids)["params"]
    return trees_of(params, rank=2, block_size=32, double_quant=False)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_metrics(objective, lora, batch, base=None):
    """Returns the mean loss on a batch, and the means of the metrics."""
    loss = train.find_objective(objective).loss(
        ql.linen.wrap(Decoder(CONFIG)), beta=0.5
    )
    base = trees()[0] if base is None else base
    total, count, metrics = loss(lora, base, batch, None)
    return jnp.sum(total / count), {name: x / n for name, (x, n) in metrics.items()}


@pytest.mark.newest
def test_packed_rows_have_the_loss_of_padded_rows():
    lora, rows = trees()[1], pairs()
    padded = data.eval_batches(rows, batch_size=5, max_length=48)
    settings = dict(batch_size=4, max_length=48, packing=True)
    packed = data.eval_batches(rows, **settings)  # with empty rows
    assert padded[0].ids.shape[0] == 10 and packed[0].answers.shape[1] > 2
    assert len(packed) == 1 and packed[0].num_trained == padded[0].num_trained
    padded_loss, packed_loss = (
        loss_and_metrics("ipo", lora, x) for [x] in (padded, packed)
    )
    # Rewards are differences of log probabilities, each a sum over the tokens of a row.
    tokens = padded[0].num_trained / len(padded[0].ids)
    magnitude = float(tokens * np.log(CONFIG.vocab_size))
    assert_close(packed_loss, padded_loss, magnitude=magnitude)


@pytest.mark.newest
@pytest.mark.without_noise  # which would round other weights to another code
def test_the_reference_of_merge_aware_adapters_is_their_plain_base():
    # A batch of the chosen and the rejected answer to one prompt, and DPO's formula
    # (Rafailov et al. 2023, equation 7). The policy has packed weights.
    [batch] = data.eval_batches(pairs()[:1], batch_size=1, max_length=16)
    params = Decoder(CONFIG).init(jax.random.key(0), batch.ids)["params"]
    settings = {"fmt": "int8", "block_size": 32, "target_fmt": "q4_0"}
    config = ql.QLoRAConfig(rank=2, merge_aware=True, **settings)
    base, lora = ql.init(jax.random.key(1), params, config)
    lora = jax.tree.map(lambda x: x + 0.01, lora)
    model = ql.linen.wrap(Decoder(CONFIG))

    def log_probs(params):
        logits = model.apply({"params": params, "lora": {}}, jnp.asarray(batch.ids))
        log_probs = jax.nn.log_softmax(np.float32(logits))
        rows = zip(
            np.asarray(log_probs), [pairs()[0], pairs()[0].rejected], strict=True
        )
        return [
            sum(x[i - 1, row.ids[i]] for i in range(row.start, len(row.ids)))
            for x, row in rows
        ]

    policy = log_probs(ql.merge(base, lora, requantize=True))
    chosen, rejected = np.subtract(policy, log_probs(base))
    loss, _ = loss_and_metrics("dpo", lora, batch, base)
    margin = 0.5 * (chosen - rejected)
    magnitude = float(np.max(np.abs(policy)))
    assert_close(loss, np.log1p(np.exp(-margin)), magnitude=magnitude)
    assert abs(margin) > 100 * np.finfo(np.float32).eps * magnitude


def make_orpo():
    return train.find_objective("orpo").loss(ql.linen.wrap(Decoder(CONFIG)), beta=0.5)


@pytest.mark.slow
def test_the_validation_loss_of_orpo_does_not_depend_on_the_batch_size():
    # Batches have other ratios of tokens to pairs. TRL agrees on one large batch
    # (tests/interop/test_preferences.py).
    (base, lora), rows = trees(), pairs(7)
    compute_means = make_means(make_orpo())
    large, *means = (
        compute_means(
            base, lora, data.eval_batches(rows, batch_size=size, max_length=16)
        )
        for size in (7, 2, 3, 8)
    )
    for small in means:
        assert_close(small, large)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "scaled"])
def test_accumulated_batches_of_orpo_step_as_one_large_one(form):
    (base, lora), rows = trees(), pairs(7)
    [large] = data.eval_batches(rows, batch_size=7, max_length=16)
    parts = data.eval_batches(rows, batch_size=3, max_length=16)
    step, results = train.make_step(make_orpo(), optax.sgd(0.5)), []
    for batches in ([large], parts):
        scale = train.LossScale.create() if form == "scaled" else None
        copied_lora = jax.tree.map(jnp.copy, lora)
        state = train.State.create(copied_lora, optax.sgd(0.5), 0, scale)
        state, report = step(state, base, batches)
        results.append((report, jax.tree.leaves(state.lora)))
    (report, updated), (accumulated_report, accumulated) = results
    assert np.all(report.is_finite)
    assert_close(accumulated_report, report)
    assert_close(accumulated, updated)


def test_metrics_without_values_are_nan_without_a_warning():
    rng, prompt = np.random.default_rng(0), np.array([1, 2])
    rows = [make_row(rng, prompt, 3, True) for _ in range(2)]  # none is undesirable
    batches = data.eval_batches(rows, batch_size=2, max_length=8)
    loss = train.find_objective("kto").loss(ql.linen.wrap(Decoder(CONFIG)))
    means = make_means(loss)(*trees(), batches)
    assert np.isfinite(means["loss"]) and np.isnan(means["rewards/margins"])


@pytest.mark.without_noise  # which takes memory
@pytest.mark.slow
def test_there_is_no_second_model_in_memory():
    decoder = DecoderConfig(512, 256, 512, 4, num_heads=4, num_kv_heads=2)
    engine = JaxEngine(pathlib.Path("model"), decoder)
    model = OpenModel(engine, engine.shapes)

    def memory_of(objective):
        options = dict(objective=objective, batch_size=1, max_length=32, rank=4)
        options |= dict(model="model", data="data", out="out", steps=9, warmup=1)
        options |= dict(dtype="bfloat16")
        config = TrainConfig.from_settings(options)
        lowered = lower_step(config, model, jax.devices()[:1])
        return lowered.compile().memory_analysis()

    dpo, simpo = memory_of("dpo"), memory_of("simpo")  # SimPO has no reference
    assert dpo.argument_size_in_bytes == simpo.argument_size_in_bytes
    packed = sum(x.size for x in jax.tree.leaves(model.base["layers"])) / 2
    assert dpo.temp_size_in_bytes - simpo.temp_size_in_bytes < packed / 20
