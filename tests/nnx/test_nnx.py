"""`ql.nnx` against the float model on dequantized or merged weights, and NumPy."""

import copy
import dataclasses
import functools
import pickle
import subprocess
import sys
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qlora_jax as ql
from qlora_jax.nnx.rules import RULES
from qlora_jax.trees.paths import leaves_by_path


class OwnEinsum(nnx.Module):
    """As in google-tunix: reads `self.w` itself."""

    def __init__(self, equation: str, shape: tuple[int, ...], *, rngs: nnx.Rngs):
        self.equation = equation
        self.w = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class Registered(OwnEinsum):
    pass


class MLP(nnx.Module):
    def __init__(self, dim: int = 32, hidden: int = 48, *, rngs: nnx.Rngs, **kwargs):
        self.gate_proj = nnx.Linear(dim, hidden, rngs=rngs, **kwargs)
        self.up_proj = nnx.Linear(dim, hidden, rngs=rngs, **kwargs)
        self.down_proj = nnx.Linear(hidden, dim, rngs=rngs, **kwargs)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, dim: int = 32, *, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.mlp = MLP(dim, rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class Attending(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 32, decode=False, rngs=rngs)
        self.mlp = MLP(rngs=rngs)

    def __call__(self, x):
        return self.mlp(x + self.attention(x))


class OwnBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.proj = OwnEinsum("BD,DF->BF", (32, 32), rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.proj(x))


def make_stack(depth: int, make: Any = Block, out_axes: int = 0) -> Any:
    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=out_axes)
    def create(rngs):
        return make(rngs=rngs)

    return create(nnx.Rngs(0))


def scan_stack(stack, x, remat=False):
    def body(block, x):
        return block(x)

    body = nnx.remat(body) if remat else body
    return nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(stack, x)


CONFIG = ql.QLoRAConfig(rank=4, alpha=8)


def wrap(model, config=CONFIG, *args, **kwargs) -> Any:
    return ql.nnx.wrap(model, config, *args, rngs=nnx.Rngs(1), **kwargs)


def normal(seed, *shape, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def randomize_b(model, seed=7):
    """Moves the adapters away from B = 0."""
    state = nnx.state(model, nnx.LoRAParam)
    leaves, treedef = jax.tree.flatten(state)
    leaves = [
        0.1 * normal(seed + i, *x.shape, dtype=x.dtype) for i, x in enumerate(leaves)
    ]
    nnx.update(model, jax.tree.unflatten(treedef, leaves))
    return model


def biased(model, seed=11):
    """Moves the biases away from zero."""
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[-1] == "bias":
            variable.set_value(normal(seed, *variable.shape, dtype=variable.dtype))
    return model


def on_dequantized(model, wrapped):
    """The float model with each packed kernel's dequantized values in its place."""
    reference = nnx.clone(model)
    floats = dict(nnx.to_flat_state(nnx.state(reference)))
    for path, variable in nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed)):
        floats[path].set_value(ql.dequantize(variable.get_value()))
    nnx.update(reference, nnx.from_flat_state(list(floats.items())))
    return reference


def temporary_bytes(jitted, *args):
    analysis = jitted.lower(*args).compile().memory_analysis()
    return cast(Any, analysis).temp_size_in_bytes


def assert_close(x, y, tolerance=1e-5):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y), np.abs(x - y).max()


MAKERS: dict[str, Any] = {
    "linear": lambda **how: nnx.Linear(64, 24, **how),
    "general": lambda **how: nnx.LinearGeneral(64, (3, 8), **how),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_sums_are_kept_in_the_element_type_that_is_preferred(name):
    """float32 out of bfloat16 operands, without a rounding in between."""
    layer = MAKERS[name](
        dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)
    )
    wrapped = randomize_b(wrap(biased(layer)))
    assert wrapped.kernel_lora.a.shape == (64, 4)
    x = normal(1, 3, 64)
    expected = ql.nnx.merge(wrapped)(x)
    assert wrapped(x).dtype == expected.dtype == jnp.float32
    assert_close(wrapped(x), expected)


@pytest.mark.slow
def test_attention_that_normalizes_queries_and_keys():
    model = nnx.MultiHeadAttention(
        4, 32, decode=False, normalize_qk=True, rngs=nnx.Rngs(0)
    )
    wrapped = wrap(biased(model))
    x = normal(1, 2, 6, 32)
    assert_close(wrapped(x), on_dequantized(model, wrapped)(x))
    adapters = [p for p, _ in nnx.to_flat_state(nnx.state(wrapped, nnx.LoRAParam))]
    assert len(adapters) == 8
    randomize_b(wrapped)
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))


@pytest.mark.slow
def test_attention_with_a_cache_decodes_as_the_merged_model_does():
    model = nnx.MultiHeadAttention(4, 32, decode=True, rngs=nnx.Rngs(0))
    x = normal(1, 2, 5, 32)
    model.init_cache(x.shape)
    wrapped = randomize_b(wrap(biased(model)))
    merged = ql.nnx.merge(wrapped)
    for step in jnp.split(x, 5, axis=1):
        assert_close(wrapped(step), merged(step))


