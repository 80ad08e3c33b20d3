"""One contract for both Flax integrations: settings, registration, layers, errors."""

import dataclasses
import functools
import types

import flax.linen as nn
import integration_models as models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import fast_and_slow, randomized
from integration_helpers import (
    CONFIG,
    DROPOUT,
    INTEGRATIONS,
    build,
    leaves_at,
    make_x,
    refused,
)
from integration_pairs import PAIRS, SEQUENCE, Pair
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.trees.paths import leaves_by_path

pytestmark = pytest.mark.parametrize(
    "flax", INTEGRATIONS.values(), ids=list(INTEGRATIONS)
)


MODULES = {"linen": nn.Module, "nnx": nnx.Module}
KINDS = ["dense", "own", "general out", "attention", "mlp stack"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "general out", "einsum", "mlp", "mlp stack"])
def test_dropout_is_on_exactly_when_asked_for(flax, name):
    wrapped, lora, x = build(flax, name, DROPOUT)
    # The seed is traced: one program with dropout and one without.
    apply = jax.jit(functools.partial(wrapped.apply, base=wrapped.base, x=x))
    off, first = apply(lora), apply(lora, dropout=0)
    assert_close(off, wrapped.merged(lora, wrapped.base, x))
    assert not np.allclose(first, off)
    np.testing.assert_array_equal(apply(lora, dropout=0), first)
    assert not np.allclose(apply(lora, dropout=1), first)
    # Dropout acts on the adapters alone.
    assert_close(apply(wrapped.lora, dropout=0), apply(wrapped.lora), terms=64)


def masks_alone(flax, name):
    """Returns x, and the output with W = 0 and A = B = identity: the masked x."""
    x = make_x(PAIRS[name])
    config = ql.QLoRAConfig(rank=64, dropout=0.5, fmt=None)
    wrapped = flax.wrap(flax.make(PAIRS[name]), config, x)
    eye = jax.tree.map(lambda a: jnp.eye(*a.shape), wrapped.lora)
    zero = jax.tree.map(lambda a: a * 0 if a.dtype == jnp.float32 else a, wrapped.base)
    return np.asarray(x), np.asarray(wrapped.apply(eye, zero, x, dropout=3))


@pytest.mark.slow
def test_dropout_scales_what_it_keeps(flax):
    """Half of the entries are dropped, and the others doubled."""
    x, y = masks_alone(flax, "square")
    is_kept = y != 0
    assert_close(y[is_kept], 2 * x[is_kept], terms=64)
    assert 0.4 < is_kept.mean() < 0.6


@pytest.mark.slow
def test_each_kernel_draws_its_own_mask(flax):
    """1/8 passes gate, up and down. It would be 1/4 if two masks were equal."""
    _, y = masks_alone(flax, "mlp")
    assert 0.08 < (y != 0).mean() < 0.18


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "two kernels", "convolution", "own stack"])
def test_dropout_is_refused_by_name_where_a_module_reads_its_kernel(flax, name):
    pair = PAIRS[name]
    x = make_x(pair)
    with pytest.raises(ValueError, match="reads it itself") as error:
        flax.wrap(flax.make(pair), DROPOUT, x)
    assert refused(error) == set(pair.matrices)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_base_that_is_trained_gets_the_gradient_of_its_quantized_values(flax, name):
    config = dataclasses.replace(CONFIG, freeze_base=False, double_quant=False)
    wrapped, lora, x = build(flax, name, config)
    frozen, _, _ = build(flax, name, dataclasses.replace(config, freeze_base=True))

    def loss(apply):
        return lambda weights: jnp.sum(apply(weights, x) ** 2)

    def packed(base, x):
        return wrapped.apply(lora, base, x)

    merged = frozen.merge(lora, frozen.base)
    got, grads = jax.jit(jax.value_and_grad(loss(packed)))(wrapped.base)
    want, grad_w = jax.jit(jax.value_and_grad(loss(frozen.plain)))(merged)
    assert_close(got, want)
    paths = [
        *PAIRS[name].matrices,
        *(path for path in leaves_by_path(grad_w) if path.endswith("bias")),
    ]
    assert_close(leaves_at(grads, paths), leaves_at(grad_w, paths))
    # Packed again, the trained base has the values that the model computed with.
    base, _ = wrapped.trees(lora, wrapped.base)
    values, want = ql.dequantize(ql.quantize(base, config)), ql.dequantize(base)
    jax.tree.map(np.testing.assert_array_equal, values, want)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_plain_lora_on_a_float_base(flax, name):
    wrapped, lora, x = build(flax, name, dataclasses.replace(CONFIG, fmt=None))
    base, _ = wrapped.trees(lora, wrapped.base)
    plain = wrapped.merge(lora, wrapped.base)
    assert jax.tree.structure(base) == jax.tree.structure(plain)
    wrapped.check(lora, x)


