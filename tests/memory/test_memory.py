"""Memory-saving forms compute the same as the plain forms."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_oracle import attention
from flax import linen as nn
from flax import nnx
from helpers import (
    assert_equal_but_for_rounding,
    assert_same,
    fast_and_slow,
    normal,
    relative_error,
    trees_of,
)
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.app.train_config import TrainConfig
from qlora_jax.llm.app.training.run import make_run
from qlora_jax.llm.models.config import DecoderConfig, LayerKind, Rope
from qlora_jax.llm.models.decoder import Decoder

splash = functools.partial(ql.memory.splash_attention, interpret=True)


# Attention


def plain(
    *qkv, window=None, segment_ids=None, sinks=None, scale, soft_cap=None, xp=jnp
):
    place = np.arange(qkv[0].shape[1])
    visible = (place[:, None] >= place)[None]
    if segment_ids is not None:
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None])
    if window is not None:
        visible = visible & (place[:, None] - place < window)[None]
    return attention(*qkv, visible, scale, soft_cap, xp, sinks)


def operands(tokens, dtype=jnp.float32):
    """Returns queries, keys, values, and a cotangent."""
    return [normal(i, (2, tokens, n, 16), dtype) for i, n in enumerate((4, 2, 2, 4))]


SEGMENTS = np.repeat([[1, 1, 2, 3, 0], [1, 2, 2, 2, 2]], 54, axis=1)  # 270 tokens


@pytest.mark.parametrize(
    "soft_cap, window, segments, sinks",
    [
        pytest.param(None, None, None, None, id="causal", marks=pytest.mark.slow),
        pytest.param(3.0, 100, SEGMENTS, [-1.0, 0.5, 2.0, 6.0], id="all others"),
    ],
)
def test_splash_equals_its_formula(soft_cap, window, segments, sinks):
    *qkv, g = operands(270)  # in three blocks of 128, with padding
    qkv.append(sinks and jnp.array(sinks))
    settings = {"scale": 0.4, "soft_cap": soft_cap, "window": window}
    settings["segment_ids"] = segments

    @functools.partial(jax.jit, static_argnums=0)
    def run(attention, qkv):
        def call(*x):
            return attention(*x[:3], sinks=x[3], **settings)

        out, pull = jax.vjp(call, *qkv)
        return out, pull(g)

    got, gradients = run(splash, qkv)
    exact = (np.asarray(x, np.float64) for x in qkv[:3])
    sinks = sinks and np.array(sinks)
    want = plain(*exact, sinks=sinks, xp=np, **settings)
    assert_close(got, want, terms=270)
    assert_equal_but_for_rounding(gradients, lambda *x: run(plain, x)[1], *qkv)


@pytest.mark.slow
def test_splash_rounds_16_bit_queries_once():
    *qkv, _ = operands(128, jnp.bfloat16)
    got = splash(*qkv)
    assert got.dtype == jnp.bfloat16
    want = plain(*(np.asarray(x, np.float64) for x in qkv), scale=0.25, xp=np)
    assert_close(got, want, terms=128, roundings=1)


def test_splash_is_for_tpus():
    *qkv, _ = operands(128)

    def summed_attention(*x):
        return ql.memory.splash_attention(*x).sum()

    grad = jax.jit(jax.grad(summed_attention, argnums=(0, 1, 2))).trace(*qkv)

    def lower(name):
        return grad.lower(lowering_platforms=(name,)).as_text()

    assert lower("tpu").count("tpu_custom_call") == 3  # forward, and two backward
    for platform in ("cpu", "cuda"):
        with pytest.raises(NotImplementedError, match=f"TPU.* Got {platform}"):
            lower(platform)
    with pytest.raises(NotImplementedError, match="TPU.* Got cpu"):
        ql.memory.splash_attention(*qkv)


def attend(**changed):
    arrays = dict.fromkeys(("query", "key", "value"), jnp.ones((1, 8, 2, 4)))
    return splash(**{**arrays, **changed})


PATHS = {"model": "model", "data": "data", "out": "out"}
ODD_QUERY, SHORT_VALUE = jnp.ones((1, 8, 3, 4)), jnp.ones((1, 7, 2, 4))
CLIP = "`tile` must be a positive integer or None. Got"


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: attend(window=0), "`window` must be positive or None. Got 0"),
        (lambda: attend(soft_cap=-1), "`soft_cap` must be finite and positive. Got -1"),
        (lambda: attend(segment_ids=jnp.ones((1, 9))), r"must have shape \(1, 8\)"),
        (lambda: attend(query=ODD_QUERY), "divide that of `query`. Got 2 and 3"),
        (lambda: attend(value=SHORT_VALUE), "must have the same shapes"),
        (lambda: attend(key=jnp.ones((8, 4))), "`query` and `key` must have four axes"),
        (lambda: ql.memory.tiled(jnp.sin, 0), CLIP + " 0"),
        (lambda: ql.linen.tiled(nn.Dense(3), -1), CLIP + " -1"),
        (lambda: ql.linen.tiled(nn.Dense(3), 2.5), CLIP + " 2.5"),  # pyright: ignore
        (lambda: ql.memory.tiled(jnp.sin, 2)(jnp.ones(3)), r"tokens.* Got \(3,\)"),
        (lambda: Decoder(CONFIG, attention="flash"), "must be one of .*'splash'.* 'fl"),
        (
            lambda: TrainConfig.from_settings(
                PATHS | {"lora_dropout": 0.1, "mlp_tile": 8}
            ),
            "must be 0 with `mlp_tile`",
        ),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Tiles


@pytest.mark.parametrize(
    "tokens, tile", fast_and_slow([(50, 16)], [(48, 16), (16, 16), (5, 1)])
)
def test_tiles_compute_what_the_function_does(tokens, tile):
    w, x = normal(0, (3, 8, 24), scale=1 / 3), normal(1, (2, tokens, 8))

    @functools.partial(jax.jit, static_argnums=2)
    def run(w, x, tile):
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def layer(x, w):
            mlp = ql.memory.tiled(lambda x: jnp.sin(x @ w) @ w.T, tile)
            return x + mlp(x), None

        def loss(w, x):
            return jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(w, x)

    untiled = functools.partial(run, tile=None)
    assert_equal_but_for_rounding(run(w, x, tile), untiled, w, x)


def test_tiles_hold_one_tile():
    w = jax.ShapeDtypeStruct((64, 2048), jnp.float32)

    def temporaries(tokens, tile):
        def mlp(w, x):
            return jnp.sin(x @ w) @ w.T

        def run(w, x):
            return ql.memory.tiled(functools.partial(mlp, w), tile)(x).sum()

        x = jax.ShapeDtypeStruct((1, tokens, 64), jnp.float32)
        compiled = jax.jit(jax.grad(run, argnums=(0, 1))).lower(w, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    inside = 4 * 2048  # bytes per token inside the function

    def growth(tile):
        return temporaries(2048, tile) - temporaries(1024, tile)

    assert growth(None) >= 1024 * inside > 10 * growth(128)


class Tiled(nn.Module):
    tile: int | None = None

    @nn.compact
    def __call__(self, x):
        return ql.linen.tiled(nn.Dense(8, name="dense"), self.tile)(x)


class TiledLayers(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return ql.linen.tiled(nn.Dense(64, use_bias=False, name="up"), 4)(x), None


class ScannedTiles(nn.Module):
    split: tuple

    @nn.compact
    def __call__(self, x):
        rngs = dict.fromkeys(self.split, True)
        layers = nn.scan(TiledLayers, variable_axes={"params": 0}, split_rngs=rngs)
        return layers(name="layers")(x, jnp.zeros(1))[0]


def test_each_linen_tile_has_its_own_dropout_of_adapters():
    """W is 0, and A and B are the identity, so results are masks of 256 inputs."""
    ranks = {"layers/up/kernel": 64}
    config = ql.QLoRAConfig(alpha=64, dropout=0.5, fmt=None, rank_pattern=ranks)
    params = {"layers": {"up": {"kernel": jnp.zeros((1, 64, 64))}}}
    base, lora = ql.init(jax.random.key(1), params, config)
    lora = jax.tree.map(lambda a: jnp.eye(64)[None], lora)
    variables, rngs = {"params": base, "lora": lora}, {"dropout": jax.random.key(2)}

    def run(*split):
        wrapped = ql.linen.wrap(ScannedTiles(split))
        return wrapped.apply(variables, jnp.ones((1, 8, 64)), rngs=rngs)

    first, second = jnp.split(run("params", "dropout"), 2, axis=1)
    assert 80 < np.sum(first == second) < 176
    with pytest.raises(ValueError, match="no dropout in tiles.*\n.*up/kernel: 0.5"):
        run("params")  # no stream reaches the layers


class TiledDropout(nn.Module):
    collection: str

    @nn.compact
    def __call__(self, x):
        dropout = nn.Dropout(0.5, deterministic=False, rng_collection=self.collection)
        return ql.linen.tiled(dropout, 4)(x)


@pytest.mark.parametrize(
    ("collection", "rngs"),
    [
        ("dropout", ["dropout"]),
        ("dropout", ["params"]),  # the key that Flax uses if there is no other
        ("noise", ["noise"]),
        ("noise", ["noise", "params"]),
    ],
)
def test_each_linen_tile_has_its_own_dropout(collection, rngs):
    keys = {name: jax.random.key(i) for i, name in enumerate(rngs)}
    first, second = jnp.split(
        TiledDropout(collection).apply({}, jnp.ones((1, 8, 64)), rngs=keys), 2, axis=1
    )
    # Masks of 256 independent coins agree on about half of them.
    assert 80 < np.sum(first == second) < 176


def test_linen_tiles_create_the_parameters_of_one():
    x = jnp.ones((1, 6, 32))
    params = Tiled(2).init(jax.random.key(0), x)["params"]
    assert params["dense"]["kernel"].shape == (32, 8)


def test_nnx_modules_in_tiles():
    config = ql.QLoRAConfig(rank=2, block_size=32, targets="kernel")
    model = ql.nnx.wrap(nnx.Linear(32, 8, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
    adapters = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1, adapters))
    x = normal(0, (2, 50, 32))

    @functools.partial(nnx.jit, static_argnums=1)
    def run(model, tile):
        def loss(model):
            return jnp.mean(ql.memory.tiled(model, tile)(x) ** 2)

        argnums = nnx.DiffState(0, nnx.LoRAParam)
        return nnx.value_and_grad(loss, argnums=argnums)(model)

    assert_equal_but_for_rounding(run(model, 16), lambda m: run(m, None), model)


# Layer inputs


def scanned(policy):
    def layer(x, w):
        x = ql.memory.layer_input(x)
        return x + jnp.sin(x @ w), None

    layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
    return lambda w, x: jnp.mean(jax.lax.scan(layer, x, w)[0] ** 2)


def test_layer_inputs_are_in_host_memory():
    w, x = normal(0, (5, 8, 8)), normal(1, (3, 8))
    policy = ql.memory.offload_layer_inputs()

    def run(policy):
        return jax.value_and_grad(scanned(policy), argnums=(0, 1))

    def find_stacks(policy):
        return re.findall(
            r"f32(?:<(\w+)>)?\[5,3,8\]", str(jax.make_jaxpr(run(policy))(w, x))
        )

    assert {*find_stacks(policy)} == {"host"} and {*find_stacks(None)} == {""}
    assert_same(*(jax.jit(run(remat_policy))(w, x) for remat_policy in (policy, None)))


def test_layer_inputs_stay_on_gpus(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(NotImplementedError, match="must not be offloaded on a GPU"):
        ql.memory.offload_layer_inputs()


# The decoder

ROPE = Rope(1e2)
KINDS = (LayerKind(ROPE, 5), LayerKind(None), LayerKind(ROPE, 5), LayerKind(ROPE))
SMALL = {"num_heads": 4, "num_kv_heads": 2, "attention_soft_cap": 5.0}
CONFIG = DecoderConfig(48, 32, 64, 4, **SMALL, layers=KINDS)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 48, (2, 40)))
PACKED = jnp.asarray(np.repeat([[1, 1, 2, 3, 0], [1, 2, 2, 2, 2]], 8, axis=1))


@pytest.fixture(scope="module")
def trees():
    model = Decoder(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), IDS)["params"]
    params = jax.tree.map(lambda x: 2 * x if x.ndim > 1 else x + 0.1, params)
    return trees_of(params, rank=4, block_size=16, targets="layers/.*_proj/kernel")


def value_and_gradient(model, **kwargs):
    wrapped = ql.linen.wrap(model, scanned=model.scanned)

    def loss(lora, base):
        variables = {"params": base, "lora": lora}
        logits = wrapped.apply(variables, IDS, segment_ids=PACKED, **kwargs)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, IDS)
        return jnp.mean(losses)

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.newest  # with other instructions too
def test_choices_compute_what_the_plain_decoder_does(trees):
    base, lora = trees
    model = Decoder(CONFIG, attention=splash, remat="offload", mlp_tile=7)
    got = value_and_gradient(model)(lora, base)
    plain = value_and_gradient(Decoder(CONFIG))
    assert_equal_but_for_rounding(got, plain, lora, base)


@pytest.mark.slow
def test_a_stream_in_16_bits_stays_near(trees):
    base, lora = trees
    variables = {"params": base, "lora": lora}

    def run(model):
        return jax.jit(ql.linen.wrap(model).apply)(variables, IDS)

    got = run(Decoder(CONFIG, stream_dtype=jnp.bfloat16))
    assert 0 < relative_error(got, run(Decoder(CONFIG))) < 0.03


@pytest.mark.slow
def test_offloading_keeps_the_bits_of_remat(trees):
    base, lora = trees

    def run(remat):
        return value_and_gradient(Decoder(CONFIG, remat=remat))(lora, base)

    assert_same(run("offload"), run(True))


def test_the_stream_is_kept_in_its_dtype():
    def find_stacks(dtype):
        model = Decoder(CONFIG, jnp.bfloat16, remat=True, stream_dtype=dtype)
        params = jax.eval_shape(model.init, jax.random.key(0), IDS)

        def loss(params):
            return jnp.sum(model.apply(params, IDS))

        text = str(jax.make_jaxpr(jax.grad(loss))(params))
        return {*re.findall(r"\b(\w+)\[4,2,40,32\]", text)}

    assert find_stacks(jnp.float32) == {"f32"} and find_stacks(jnp.bfloat16) == {"bf16"}


@pytest.mark.slow
def test_positions_that_do_not_count_up_give_nan_not_other_numbers(trees):
    def apply(model, positions):
        hidden = functools.partial(ql.linen.wrap(model).apply, return_hidden=True)

        def trees_of(base, lora):
            return {"params": base, "lora": lora}

        return jax.jit(lambda *trees: hidden(trees_of(*trees), IDS, positions))

    positions = jnp.asarray(np.tile(np.arange(40), (2, 1)))
    gapped = positions.at[1, 9].set(8)
    got = apply(Decoder(CONFIG, attention=splash), gapped)(*trees)
    assert np.isnan(got[1]).all()
    plain = apply(Decoder(CONFIG), positions)
    assert_equal_but_for_rounding(got[0], lambda *trees: plain(*trees)[0], *trees)


@pytest.mark.slow
def test_a_function_is_called_with_windows_and_segments(trees):
    calls, (base, lora) = [], trees

    def attention(query, key, value, segment_ids, window, **settings):
        calls.append((query.shape, key.shape, segment_ids.shape, window))
        assert settings == {"scale": 8**-0.5, "soft_cap": 5.0}
        return query

    value_and_gradient(Decoder(CONFIG, attention=attention))(lora, base)
    shapes = (2, 40, 4, 8), (2, 40, 2, 8), (2, 40)
    assert {*calls} == {(*shapes, 5), (*shapes, None)}


# The command


def test_what_gpus_do_not_compute_is_refused_first(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="`remat` must be true or false on a GPU"):
        make_run(TrainConfig.from_settings(PATHS | {"remat": "offload"}), "2026-01-31")