@pytest.mark.slow
def test_scan_by_filters_names_the_packed_variables():
    wrapped = wrap(make_stack(3))
    x = normal(1, 2, 32)

    def run(axes):
        scan = nnx.scan(
            lambda block, x: block(x), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry
        )
        return scan(wrapped, x)

    axes = nnx.StateAxes({(nnx.Param, ql.nnx.Packed): 0, ...: None})
    assert_close(run(axes), scan_stack(wrapped, x))
    with pytest.raises(ValueError, match=r"ql.nnx.Packed"):
        run(nnx.StateAxes({nnx.Param: 0, ...: None}))


@pytest.mark.slow
def test_scanned_stack_keeps_no_float_kernels_for_the_backward_pass():
    depth, dim = 8, 128
    stack = make_stack(depth, functools.partial(Block, dim))
    wrapped = wrap(stack)
    x = normal(1, 1, dim)  # activations are kept as well

    def temporaries(model):
        graphdef, train, rest = nnx.split(model, nnx.LoRAParam, ...)

        def loss(train, rest, x):
            rest = jax.tree.map(lambda v: v, rest)  # variables of this trace
            model = nnx.merge(graphdef, train, rest)
            return jnp.sum(scan_stack(model, x) ** 2)

        grad = jax.jit(jax.grad(loss, argnums=(0, 2)))
        return temporary_bytes(grad, train, rest, x)

    def autodiff_loss(x):
        mlp = wrapped.mlp
        kernels = [
            p.kernel.get_value() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        ]

        def layer(x, kernels):
            gate, up, down = map(ql.dequantize, kernels)
            return x + (nnx.silu(x @ gate) * (x @ up)) @ down, None

        return jnp.sum(jax.lax.scan(layer, x, kernels)[0] ** 2)

    floats = 4 * depth * 3 * dim * 48
    assert temporary_bytes(jax.jit(jax.grad(autodiff_loss)), x) >= floats
    assert temporaries(wrapped) < floats / 4


@pytest.mark.slow
def test_state_holds_packed_and_lora_variables_and_no_other():
    wrapped = wrap(Attending(rngs=nnx.Rngs(0)))
    graphdef, lora, packed, rest = nnx.split(wrapped, nnx.LoRAParam, ql.nnx.Packed, ...)
    assert len(nnx.to_flat_state(lora)) == 14
    assert len(nnx.to_flat_state(packed)) == 7
    assert {path[-1] for path, _ in nnx.to_flat_state(rest)} == {"bias"}
    assert not set(nnx.to_flat_state(nnx.state(wrapped, nnx.Param)).paths) & set(
        nnx.to_flat_state(packed).paths
    )
    again = nnx.merge(graphdef, lora, packed, rest)
    x = normal(1, 1, 5, 32)
    np.testing.assert_array_equal(again(x), wrapped(x))
    clone = nnx.clone(wrapped)
    np.testing.assert_array_equal(clone(x), wrapped(x))


@pytest.mark.slow
def test_optimizer_trains_the_adapter_and_leaves_the_base_as_it_is():
    wrapped = wrap(Attending(rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(wrapped, optax.adamw(1e-2), wrt=nnx.LoRAParam)
    before = jax.tree.map(np.asarray, nnx.state(wrapped, nnx.Not(nnx.LoRAParam)))
    x, y = normal(1, 4, 4, 32), normal(2, 4, 4, 32)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)

        def loss(model):
            return jnp.mean((model(x) - y) ** 2)

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(wrapped, optimizer)) for _ in range(10)]
    assert losses[-1] < 0.8 * losses[0]
    assert len(traces) == 1
    after = nnx.state(wrapped, nnx.Not(nnx.LoRAParam))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after))
    held = sum(x.size for x in jax.tree.leaves(nnx.state(optimizer, nnx.OptState)))
    trained = sum(x.size for x in jax.tree.leaves(nnx.state(wrapped, nnx.LoRAParam)))
    assert held <= 2 * trained + 2


@pytest.mark.slow
def test_a_step_on_donated_arrays_is_that_on_kept_ones():
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean(model(x) ** 2)
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    x = normal(1, 16, 32)
    states = []
    for run in (step, nnx.jit(step, donate_argnums=(0, 1))):
        wrapped = randomize_b(wrap(MLP(rngs=nnx.Rngs(0))))
        optimizer = nnx.Optimizer(wrapped, optax.adamw(1e-2), wrt=nnx.LoRAParam)
        arrays = jax.tree.leaves(nnx.state(wrapped))
        run(wrapped, optimizer, x)
        states.append(nnx.state(wrapped))
    assert all(x.is_deleted() for x in arrays)
    jax.tree.map(assert_close, *states)


def test_wrap_leaves_the_model_alone_and_donate_converts_it_in_place():
    model = MLP(rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    wrapped = wrap(model)
    assert type(model.gate_proj) is nnx.Linear
    jax.tree.map(
        np.testing.assert_array_equal,
        before,
        jax.tree.map(np.asarray, nnx.state(model)),
    )
    kernels = [p.get_value() for p in (model.gate_proj.kernel, model.down_proj.kernel)]
    again = wrap(model, donate=True)
    assert again is model
    assert all(kernel.is_deleted() for kernel in kernels)
    x = normal(1, 5, 32)
    np.testing.assert_array_equal(model(x), wrapped(x))


def test_donate_refuses_an_array_that_another_variable_holds():
    model = MLP(rngs=nnx.Rngs(0))
    kernel = model.up_proj.kernel.get_value()
    model.average = nnx.Variable(kernel)
    with pytest.raises(ValueError, match="'average', 'up_proj/kernel'"):
        wrap(model, donate=True)
    assert type(model.gate_proj) is nnx.Linear
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.state(model)))