@pytest.mark.parametrize(
    "name", fast_and_slow(["dense"], ["own", "attention", "mlp stack"])
)
def test_dora_has_the_values_and_gradients_of_the_merged_model(flax, name):
    wrapped, lora, x = build(flax, name, dataclasses.replace(CONFIG, use_dora=True))
    wrapped.check(lora, x)
    both = wrapped.lora, wrapped.base  # with B = 0
    assert_close(wrapped.apply(*both, x), wrapped.merged(*both, x))


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["fp4", "int4", "int8"])
def test_formats_and_settings_reach_every_kernel(flax, fmt):
    config = dataclasses.replace(
        CONFIG, fmt=fmt, block_size=32, double_quant=False, lora_dtype="bfloat16",
        rank_stabilized=True, rank_pattern={"up/.*": 2}, alpha_pattern={"up/.*": 16},
        exclude=("down/.*",),
    )  # fmt: skip
    pair = PAIRS["mlp"]
    x = make_x(pair)
    wrapped = flax.wrap(flax.make(pair), config, x)
    lora = randomized(wrapped.lora)
    base, adapters = wrapped.trees(lora, wrapped.base)
    assert set(adapters) == {"gate", "up"}
    assert base["down"]["kernel"].dtype == jnp.float32
    for name, rank, alpha in (("gate", 4, 8), ("up", 2, 16)):
        q, adapter = base[name]["kernel"], adapters[name]["kernel"]
        assert (q.fmt, q.block_size, q.double_quant) == (fmt, 32, False)
        assert adapter.a.dtype == adapter.b.dtype == jnp.bfloat16
        assert (adapter.rank, adapter.scaling) == (rank, alpha / rank**0.5)
    got = wrapped.apply(lora, wrapped.base, x)
    assert_close(got, wrapped.merged(lora, wrapped.base, x))


EQUATION = "btd,ndh->btnh"


def family(base):
    """A class to register, one that inherits from it, and one with its own call."""

    class Registered(base):
        pass

    class Inherits(Registered):
        pass

    class Overrides(Registered):
        def __call__(self, x):
            return 2 * super().__call__(x)

    return Registered, Inherits, Overrides


def pair_of(*classes):
    make = (functools.partial(cls, (2, 64, 8), EQUATION) for cls in classes)
    return Pair(*make, SEQUENCE, {"w": (64, 16)})


FAMILIES = {"linen": family(models.LinenOwn), "nnx": family(models.NNXOwn)}
REGISTERED, INHERITS, OVERRIDES = map(pair_of, *FAMILIES.values())
FORMS = [EQUATION, "equation", lambda module: module.equation]


@pytest.fixture(params=FORMS, ids=["text", "attribute", "function"])
def registered(flax, request):
    flax.register(FAMILIES[flax.name][0], kernel="w", einsum=request.param)


