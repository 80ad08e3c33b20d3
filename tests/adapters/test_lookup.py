"""Looking up embeddings equals taking rows of the decoded, merged table."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import (
    ANY_BLOCK,
    SERVED,
    dequantize,
    fast_and_slow,
    normal,
    randomized,
)
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


def test_a_table_has_no_low_rank_adapter():
    params, key = {"embedding": normal(0, (64, 48))}, jax.random.key(0)
    config = ql.QLoRAConfig(rank=4, targets="embedding")
    message = "cannot have adapters: .*`trainable_rows`.*\n  embedding"
    with pytest.raises(ValueError, match=message):
        ql.init(key, params, config)
    with pytest.raises(ValueError, match=message):
        ql.linen.init(key, nn.Embed(64, 48), params, config, IDS)
    with pytest.raises(ValueError, match=message):
        ql.nnx.wrap(nnx.Embed(64, 48, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    w = params["embedding"]
    _, lora = ql.init(key, {"w": w}, ql.QLoRAConfig(rank=4, targets="w"))
    with pytest.raises(ValueError, match="a Trained or a TrainedRows.* Got LoRA"):
        ql.lookup(w, lora["w"], IDS)
    with pytest.raises(ValueError, match="must be the adapter of the table: "):
        ql.lookup(normal(0, (48, 48)), lora["w"], IDS)
    with pytest.raises(ValueError, match="must be integers. Got float32"):
        ql.lookup(w, None, np.float32(IDS))


@pytest.mark.parametrize("is_packed", [False, True])
def test_rows_of_a_stack_of_tables_are_trained(is_packed):
    base = {"embedding": normal(0, (2, 64, 48))}
    if is_packed:
        base = ql.quantize(base, ql.QLoRAConfig(block_size=16, targets="embedding"))
    config = ql.QLoRAConfig(targets=(), trainable_rows={"embedding": (5, 62)})
    base, lora = ql.init(jax.random.key(0), base, config)
    tables = np.array(dequantize(base["embedding"]) if is_packed else base["embedding"])
    rows = lora["embedding"].arrays["rows"]
    np.testing.assert_array_equal(rows, tables[:, [5, 62]])
    lora = jax.tree.map(lambda x: x + 1, lora)
    tables[:, [5, 62]] += 1
    np.testing.assert_array_equal(ql.merge(base, lora)["embedding"], tables)

    def look_up(carry, layer):
        base, lora = layer
        return carry, ql.lookup(base["embedding"], lora["embedding"], IDS)

    _, found = jax.lax.scan(look_up, None, (base, lora))
    np.testing.assert_array_equal(found, tables[:, IDS])


NUM_ROWS = 320  # more rows than 8-bit ids can address
TABLES = {
    "trained rows": {"trainable_rows": {".*": [3, 319]}},
    "trained": {"trainable": ".*"},
}
# Ids of each dtype: some at both ends of the table, and then out-of-range ones.
IDS_BY_DTYPE = {
    "int4": [0, 7, -1, -8],
    "uint4": [0, 7, 15],
    "int8": [0, 3, 127, -1, -128],
    "uint8": [0, 3, 127, 200, 255],
    "int16": [0, 319, -1, -320, 320, -321, 2**15 - 1],
    "uint16": [0, 319, 320, 2**16 - 1],
    "int32": [0, 319, -1, -320, 320, -321, 2**31 - 1, -(2**31)],
    "uint32": [0, 319, 320, 2**31, 2**32 - 1],
    "int64": [0, 319, -1, -320, 320, 2**32 + 3, -(2**32)],
    "uint64": [0, 319, 2**32 + 3, 2**64 - 1],
}


@functools.cache
def lookups():
    """Lookup functions by name, each with the merged table that it should read."""
    lookups_by_name = {}
    params = {"embedding": normal(0, (NUM_ROWS, 32))}
    packed = ql.quantize(params, ql.QLoRAConfig(targets="embedding"))
    run = functools.partial(ql.lookup, packed["embedding"], None)
    lookups_by_name["packed"] = run, ql.dequantize(packed["embedding"])
    for name, settings in TABLES.items():
        config = ql.QLoRAConfig(targets=(), **settings)
        tree = params if name == "trained" else packed
        base, lora = ql.init(jax.random.key(0), tree, config)
        lora = randomized(lora)
        run = functools.partial(ql.lookup, base["embedding"], lora["embedding"])
        lookups_by_name[name] = run, ql.merge(base, lora)["embedding"]
    linen, config = (
        nn.Embed(NUM_ROWS, 32),
        ql.QLoRAConfig(targets=(), **TABLES["trained rows"]),
    )
    base, lora = ql.linen.init(jax.random.key(0), linen, params, config, IDS)
    variables = {"params": base, "lora": lora}
    run = functools.partial(ql.linen.wrap(linen).apply, variables)
    lookups_by_name["linen"] = run, ql.merge(base, lora)["embedding"]
    model = nnx.Embed(NUM_ROWS, 32, rngs=nnx.Rngs(0))
    model = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    lookups_by_name["nnx"] = model, ql.merge(*ql.nnx.split(model))["embedding"]
    return lookups_by_name


@pytest.mark.newest
@pytest.mark.parametrize("dtype", IDS_BY_DTYPE)
def test_ids_of_every_dtype_count_from_either_end(dtype):
    """Out-of-range ids return NaN. JAX's `take` returns row 63 of 320 for int8 -1."""
    values = (IDS_BY_DTYPE[dtype] * 8)[:8]  # of one shape, to compile once
    ids = np.array([values], dtype) if "64" in dtype else jnp.array([values], dtype)
    is_inside = [-NUM_ROWS <= i < NUM_ROWS for i in values]
    for name, (run, table) in lookups().items():
        rows = np.asarray(table)[[i % NUM_ROWS for i in values]]
        want = np.where(np.array(is_inside)[:, None], rows, np.nan)[None]
        got = np.asarray(run(ids))
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), name)
        assert_close(np.nan_to_num(got), np.nan_to_num(want), terms=64)


@pytest.mark.parametrize("is_nnx", [False, True])
def test_a_table_of_one_row_takes_any_id(is_nnx):
    """Flax's `Embed` does the same."""
    ids, config = (
        jnp.array([0, 5]),
        ql.QLoRAConfig(targets=(), trainable_rows={"embedding": [0]}),
    )
    if is_nnx:
        model = nnx.Embed(1, 32, rngs=nnx.Rngs(0))
        want = model(ids)
        got = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))(ids)
    else:
        model = nn.Embed(1, 32)
        variables = model.init(jax.random.key(0), ids)
        want = model.apply(variables, ids)
        args = jax.random.key(1), model, variables["params"], config, ids
        base, lora = ql.linen.init(*args)
        got = ql.linen.wrap(model).apply({"params": base, "lora": lora}, ids)
    assert_close(got, want)


def test_a_table_is_not_decoded():
    """The float table has 0.25 MiB; the program may use less than a 16th of that."""
    x, config = jnp.asarray(IDS), ql.QLoRAConfig(targets="embedding")
    model = nn.Embed(2048, 32)
    state = ql.quantize(model.init(jax.random.key(0), x)["params"], config)

    def run(state):
        return ql.linen.wrap(model).apply({"params": state}, x)

    memory = jax.jit(run).lower(state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2048 * 32 * 4 / 16