def test_merge_gives_the_plain_model_back():
    model = MLP(rngs=nnx.Rngs(0))
    merged = ql.nnx.merge(wrap(model))
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    assert type(merged.gate_proj) is nnx.Linear
    assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))
    assert not hasattr(merged.gate_proj, "kernel_lora")


def test_dropout_follows_train_and_eval():
    config = ql.QLoRAConfig(rank=4, dropout=0.5)
    wrapped = randomize_b(wrap(MLP(rngs=nnx.Rngs(0)), config))
    x = normal(1, 5, 32)
    assert not np.array_equal(wrapped(x), wrapped(x))
    wrapped.eval()
    np.testing.assert_array_equal(wrapped(x), wrapped(x))
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    wrapped.train()
    assert not np.array_equal(wrapped(x), wrapped(x))


@pytest.mark.slow
def test_dropout_in_a_scanned_stack_draws_its_own_mask_in_each_layer():
    config = ql.QLoRAConfig(rank=4, dropout=0.5)
    wrapped = randomize_b(wrap(make_stack(3), config))
    keys = jax.random.key_data(wrapped.mlp.gate_proj.kernel_lora.rngs.key[...])
    assert keys.shape[0] == 3 and len(np.unique(keys, axis=0)) == 3
    x = normal(1, 2, 32)
    assert not np.array_equal(scan_stack(wrapped, x), scan_stack(wrapped, x))
    wrapped.eval()
    np.testing.assert_array_equal(scan_stack(wrapped, x), scan_stack(wrapped, x))


class Odd(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(8, 8, rngs=rngs)
        self.tied = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.twin = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.twin.kernel = self.tied.kernel
        self.many = nnx.List([nnx.Param(jnp.ones((8, 8)))])
        self.unread = nnx.Dict(w=nnx.Param(jnp.ones((8, 8))))
        self.ints = nnx.Param(jnp.ones((8, 8), jnp.int32))
        self.gain = nnx.Einsum("btd,td->btd", (8, 8), rngs=rngs)

    def __call__(self, x):
        return self.proj(x) @ self.many[0][...] @ self.unread.w[...] + self.ints[...]


def test_leaves_that_cannot_be_targets_are_all_named_in_one_error():
    config = ql.QLoRAConfig(rank=4, targets=r".*")
    with pytest.raises(ValueError) as error:
        wrap(Odd(rngs=nnx.Rngs(0)), config)
    message = str(error.value)
    for name in ("proj/bias", "tied/kernel", "many/0", "unread/w", "ints", "gain"):
        assert name in message
    assert "proj/kernel" not in message


def test_biases_and_scales_of_a_stack_are_all_named_in_one_error():
    """They have two axes there, as a kernel has."""
    with pytest.raises(ValueError) as error:
        wrap(make_stack(3), ql.QLoRAConfig(rank=4, targets=r".*"))
    named = {line.split(":")[0].strip() for line in str(error.value).split("\n")[1:]}
    biases = {f"mlp/{name}_proj/bias" for name in ("gate", "up", "down")}
    assert named == {"norm/scale", "norm/bias", *biases}


class Kernels(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(16, 8, rngs=rngs)
        self.general = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.einsum = nnx.Einsum("bd,df->bf", (16, 8), rngs=rngs)
        self.conv = nnx.Conv(16, 8, (5,), rngs=rngs)
        self.embed = nnx.Embed(16, 8, rngs=rngs)


@pytest.mark.slow
def test_stacks_along_another_axis_than_the_first_are_refused_by_name():
    stack = make_stack(3, Kernels, out_axes=1)
    with pytest.raises(ValueError, match="axes of a stack must come before") as e:
        wrap(stack, ql.QLoRAConfig(rank=4, targets=r".*/(kernel|embedding)"))
    for name in ("linear", "general", "einsum", "conv", "embed"):
        assert f"  {name}/" in str(e.value)


@pytest.mark.slow
def test_a_scanned_stack_of_convolutions():
    wrapped = randomize_b(
        wrap(make_stack(2, lambda rngs: nnx.Conv(8, 8, (3,), rngs=rngs)))
    )
    assert wrapped.kernel_lora.a.shape == (2, 24, 4)
    x = normal(1, 2, 5, 8)
    assert_close(scan_stack(wrapped, x), scan_stack(ql.nnx.merge(wrapped), x))
    # Scalings of their own, as `load_peft` may give them: 3 and 1/2 times alpha / rank.
    base, lora = ql.nnx.split(wrapped)
    lora["kernel"] = dataclasses.replace(lora["kernel"], scaling=(6.0, 1.0))
    scaled = ql.nnx.join(wrapped, base, lora)
    b = wrapped.kernel_lora.b
    b.set_value(b[...] * jnp.array([3.0, 0.5])[:, None, None])
    assert_close(scan_stack(scaled, x), scan_stack(wrapped, x))
    assert_close(scan_stack(ql.nnx.merge(scaled), x), scan_stack(wrapped, x))
    again = ql.nnx.split(scaled)
    assert jax.tree.structure(again) == jax.tree.structure((base, lora))
    assert len(jax.tree.leaves(nnx.state(scaled, nnx.Param))) == 3  # with the bias


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(None, None), (0, None), (None, 0), (0, 0)])
def test_materialized_kernels_are_not_kept_for_the_backward_pass(axes):
    """Nor where vmap gives A, B or both one more axis."""
    layer = OwnEinsum("BD,DF->BF", (64, 96), rngs=nnx.Rngs(0))
    config = ql.QLoRAConfig(rank=4, targets="w")
    wrapped = randomize_b(wrap(layer, config))
    graphdef, lora, rest = nnx.split(wrapped, nnx.LoRAParam, ...)

    factors, treedef = jax.tree.flatten(lora)
    factors = [
        x if axis is None else jnp.stack([x, x])
        for x, axis in zip(factors, axes, strict=True)
    ]

    def run(factors, x):
        return nnx.merge(graphdef, jax.tree.unflatten(treedef, factors), rest)(x)

    run = jax.vmap(run, in_axes=(list(axes), 0))
    _, pullback = jax.vjp(run, factors, normal(1, 2, 3, 64))
    sizes = [x.size for x in jax.tree.leaves(pullback) if x.dtype != jnp.uint8]
    assert max(sizes) < 64 * 96