def remakes(wrapped, x):
    """Whether a float kernel is decoded; its module is then a `jax.checkpoint`."""
    jaxpr = str(jax.make_jaxpr(wrapped.apply)(wrapped.lora, wrapped.base, x))
    return "checkpoint" in jaxpr or "remat" in jaxpr


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("pair", [REGISTERED, INHERITS], ids=["itself", "subclass"])
def test_a_registered_class_takes_the_packed_product(flax, pair):
    x = make_x(pair)
    wrapped = flax.wrap(flax.make(pair), DROPOUT, x)
    wrapped_own, _, _ = build(flax, "own")
    assert remakes(wrapped_own, x) and not remakes(wrapped, x)
    base, _ = wrapped.trees(wrapped.lora, wrapped.base)
    assert base["w"].scales.shape == (64 // 16, 16)
    lora = randomized(wrapped.lora)
    wrapped.check(lora, x)
    low = x.astype(jnp.bfloat16)  # jnp.einsum promotes it
    got = wrapped.apply(lora, wrapped.base, low)
    assert_close(got, wrapped.merged(lora, wrapped.base, low))
    dropped = wrapped.apply(lora, wrapped.base, x, dropout=0)
    assert not np.allclose(dropped, wrapped.apply(lora, wrapped.base, x))


@pytest.mark.slow
@pytest.mark.usefixtures("registered")
def test_a_subclass_that_overrides_call_is_not_registered(flax):
    x = make_x(OVERRIDES)
    with pytest.raises(ValueError, match="w: .*reads it itself"):
        flax.wrap(flax.make(OVERRIDES), DROPOUT, x)
    wrapped = flax.wrap(flax.make(OVERRIDES), CONFIG, x)
    lora = randomized(wrapped.lora)
    assert_close(
        wrapped.apply(lora, wrapped.base, x), wrapped.merged(lora, wrapped.base, x)
    )


@pytest.mark.parametrize(
    ("cls", "equation", "error", "words"),
    [
        (3, "ab,bc->ac", TypeError, "`cls` must be an? .*odule class"),
        (int, "ab,bc->ac", TypeError, "`cls` must be an? .*odule class"),
        (None, 3, TypeError, "`einsum` must be a string, or a function .* Got 3"),
        (None, "ab,bc,cd->ad", ValueError, "must be an explicit equation of two"),
        (None, "ab,bc->abc", ValueError, "must contract the kernel. Got 'ab,bc->abc'"),
    ],
)
def test_register_checks_its_arguments(flax, cls, equation, error, words):
    with pytest.raises(error, match=words):
        flax.register(cls or FAMILIES[flax.name][2], kernel="w", einsum=equation)


def test_register_needs_a_call_and_names_that_are_strings(flax):
    cls = FAMILIES[flax.name][2]
    with pytest.raises(TypeError, match="`kernel` must be a string.* Got 3"):
        flax.register(cls, kernel=3, einsum="ab,bc->ac")
    without_call = types.new_class("WithoutCall", (MODULES[flax.name],))
    with pytest.raises(TypeError, match="have a `__call__`. Got WithoutCall"):
        flax.register(without_call, kernel="w", einsum="ab,bc->ac")


def test_register_refuses_a_call_of_two_inputs(flax):
    class TwoInputs(MODULES[flax.name]):
        def __call__(self, x, equation, scale, is_training=False):
            return scale * jnp.einsum(equation, x, self.w)

    with pytest.raises(TypeError, match=r"Got TwoInputs with .*'scale'"):
        flax.register(TwoInputs, kernel="w", einsum="equation")


def test_a_wrong_input_names_the_layer(flax):
    wrapped, lora, x = build(flax, "mlp")
    match = r"gate/kernel: `x` must have shape \(2, 5, 64\) .* Got \(2, 5, 33\)"
    with pytest.raises(ValueError, match=match):
        wrapped.apply(lora, wrapped.base, x[..., :33])


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"rank": 4}, TypeError, "`config` must be a QLoRAConfig. Got dict"),
        (ql.QLoRAConfig(targets=".*/q_proj/kernel"), ValueError,
         "`targets` must match .*(?s:.*)gate/kernel"),
    ],
)  # fmt: skip
def test_bad_configs_are_refused(flax, config, error, words):
    with pytest.raises(error, match=words):
        flax.wrap(flax.make(PAIRS["mlp"]), config, make_x(PAIRS["mlp"]))


@pytest.mark.parametrize("name", fast_and_slow(["mlp", "general"], ["attention stack"]))
def test_leaves_that_cannot_be_targets_are_all_named_in_one_error(flax, name):
    """Biases of heads and stacked biases have two axes, as kernels have."""
    wrapped, _, x = build(flax, name)
    base, _ = wrapped.trees(wrapped.lora, wrapped.base)
    with pytest.raises(ValueError, match="cannot be targets") as error:
        config = dataclasses.replace(CONFIG, targets=".*")
        flax.wrap(flax.make(PAIRS[name]), config, x)
    assert refused(error) == set(leaves_by_path(base)) - set(PAIRS[name].matrices)
