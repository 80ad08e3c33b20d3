"""`ql.merge_adapters` against sums in NumPy. tests/interop compares with PEFT."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, refusal, relative_error, rounding, trees_of

import qlora_jax as ql

PARAMS = {"kernel": normal(0, (64, 48))}


def adapters(ranks=(4, 2), dropouts=(0.0, 0.0), dtypes=("float32", "float32")):
    settings = zip(ranks, dropouts, dtypes, strict=True)
    return [
        trees_of(PARAMS, rank=rank, alpha=3.0, dropout=dropout, lora_dtype=dtype)[1]
        for rank, dropout, dtype in settings
    ]


def delta(lora):
    lora = lora["kernel"]
    a, b = np.asarray(lora.a, np.float64), np.asarray(lora.b, np.float64)
    return lora.scaling * a @ b


@pytest.mark.parametrize("weights", [(0.5, -2.0), np.float32([0.5, -2]), (1, 3)])
def test_a_sum_of_adapters(weights):
    loras = adapters()
    want = sum(w * delta(lora) for w, lora in zip(weights, loras, strict=True))
    merged = ql.merge_adapters(loras, weights)
    assert merged["kernel"].rank == 6
    assert relative_error(delta(merged), want) < rounding(64)
    traced = jax.jit(lambda w: ql.merge_adapters(loras, [w[0], w[1]]))(
        jnp.asarray(weights, jnp.float32)
    )
    assert relative_error(delta(traced), want) < rounding(64)


@pytest.mark.parametrize("method", ["cat", "linear"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_dtype_holds_those_of_all(method, order):
    """The result does not depend on the order of the adapters."""
    pairs = [("bfloat16", "float32"), ("bfloat16", "float16"), ("bfloat16", "bfloat16")]
    for dtypes in pairs:
        loras = adapters((2, 2), dtypes=dtypes)
        merged = ql.merge_adapters([loras[i] for i in order], [1, 1], method=method)
        want = jnp.promote_types(*dtypes)
        assert {merged["kernel"].a.dtype, merged["kernel"].b.dtype} == {want}


def test_dropout_is_that_of_all():
    merged = ql.merge_adapters(adapters(dropouts=(0.1, 0.1)), [1, 1])
    assert merged["kernel"].dropout == 0.1


def test_what_cannot_be_merged_is_refused():
    two, with_dropout = adapters(), adapters(dropouts=(0.0, 0.1))
    wide = {"kernel": dataclasses.replace(two[0]["kernel"], b=jnp.ones((4, 8)))}
    for arguments, words in (
        (([], []), "Got 0 weights for 0 adapters"),
        ((two, [1]), "Got 1 weights for 2 adapters"),
        ((two, [1, math.nan]), "`weights` must be finite numbers. Got [1, nan]"),
        ((two, [1, jnp.inf]), "`weights` must be finite numbers"),
        ((two, [1e39, 1]), "`weights` must be finite numbers"),
        ((two, [1, True]), "`weights` must be finite numbers"),
        ((two, [1, "1"]), "`weights` must be finite numbers"),
        ((two, [1, None]), "`weights` must be finite numbers"),
        ((two, [1, [1]]), "`weights` must be finite numbers"),
        ((two, [1, 1], "mean"), "`method` must be one of"),
        ((with_dropout, [1, 1]), "kernel: dropout must be equal. Got [0.0, 0.1]."),
        (([two[0], wide], [1, 1]), "kernel: each must be of one kernel"),
        ((two, [1, 3e38]), "kernel: A and B must be finite. Got infinite"),
        ((two, [1, 1], "linear"), "ranks must be equal"),
    ):
        trees, weights, *method = arguments
        settings = dict(zip(("method",), method, strict=False))
        run = functools.partial(ql.merge_adapters, trees, weights, **settings)
        refusal(run, words)
    with pytest.raises(TypeError, match="`weights` must be a sequence .* Got 1.0"):
        ql.merge_adapters(two, 1.0)
    with pytest.raises(TypeError, match="a list of lora trees. Got generator"):
        ql.merge_adapters((lora for lora in two), [1, 1])


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_sums_that_overflow_their_dtype_are_refused(method):
    """The largest number of float16 is 65504."""
    (lora,) = adapters((4,), (0.0,), ("float16",))
    large = jax.tree.map(lambda x: jnp.full_like(x, 1000), lora)
    words = "kernel: A and B must be finite. Got infinite values in float16."
    refusal(lambda: ql.merge_adapters([large], [1e5], method=method), words)
    diverged = jax.tree.map(lambda x: x * jnp.nan, lora)
    merged = ql.merge_adapters([diverged], [1], method=method)["kernel"]
    assert np.isnan(merged.a).all()