@pytest.mark.slow
@pytest.mark.parametrize(
    "equation", ["equation", "BTD,NDH->BTNH", lambda module: module.equation]
)
def test_registered_class_takes_the_fast_path(equation):
    ql.nnx.register(Registered, kernel="w", einsum=equation)
    layer = Registered("BTD,NDH->BTNH", (2, 32, 8), rngs=nnx.Rngs(0))
    config = ql.QLoRAConfig(rank=4, targets="w", dropout=0.5)
    wrapped = randomize_b(wrap(layer, config))
    x = normal(1, 2, 5, 32)
    assert not np.array_equal(wrapped(x), wrapped(x))
    wrapped.eval()
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    assert wrapped.w_lora.a.shape == (32, 4)
    graphdef, state = nnx.split(wrapped)
    jaxpr = str(jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s)(x))(state, x))
    assert "checkpoint" not in jaxpr and "remat" not in jaxpr


def test_register_checks_its_arguments():
    with pytest.raises(TypeError, match="nnx.Module"):
        ql.nnx.register(cast(Any, int), kernel="w", einsum="ab,bc->ac")
    with pytest.raises(ValueError, match="must be an explicit equation of two"):
        ql.nnx.register(OwnEinsum, kernel="w", einsum="ab,bc,cd->ad")
    with pytest.raises(ValueError, match="must contract the kernel. Got 'ab,bc->abc'"):
        ql.nnx.register(OwnEinsum, kernel="w", einsum="ab,bc->abc")


def test_a_packed_kernel_is_no_array():
    kernel = wrap(nnx.Linear(32, 8, rngs=nnx.Rngs(0))).kernel
    for read in (lambda: kernel[...], lambda: jnp.asarray(kernel)):
        with pytest.raises(TypeError, match="cannot be read as an array outside"):
            read()


@pytest.mark.slow
def test_a_model_that_is_wrapped_is_not_wrapped_again():
    wrapped = wrap(MLP(rngs=nnx.Rngs(0)), ql.QLoRAConfig(targets="up_proj/kernel"))
    match = r"`model` must not be wrapped already.*\['up_proj/kernel'\].*nnx.merge"
    with pytest.raises(ValueError, match=match):
        wrap(wrapped, ql.QLoRAConfig(targets="up_proj/kernel"))
    assert type(wrap(wrapped, ql.QLoRAConfig(targets="down.*/kernel")).down_proj) is (
        type(wrapped.up_proj)
    )
    plain = wrap(MLP(rngs=nnx.Rngs(0)), ql.QLoRAConfig(rank=4, fmt=None))
    match = "kernel: its module has adapters already, of kernel: .* wrapped before"
    with pytest.raises(ValueError, match=match):
        wrap(plain)


def test_a_wrong_input_names_the_layer():
    model = nnx.Sequential(nnx.Linear(64, 8, rngs=nnx.Rngs(0)))
    wrapped = wrap(model, ql.QLoRAConfig(rank=2))
    match = r"layers/0/kernel: `x` must have shape \(2, 64\) .* Got \(2, 33\)"
    with pytest.raises(ValueError, match=match):
        wrapped(jnp.ones((2, 33)))
    layer = ql.nnx.QLoRALinear(64, 8, rank=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="kernel: `x` must have shape"):
        layer(jnp.ones((2, 33)))


