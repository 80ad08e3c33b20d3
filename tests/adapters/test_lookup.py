"""Rows of tables of embeddings: those of the decoded, merged table."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ANY_BLOCK, SERVED, dequantize, fast_and_slow, normal, randomized
from tolerances import assert_close

import qlora_jax as ql

IDS = np.array([[0, 1, 2, 62], [63, -1, -64, 33]])


@pytest.mark.parametrize(
    "fmt",
    fast_and_slow(["nf4"], [f for f in [*ANY_BLOCK, *dict(SERVED)] if f != "nf4"]),
)
@pytest.mark.parametrize("contract", ["kn", "nk"])
def test_rows_of_a_packed_table_are_those_of_the_decoded_one(fmt, contract):
    block_size = 16 if fmt in ANY_BLOCK else dict(SERVED)[fmt]
    w = normal(0, (128, 128), jnp.bfloat16)
    q = ql.quantize(w, fmt, block_size=block_size, contract=contract)
    want = dequantize(q)
    want = (want if contract == "kn" else want.T)[IDS]
    rows = jax.jit(ql.lookup)(q, None, IDS)
    np.testing.assert_array_equal(np.float32(rows), want.astype(jnp.bfloat16))


@pytest.mark.parametrize("contract", ["kn", "nk"])
def test_a_lookup_adds_the_rows_of_a_b(contract):
    config = ql.QLoRAConfig(rank=4, alpha=8, contract=contract, targets="embedding")
    base, lora = ql.init(jax.random.key(0), {"embedding": normal(0, (64, 48))}, config)
    lora = randomized(lora)["embedding"]
    delta = np.asarray(lora.a, np.float64) @ np.asarray(lora.b)
    w = np.asarray(ql.dequantize(base["embedding"]))
    want = w + 2 * (delta if contract == "kn" else delta.T)
    rows = ql.lookup(base["embedding"], lora, IDS)
    assert_close(rows, want[IDS], terms=64)
    with pytest.raises(ValueError, match="must be the adapter of the table: "):
        ql.lookup(normal(0, (48, 48)), lora, IDS)
    with pytest.raises(ValueError, match="must be integers. Got float32"):
        ql.lookup(base["embedding"], lora, np.float32(IDS))


def test_out_of_range_is_nan_as_in_flax():
    q = ql.quantize(normal(0, (64, 48)))
    lora = ql.TrainedRows(jnp.ones((2, 48)), 1.0, 0.0, q.geometry, (3, 63))
    for rows in (
        ql.lookup(q, None, np.array([64])),
        ql.lookup(q, lora, np.array([-65])),
    ):
        assert np.isnan(rows).all()


@pytest.mark.parametrize("is_nnx", [False, True])
def test_a_table_is_not_decoded(is_nnx):
    """A quarter of a mebibyte in float; a program needs less than its 16th."""
    x, config = jnp.asarray(IDS), ql.QLoRAConfig(rank=2, targets="embedding")
    if is_nnx:
        model = ql.nnx.wrap(
            nnx.Embed(2048, 32, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1)
        )
        graph, state = nnx.split(model)
        run = lambda state: nnx.merge(graph, state)(x)
    else:
        model = nn.Embed(2048, 32)
        params = model.init(jax.random.key(0), x)["params"]
        base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
        state = {"params": base, "lora": lora}
        run = lambda state: ql.linen.wrap(model).apply(state, x)
    memory = jax.jit(run).lower(state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 32 * 4 / 16
