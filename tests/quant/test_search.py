"""Scales by search: less error than the largest magnitude gives, in the same format."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import (
    TABLES,
    assert_same,
    assert_same_bits,
    dequantize,
    fast_and_slow,
    make_mesh,
    normal,
    refusal,
    relative_error,
    rounding,
    spread,
)

import qlora_jax as ql
from qlora_jax.quant import search

K, N = 256, 24
CASES = [("nf4", 64), ("fp4", 64), ("int4", 64), ("int8", 64), ("int4_f16", 128)]
CASES += [("int4_f16", 32), ("q4_0", 32), ("mxfp4", 32), ("nvfp4", 16)]


def pack(w, fmt, block_size, importance=None, scales="search"):
    double = False if fmt in ("nf4", "fp4", "int4", "int8") else None
    settings = {"block_size": block_size, "double_quant": double, "scales": scales}
    return ql.quantize(w, fmt, importance=importance, **settings)


def block_errors(decoded, w, block_size, importance):
    """Sums the weighted squared errors of each block, in float64."""
    square = np.square(np.float64(decoded) - np.float64(w)) * importance[:, None]
    return square.reshape(-1, block_size, w.shape[-1]).sum(1)


def least_errors(w, fmt, block_size, importance):
    """The least error of each block over a fine grid of scales that can be stored."""
    blocks = np.float64(w).reshape(-1, block_size, w.shape[-1])
    weights = importance.reshape(-1, block_size, 1)
    table = np.unique(TABLES[fmt].astype(np.float64))
    midpoints = (table[1:] + table[:-1]) / 2
    largest = np.abs(blocks).max(1)
    unit = largest / np.abs(table).max()
    least = np.full(largest.shape, np.inf)
    ratios = np.linspace(0.4, 1.9, 400)
    if table[0] == -8:  # scales may be negative
        ratios = np.concatenate([ratios, -ratios])
    for scale in unit * ratios[:, None, None]:
        if fmt in ("int4_f16", "q4_0"):
            scale = np.float64(np.float16(scale))
        if fmt == "mxfp4":
            scale = 2.0 ** np.round(np.log2(scale))
        if fmt == "nvfp4":
            divisor = 448 / unit.max()
            stored = np.minimum(scale * divisor, 448).astype(ml_dtypes.float8_e4m3fn)
            scale = np.float64(stored) / divisor
        values = table[np.searchsorted(midpoints, blocks / scale[:, None])]
        error = np.square(values * scale[:, None] - blocks) * weights
        least = np.minimum(least, error.sum(1))
    return least


@pytest.mark.parametrize("is_weighted", fast_and_slow([True], [False]))
@pytest.mark.parametrize("fmt, block_size", CASES)
def test_the_error_is_close_to_the_least(fmt, block_size, is_weighted):
    w, importance = np.asarray(normal(0, (K, N))), np.ones(K)
    if is_weighted:
        importance = np.exp(np.random.default_rng(1).normal(size=K))
    weights = importance if is_weighted else None
    searched = pack(w, fmt, block_size, weights)
    plain = pack(w, fmt, block_size, scales="absmax")
    # The files have the same arrays, and the decoder is that of the format.
    assert jax.tree.structure(searched) == jax.tree.structure(plain)
    assert_same(np.asarray(searched.dequantize()), dequantize(searched))
    ours, absmax = (
        block_errors(dequantize(q), w, block_size, importance)
        for q in (searched, plain)
    )
    least = least_errors(w, fmt, block_size, importance)
    # Errors are measured in float32; in int8 they are 1/20,000 of the weights' squares.
    assert np.all(ours <= absmax * (1 + 1e-3))
    gain = (absmax - ours).sum() / (absmax - least).sum()
    assert gain > (0.5 if fmt == "int8" else 0.9)
    if fmt != "int8":
        assert ours.sum() < (1.03 if is_weighted else 1.01) * least.sum()


@pytest.mark.parametrize("fmt, block_size", CASES)
def test_blocks_without_a_best_scale_keep_the_rule(fmt, block_size):
    w = np.array(normal(0, (2 * block_size, 3)))
    w[:, 0] = 0
    w[3, 1] = np.nan
    w[:, 2] *= 1e-42  # flushed to zero

    def stored_scales(rule):
        return np.asarray(
            jax.jit(lambda w: pack(w, fmt, block_size, scales=rule).scales)(w)
        )

    got, want = stored_scales("search"), stored_scales("absmax")
    assert_same_bits(got[:, 0], want[:, 0])
    assert_same_bits(got[0], want[0])


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_the_search_does_not_depend_on_the_unit_of_the_weights(scale):
    w = normal(0, (K, N))
    plain, scaled = (pack(x, "nf4", 64) for x in (w, w * np.float32(scale)))
    assert_same(scaled.codes, plain.codes)
    assert_same(scaled.scales, plain.scales * np.float32(scale))


@pytest.mark.parametrize("fmt", ["nf4", "int4", "int4_f16"])
def test_one_important_weight_of_a_block_is_exact(fmt):
    w, importance = np.asarray(normal(0, (128, N))), np.zeros(128)
    importance[5] = 3.0
    got = np.asarray(pack(w, fmt, 128, importance).dequantize())
    eps = np.finfo(np.float16 if fmt == "int4_f16" else np.float32).eps
    is_exact = np.abs(got[5] - w[5]) <= eps * np.abs(w[5])
    assert np.all(is_exact | (got[5] == 0))  # small weights may become 0
    assert is_exact.mean() > 0.7
    # Where all weights of a block count nothing, they count the same.
    zeros, ones = (pack(w, "nf4", 64, np.full(128, x)) for x in (0.0, 2.0))
    assert_same(zeros, ones)


def test_rows_beyond_the_last_full_block_are_searched():
    w, importance = normal(0, (101, N)), np.exp(normal(1, (101,)))
    errors = {}
    for rule in ("absmax", "search"):
        q = pack(w, "nf4", 64, importance if rule == "search" else None, rule)
        square = np.square(np.asarray(q.dequantize() - w))
        errors[rule] = np.sum(importance[64:, None] * square[64:])
    assert errors["search"] < 0.9 * errors["absmax"]


def test_the_last_row_of_an_odd_number_counts():
    w, importance = normal(0, (101, N)), np.zeros(101)
    importance[100] = 1

    def error_of_last_row(q):
        return np.linalg.norm(np.asarray(q.dequantize() - w)[100])

    searched = pack(w, "int8", 64, importance, "search")
    assert error_of_last_row(searched) < 0.2 * error_of_last_row(
        pack(w, "int8", 64, None, "absmax")
    )


@pytest.mark.parametrize("fmt", ["nf4", "int4"])
def test_double_quantization_stores_searched_scales(fmt):
    w = normal(0, (512, N))

    def error(double_quant, rule):
        q = ql.quantize(w, fmt, double_quant=double_quant, scales=rule)
        return relative_error(q.dequantize(), w)

    assert error(True, "search") < 1.01 * error(False, "search")
    assert error(True, "search") < 0.95 * error(True, "absmax")


@pytest.mark.newest
@pytest.mark.parametrize(
    "fmt, block_size", [("nf4", 64), ("int4_f16", 128), ("nvfp4", 16)]
)
def test_parts_stacks_axes_and_meshes_give_the_same_weights(
    fmt, block_size, monkeypatch
):
    w = np.asarray(normal(0, (2, 512, N)))
    importance = np.exp(np.random.default_rng(1).normal(size=(2, 512)))

    def search_scales(w, importance, **settings):
        settings |= {"double_quant": False, "scales": "search"}
        return ql.quantize(w, fmt, importance=importance, **settings)

    pairs = zip(w, importance, strict=True)
    want = np.stack([search_scales(*pair).dequantize() for pair in pairs])

    def check(q):
        # Programs add in another order, which may change the last bits of a scale.
        assert relative_error(q.dequantize(), want) < rounding(block_size)

    check(search_scales(w, importance, contract="bkn"))
    check(jax.jit(jax.vmap(search_scales))(w, importance))
    turned = search_scales(np.swapaxes(w, 1, 2), importance, contract="bnk")
    turned_weights = np.swapaxes(turned.dequantize(), 1, 2)
    assert relative_error(turned_weights, want) < rounding(block_size)
    for kind in ("Auto", "Explicit"):
        mesh = make_mesh(kind)
        with jax.set_mesh(mesh):
            split = spread(w, mesh, None, "a", "b")
            check(search_scales(split, importance, contract="bkn"))
    monkeypatch.setattr(search, "PART_BYTES", 2**12)
    jax.clear_caches()
    check(search_scales(w, importance, contract="bkn"))


@pytest.mark.newest
def test_trees_and_adapters_are_packed_by_the_rule_of_the_config():
    up, out = normal(0, (128, 8)), normal(1, (4, 32, 8))
    params = {"up": {"kernel": up, "bias": jnp.zeros(8)}, "out": {"kernel": out}}
    contract = {"out/.*": (-3, -2)}
    config = ql.QLoRAConfig(rank=4, scales="search", contract=contract)
    base, lora = ql.init(jax.random.key(0), params, config)
    assert_same(base["up"]["kernel"], ql.quantize(up, scales="search"))
    moments = np.exp(normal(2, (128,)))
    importance = {name: {"kernel": moments} for name in params}
    packed = ql.quantize(params, config, importance=importance)["out"]["kernel"]
    settings = {"scales": "search", "importance": moments}
    assert_same(packed, ql.quantize(out, contract=(-3, -2), **settings))
    # A config with another rule is another config.
    assert config != ql.QLoRAConfig(rank=4, contract=contract)
    # Merge-aware adapters are trained on the weights that the search packs.
    settings = {"merge_aware": True, "target_fmt": "q4_0", "fmt": None}
    config = ql.QLoRAConfig(scales="search", **settings)
    base, lora = ql.init(jax.random.key(0), {"kernel": up}, config)
    packed = ql.merge(base, lora, requantize=True)["kernel"]
    assert_same(packed, ql.quantize(up, "q4_0", scales="search"))


def test_importance_that_does_not_fit_is_refused():
    params = {name: jnp.ones((64, 8)) for name in "abcd"}
    config = ql.QLoRAConfig(targets=".*", scales="search")
    importance = {"a": jnp.ones(64), "b": jnp.ones(8), "d": -jnp.ones(64)}
    importance["e"] = jnp.ones(64)
    refusal(
        lambda: ql.quantize(params, config, importance=importance),
        "`importance` does not fit these leaves:",
        "b: it must have shape (64,). Got (8,).",
        "c: it must have shape (64,). Got None.",
        "d: it must be finite and not negative.",
        "e: there is no such leaf.",
    )
    refusal(
        lambda: ql.quantize(params["a"], importance=jnp.ones(64)),
        "`scales` must be 'search' with `importance`. Got 'absmax'.",
    )
    with pytest.raises(TypeError, match="`importance` must be an array. Got dict."):
        ql.quantize(params["a"], scales="search", importance={"a": jnp.ones(64)})


def test_rules_that_would_be_ignored_are_refused():
    w = jnp.ones((64, 8))
    refusal(
        lambda: ql.quantize(w, scales="largest"),
        "`scales` must be 'absmax' or 'search'. Got 'largest'.",
    )
    refusal(
        lambda: ql.QLoRAConfig(scales="search", freeze_base=False),
        "`scales` must be 'absmax' where kernels stay in float",
    )
    config = ql.QLoRAConfig(freeze_base=False)
    base, _ = ql.init(jax.random.key(0), {"kernel": w}, config)
    refusal(
        lambda: ql.quantize(base, ql.QLoRAConfig(scales="search")),
        "kernel: it is trained with `scales` of 'absmax'; the config has 'search'.",
    )
    refusal(
        lambda: ql.quantize(base["kernel"], scales="search"),
        "`scales` must be 'absmax', without `importance`, for weights that were",
    )


@pytest.mark.parametrize("fmt", ["nf4", "nvfp4"])
def test_a_checkpoint_is_packed_by_search_as_it_is_read(fmt):
    w = np.asarray(normal(0, (N, K)))  # [out, in]
    like = {"up": {"kernel": jax.ShapeDtypeStruct((K, N), jnp.float32)}}
    names = ql.io.Names({"up/kernel": "up.weight"})
    config = ql.QLoRAConfig(fmt=fmt, scales="search")
    loaded = ql.io.load({"up.weight": w}, names, like, config)["up"]["kernel"]
    assert_same(loaded, ql.quantize(w.T, fmt, scales="search"))