def test_custom_dot_general_is_still_called():
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(1)
        return jax.lax.dot_general(*args, **kwargs)

    layer = nnx.Linear(32, 8, dot_general=dot_general, rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(layer))
    x = normal(1, 3, 32)
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize("make", [Block, OwnBlock])
def test_nnx_vmap_over_wrapped_models(make):
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=r".*/(kernel|w)")
    wrapped = randomize_b(wrap(make_stack(3, make), config))
    x = normal(1, 2, 32)
    outputs = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(wrapped, x)
    graphdef, state = nnx.split(wrapped)
    one = nnx.merge(graphdef, jax.tree.map(lambda v: v[1], state))
    assert_close(outputs[1], one(x))


@pytest.mark.parametrize("fmt", ["nf4", "fp4", "int4", "int8"])
def test_drop_in_module(fmt):
    layer: Any = ql.nnx.QLoRALinear(
        64, 8, rank=4, alpha=2, fmt=fmt, block_size=32, double_quant=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    plain = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    q = layer.kernel.get_value()
    assert (q.fmt, q.block_size, q.double_quant) == (fmt, 32, False)
    np.testing.assert_array_equal(
        ql.dequantize(q),
        ql.dequantize(
            ql.quantize(plain.kernel[...], fmt, block_size=32, double_quant=False)
        ),
    )
    assert layer.kernel_lora.scaling == 0.5
    randomize_b(layer)
    x = normal(1, 3, 64)
    merged = ql.nnx.merge(layer)
    assert type(merged) is nnx.Linear
    assert_close(layer(x), merged(x))


@pytest.mark.slow
def test_options_of_the_drop_in_module():
    def make(**options) -> Any:
        return ql.nnx.QLoRALinear(64, 8, rank=4, alpha=8, rngs=nnx.Rngs(0), **options)

    layer = make(rank_stabilized=True, lora_dtype=jnp.bfloat16)
    assert layer.kernel_lora.scaling == 8 / 4**0.5
    assert layer.kernel_lora.a[...].dtype == jnp.bfloat16
    layer = make(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, precision="highest")
    assert layer.kernel.get_value().dtype == layer(jnp.ones((2, 64))).dtype
    layer = randomize_b(make(dropout=0.5))
    x = normal(1, 3, 64)
    assert not np.array_equal(layer(x), layer(x))
    layer.eval()
    assert_close(layer(x), ql.nnx.merge(layer)(x))
    for option in ("dot_general", "preferred_element_type"):
        with pytest.raises(ValueError, match=rf"supports. Got \['{option}'\]"):
            make(**{option: None})
    with pytest.raises(ValueError, match="`rank` must be a positive integer"):
        ql.nnx.QLoRALinear(64, 8, rank=0, rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_a_drop_in_module_that_trains_its_base():
    layer: Any = ql.nnx.QLoRALinear(64, 8, freeze_base=False, rngs=nnx.Rngs(0))
    assert type(layer.kernel) is nnx.Param
    x = normal(1, 3, 64)
    merged = ql.nnx.merge(layer)
    packed = ql.dequantize(ql.quantize(layer.kernel[...]))
    np.testing.assert_array_equal(merged.kernel[...], packed)
    loss = lambda model: jnp.sum(jnp.sin(model(x)))
    found, expected = nnx.grad(loss)(layer), nnx.grad(loss)(merged)
    for name in ("kernel", "bias"):
        assert_close(found[name].get_value(), expected[name].get_value())


@pytest.mark.slow
def test_drop_in_modules_in_a_scan_under_jit_grad_and_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return ql.nnx.QLoRALinear(32, 32, rank=4, rngs=rngs)

    stack = randomize_b(biased(create(nnx.Rngs(0))))
    assert stack.kernel.get_value().shape == (3, 32, 32)
    merged = ql.nnx.merge(stack)
    w, b = np.asarray(merged.kernel[...]), np.asarray(merged.bias[...])
    graphdef, state = nnx.split(stack)
    x = normal(1, 2, 5, 32)

    def loss(apply, x):
        return jnp.sum(jnp.sin(apply(x)))

    def floats(x):
        for i in range(3):
            x = x @ w[i] + b[i][None]
        return x

    def packed(x):
        own = jax.tree.map(lambda v: v, state)  # variables of this trace
        return scan_stack(nnx.merge(graphdef, own), x)

    got, want = (
        jax.jit(jax.vmap(jax.value_and_grad(lambda x, f=f: loss(f, x))))(x)
        for f in (packed, floats)
    )
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), got, want)


def test_split_gives_both_trees():
    wrapped = randomize_b(wrap(MLP(rngs=nnx.Rngs(0))))
    base, lora = ql.nnx.split(wrapped)
    assert set(base) == {"gate_proj", "up_proj", "down_proj"}
    assert "gate_proj" in str(ql.summary(base, lora))
    merged = ql.merge(base, lora)
    expected = ql.nnx.merge(wrapped)
    np.testing.assert_allclose(
        merged["gate_proj"]["kernel"], expected.gate_proj.kernel[...], rtol=1e-6
    )
    np.testing.assert_array_equal(merged["up_proj"]["bias"], expected.up_proj.bias[...])


def test_a_base_that_is_trained_stays_a_param():
    config = ql.QLoRAConfig(rank=4, targets=r"w", freeze_base=False)
    layer = OwnEinsum("BTD,NDH->BTNH", (2, 32, 8), rngs=nnx.Rngs(0))
    wrapped = wrap(layer, config)
    assert type(wrapped.w) is nnx.Param
    merged = ql.nnx.merge(wrapped)
    assert type(merged) is OwnEinsum and type(merged.w) is nnx.Param


class Stateful(nnx.Module):
    """Reads its kernel, counts its calls, draws from its stream, calls itself."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.w = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (32, 16)))
        self.count = nnx.Variable(jnp.array(0))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def project(self, x, name: str = "plain"):
        y = x @ self.w[...]
        return (y, name) if name == "plain" else y

    def __call__(self, x, rngs=None, *, deterministic: bool):
        self.count[...] += 1
        y, name = self.project(x)
        assert name == "plain" and isinstance(deterministic, bool)
        return self.dropout(y, deterministic=deterministic, rngs=rngs) @ self.w[...].T


@pytest.mark.slow
def test_materialized_methods_keep_state_flags_and_what_is_no_array():
    layer = Stateful(rngs=nnx.Rngs(0, dropout=3))
    wrapped = randomize_b(wrap(layer, ql.QLoRAConfig(rank=4, targets="w")))
    merged = ql.nnx.merge(wrapped)
    x = normal(1, 3, 32)
    for deterministic in (True, False, False):
        found = wrapped(x, deterministic=deterministic)
        assert_close(found, merged(x, deterministic=deterministic))
    found = wrapped(x, nnx.Rngs(dropout=5), deterministic=False)
    assert_close(found, merged(x, nnx.Rngs(dropout=5), deterministic=False))
    assert int(wrapped.count[...]) == 4
    assert wrapped.project(x)[1] == "plain"
    assert_close(wrapped.project(x, "other"), merged.project(x, "other"))


BY_PATH = {
    "linear": (lambda r: nnx.Linear(32, 16, rngs=r), "kernel"),
    "own_einsum": (lambda r: OwnEinsum("BD,DF->BF", (32, 16), rngs=r), "w"),
    "drop_in": (lambda r: ql.nnx.QLoRALinear(32, 16, rank=4, rngs=r), None),
}


def pickled(value):
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("name", BY_PATH)
@pytest.mark.parametrize("copied", [pickled, copy.deepcopy])
def test_wrapped_models_and_their_parts_are_copied(name, copied):
    make, target = BY_PATH[name]
    model = make(nnx.Rngs(0))
    if target is not None:
        model = wrap(model, ql.QLoRAConfig(rank=4, targets=target))
    randomize_b(model)
    x = normal(1, 2, 32)
    again = copied(model)
    assert type(again) is type(model)
    np.testing.assert_array_equal(again(x), model(x))
    graphdef, state = copied(nnx.split(model))
    assert graphdef == nnx.graphdef(model)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(x), model(x))


@pytest.mark.slow
def test_a_wrapped_model_is_unpickled_in_another_process(tmp_path):
    path, x = tmp_path / "model", np.ones((2, 32), np.float32)
    model = wrap(nnx.Linear(32, 16, rngs=nnx.Rngs(0)))
    path.write_bytes(pickle.dumps((model, x, np.asarray(model(x)))))
    code = (
        "import numpy, pathlib, pickle, sys\n"
        "model, x, y = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes())\n"
        "numpy.testing.assert_allclose(model(x), y, rtol=1e-6)\n"
        "assert type(model).__name__ == 'WrappedLinear'"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_a_class_that_is_not_registered_here_is_named_when_unpickled(monkeypatch):
    ql.nnx.register(Registered, kernel="w", einsum="equation")
    layer = Registered("BD,DF->BF", (32, 16), rngs=nnx.Rngs(0))
    data = pickle.dumps(wrap(layer, ql.QLoRAConfig(rank=4, targets="w")))
    monkeypatch.setattr(RULES, "_rules", {})  # as a process that registered nothing
    with pytest.raises(TypeError, match="`Registered` must be registered before it is"):
        pickle.loads(data)


def test_what_is_no_nnx_module_and_no_config_is_refused():
    with pytest.raises(TypeError, match="Got Dense. For a linen module, use ql.linen"):
        wrap(nn.Dense(8))
    with pytest.raises(TypeError, match="`config` must be a QLoRAConfig. Got dict."):
        wrap(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), cast(Any, {"rank": 4}))


@pytest.mark.parametrize("cls", [nnx.WeightNorm, nnx.SpectralNorm])
def test_kernels_that_a_wrapper_normalizes_are_refused_by_name(cls):
    model = cls(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    match = f"instance/kernel: it is inside a {cls.__name__}, which writes normalized"
    with pytest.raises(ValueError, match=match):
        wrap(model)


@pytest.mark.slow
@pytest.mark.parametrize("create", [nnx.eval_shape, lambda f: nnx.jit(f)()])
def test_a_model_of_an_outer_scope_is_wrapped_in_a_trace(create):
    model = MLP(rngs=nnx.Rngs(0))
    wrapped = create(lambda: wrap(model))
    expected = nnx.state(wrap(model))
    found = nnx.state(wrapped)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
    assert all(jax.tree.leaves(jax.tree.map(same, found, expected)))


@pytest.mark.slow
def test_an_abstract_wrapped_model_takes_a_restored_state():
    """The idiom of checkpoints: no weights are made for what is restored."""
    create = lambda: wrap(MLP(rngs=nnx.Rngs(0)))
    saved = randomize_b(create())
    abstract = nnx.eval_shape(create)
    graphdef, state = nnx.split(abstract)
    leaves = jax.tree.leaves(nnx.state(saved))
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    x = normal(1, 2, 32)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(x), saved(x))


class LinenBlock(nn.Module):
    """A Dense, a kernel that the module reads itself, and a variable that changes."""

    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", lambda: jnp.array(0))
        if self.is_mutable_collection("counts"):
            count.value += 1
        h = nn.Dense(48, name="up")(x)
        w = self.param("down", nn.initializers.normal(0.1), (48, 32))
        return x + nn.silu(h) @ w

    def twice(self, x):
        return self(self(x))


class Attends(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.scan(
            Attention,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )(name="layers")(x, None)[0]
        return nn.Dense(8, name="head")(x)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.MultiHeadDotProductAttention(2, name="attention")(x), None


class Bridged(nnx.Module):
    def __init__(self, linen: nn.Module, x: jax.Array, *, rngs: nnx.Rngs):
        self.proj = nnx.Linear(32, 32, rngs=rngs)
        self.linen = nnx.bridge.ToNNX(linen, rngs=rngs).lazy_init(x)

    def __call__(self, x):
        return self.linen(self.proj(x))


BRIDGED: dict[str, Any] = {
    "own": (LinenBlock(), (2, 32), r".*(kernel|down)", 3),
    "attention": (Attends(), (2, 5, 32), r".*kernel", 6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIDGED)
def test_linen_modules_inside_of_nnx_models(name):
    linen, shape, targets, count = BRIDGED[name]
    x = normal(1, *shape)
    model = Bridged(linen, x, rngs=nnx.Rngs(0))
    config = ql.QLoRAConfig(rank=2, alpha=4, block_size=16, targets=targets)
    sample = jax.ShapeDtypeStruct(x.shape, x.dtype)
    wrapped = randomize_b(wrap(model, config, sample))
    assert len(nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed))) == count
    merged = ql.nnx.merge(wrapped)
    assert nnx.graphdef(merged) == nnx.graphdef(model)
    base, lora = ql.nnx.split(wrapped)
    np.testing.assert_array_equal(
        ql.merge(base, lora)["proj"]["kernel"], merged.proj.kernel[...]
    )

    @nnx.jit
    def run(model, x):
        loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
        return nnx.value_and_grad(loss, argnums=(0, 1))(model, x)

    y, (grads, grad_x) = run(wrapped, x)
    expected, (grad_w, expected_x) = run(merged, x)
    assert_close(y, expected)
    assert_close(grad_x, expected_x)
    kernels = dict(nnx.to_flat_state(grad_w))
    adapters = leaves_by_path(lora)
    assert len(adapters) == count
    for path, adapter in adapters.items():
        *parents, kernel = path.split("/")
        g = np.asarray(kernels[*parents, kernel].get_value())
        g = np.asarray(adapter.geometry.to_matrix(g))
        found = dict(nnx.to_flat_state(grads))[*parents, f"{kernel}_lora", "a"]
        b = np.swapaxes(np.asarray(adapter.b), -1, -2)
        assert_close(found.get_value(), 2 * g @ b, 1e-4)


def make_bridged(**config):
    x = normal(1, 2, 32)
    config = {"rank": 2, "block_size": 16, "targets": r".*(kernel|down)", **config}
    model = Bridged(LinenBlock(), x, rngs=nnx.Rngs(0))
    return randomize_b(wrap(model, ql.QLoRAConfig(**config), x)), x


@pytest.mark.slow
def test_a_bridge_keeps_methods_and_variables_that_change():
    wrapped, x = make_bridged()
    merged = ql.nnx.merge(wrapped)
    assert_close(wrapped.linen.twice(x), merged.linen.twice(x))
    for _ in range(2):
        wrapped.linen(x, mutable=["counts"])
    assert int(wrapped.linen.calls[...]) == int(merged.linen.calls[...]) + 2
    assert_close(wrapped(x), merged(x))
    wrapped.linen(x, mutable=["params"])
    assert_close(wrapped(x), merged(x))


def assert_no_float_kernel_is_kept(wrapped, x):
    graphdef, state = nnx.split(wrapped)
    own = lambda: jax.tree.map(lambda v: v, state)  # variables of this trace
    _, pullback = jax.vjp(lambda x: nnx.merge(graphdef, own())(x), x)
    sizes = [x.size for x in jax.tree.leaves(pullback) if x.dtype != jnp.uint8]
    assert max(sizes) < 32 * 32


@pytest.mark.slow
def test_a_bridge_keeps_no_float_kernels_for_the_backward_pass():
    assert_no_float_kernel_is_kept(*make_bridged())


@pytest.mark.slow
def test_dropout_in_a_bridge_follows_train_and_eval():
    wrapped, x = make_bridged(dropout=0.5, targets="linen/up/kernel")
    assert not np.array_equal(wrapped(x), wrapped(x))
    wrapped.eval()
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    with pytest.raises(ValueError, match="linen/down: .*no dropout can act"):
        make_bridged(dropout=0.5)


@pytest.mark.slow
def test_kernels_of_linen_modules_need_a_sample_call_or_contract():
    x = normal(1, 2, 5, 32)
    model = Bridged(Attends(), x, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="query/kernel: .*which of its 4 axes"):
        wrap(model)
    config = ql.QLoRAConfig(
        rank=2,
        contract={".*/(query|key|value)/kernel": -3, ".*/out/kernel": (-3, -2)},
    )
    wrapped, traced = wrap(model, config), wrap(model, ql.QLoRAConfig(rank=2), x)
    assert jax.tree.structure(nnx.state(wrapped)) == (
        jax.tree.structure(nnx.state(traced))
    )
    assert_close(wrapped(x), traced(x))


@pytest.mark.slow
def test_a_bridge_is_copied():
    x = normal(1, 2, 5, 32)
    model = Bridged(Attends(), x, rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(model, ql.QLoRAConfig(rank=2), x))
    for copied in (pickled, copy.deepcopy, nnx.clone):
        np.testing.assert_array_equal(copied(wrapped)(x), wrapped(x))


class Layer(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.mlp = MLP(dim, rngs=rngs)

    def __call__(self, x):
        return x + self.mlp(x)


class Decoder(nn.Module):
    """A linen decoder of nnx layers, as MaxText builds one."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = nnx.bridge.to_linen(Layer, 32, name=f"layers_{i}")(x)
        return nn.Dense(8, name="head")(x)


@pytest.mark.slow
@pytest.mark.parametrize("has_sample", [False, True])
def test_nnx_layers_of_a_linen_decoder_in_an_nnx_model(has_sample):
    x = normal(1, 2, 32)
    model = Bridged(Decoder(), x, rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(model, CONFIG, *([x] if has_sample else [])))
    assert len(nnx.to_flat_state(nnx.state(wrapped, ql.nnx.Packed))) == 8
    merged = ql.nnx.merge(wrapped)
    assert_close(wrapped(x), merged(x))
    loss = lambda model, x: jnp.sum(jnp.sin(model(x)))
    grads, grad_w = nnx.grad(loss)(wrapped, x), nnx.grad(loss)(merged, x)
    path = ("linen", "layers_1", "mlp", "up_proj", "kernel")
    lora = leaves_by_path(ql.nnx.split(wrapped)[1])["/".join(path)]
    found = dict(nnx.to_flat_state(grads))[*path[:-1], "kernel_lora", "a"]
    g = np.asarray(dict(nnx.to_flat_state(grad_w))[path].get_value())
    assert_close(found.get_value(), 2 * g @ np.asarray(lora.b).T, 1e-4)
    assert_no_float_kernel_is_kept(wrapped, x)


class FeatureShapes(nnx.Module):
    """As MaxText's DenseGeneral has it."""

    def __init__(self, inputs, outputs, *, rngs: nnx.Rngs):
        self.in_features_shape, self.out_features_shape = inputs, outputs
        self.kernel = nnx.Param(rngs.params.normal((*inputs, *outputs)))

    def __call__(self, x):
        return jnp.tensordot(x, self.kernel[...], len(self.in_features_shape))


@pytest.mark.slow
def test_kinds_are_read_from_the_shapes_of_features():
    layer = FeatureShapes((2, 16), (8,), rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(layer))
    assert wrapped.kernel_lora.a.shape == (32, 4)
    x = normal(1, 3, 2, 16)
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    make = functools.partial(FeatureShapes, (16,), (2, 8))
    with pytest.raises(ValueError, match="before .*16, 2, 8.*param_scan_axis=0"):
        wrap(make_stack(3, make, out_axes=1))


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"freeze_base": False}, {"fmt": None}])
def test_a_bridge_runs_kernels_that_are_trained_or_in_float(how):
    wrapped, x = make_bridged(**how)
    merged = ql.nnx.merge(wrapped)
    loss = lambda model: jnp.sum(jnp.sin(model(x)))
    assert_close(loss(wrapped), loss(merged))
    grads = dict(nnx.to_flat_state(nnx.grad(loss)(wrapped)))
    expected = dict(nnx.to_flat_state(nnx.grad(loss)(merged)))
    for path in (("linen", "up", "kernel"), ("linen", "down")):
        assert_close(grads[path].get_value(), expected[path].get_value())


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        lambda rngs: nnx.Linear(32, 24, rngs=rngs),
        lambda rngs: OwnEinsum("BTD,NDH->BTNH", (2, 32, 8), rngs=rngs),
    ],
    ids=["linear", "own_einsum"],
)
def test_wrapped_models_run_without_jit(make):
    config = ql.QLoRAConfig(rank=4, alpha=8, targets=r"kernel|w")
    model = randomize_b(wrap(make(nnx.Rngs(0)), config))
    x = normal(1, 2, 5, 32)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    grad = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))), argnums=wrt)
    y, grads = model(x), grad(model)
    with jax.disable_jit():
        assert_close(model(x), y)
        jax.tree.map(assert_close, grad(model), grads)
