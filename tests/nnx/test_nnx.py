"""`ql.nnx` beyond the contract of both integrations: variables, graphs, classes."""

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import normal, randomized, refusal
from integration_helpers import CONFIG, DROPOUT
from integration_models import NNXMLP, NNXBlock, NNXOwn
from integration_pairs import PAIRS
from jax.sharding import AxisType
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.nnx.rules import RULES

OWN_MODEL = NNXOwn((64, 96), "btd,df->btf", rngs=nnx.Rngs(0))


def wrap(model, config=CONFIG, *args, **kwargs) -> Any:
    return ql.nnx.wrap(model, config, *args, rngs=nnx.Rngs(1), **kwargs)


def randomize_b(model):
    nnx.update(model, randomized(nnx.state(model, nnx.LoRAParam)))
    return model


def stack(make, length=3, out_axes=0) -> Any:
    create = nnx.vmap(lambda rngs: make(rngs=rngs), out_axes=out_axes)
    return nnx.split_rngs(splits=length)(create)(nnx.Rngs(0))


def scan(layers, x, axes=0):
    def run(layer, x):
        return layer(x)

    return nnx.scan(run, in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)(layers, x)


@pytest.fixture
def x():
    return normal(1, (2, 5, 64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "general"])
def test_sums_are_kept_in_the_element_type_that_is_preferred(name, x):
    """bfloat16 operands give a float32 result without a rounding in between."""
    dtypes = {"dtype": jnp.bfloat16, "preferred_element_type": jnp.float32}
    bias = nnx.initializers.normal()
    layer = PAIRS[name].nnx(**dtypes, bias_init=bias, rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(layer))
    want = ql.nnx.merge(wrapped)(x)
    assert want.dtype == jnp.float32
    assert_close(wrapped(x), want)


@pytest.mark.slow
def test_attention_with_a_cache_decodes_as_the_merged_model_does(x):
    model = nnx.MultiHeadAttention(4, 64, decode=True, rngs=nnx.Rngs(0))
    model.init_cache(x.shape)
    wrapped = randomize_b(wrap(model))
    merged = ql.nnx.merge(wrapped)
    for step in jnp.split(x, 5, axis=1):
        assert_close(wrapped(step), merged(step))


@pytest.mark.slow
def test_state_holds_packed_and_lora_variables_and_no_other(x):
    wrapped = wrap(NNXBlock(rngs=nnx.Rngs(0)))
    filters = nnx.LoRAParam, ql.nnx.Packed, ...
    graphdef, *states = nnx.split(wrapped, *filters)
    lora, packed, other_state = map(nnx.to_flat_state, states)
    assert (len(lora), len(packed)) == (14, 7)
    assert {path[-1] for path, _ in other_state} == {"bias", "scale"}
    params = nnx.to_flat_state(nnx.state(wrapped, nnx.Param))
    assert not set(params.paths) & set(packed.paths)
    np.testing.assert_array_equal(nnx.merge(graphdef, *states)(x), wrapped(x))
    np.testing.assert_array_equal(nnx.clone(wrapped)(x), wrapped(x))
    assert "gate" in str(ql.summary(*ql.nnx.split(wrapped)))


def test_a_packed_kernel_is_no_array():
    kernel = wrap(nnx.Linear(64, 24, rngs=nnx.Rngs(0))).kernel
    for read in (lambda: kernel[...], lambda: jnp.asarray(kernel)):
        with pytest.raises(TypeError, match="kernel: .* cannot be read as an array"):
            read()


@pytest.mark.slow
def test_a_step_on_donated_arrays_is_that_on_kept_ones(x):
    def step(model, optimizer, x):
        def loss(model):
            return jnp.mean(model(x) ** 2)

        grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)

    states = []
    for run in (step, nnx.jit(step, donate_argnums=(0, 1))):
        wrapped = randomize_b(wrap(NNXMLP(rngs=nnx.Rngs(0))))
        optimizer = nnx.Optimizer(wrapped, optax.adamw(1e-2), wrt=nnx.LoRAParam)
        arrays = jax.tree.leaves(nnx.state(wrapped))
        run(wrapped, optimizer, x)
        states.append(nnx.state(wrapped))
    assert all(x.is_deleted() for x in arrays)
    assert_close(*states)


def test_wrap_leaves_the_model_alone_and_donate_converts_it_in_place(x):
    model = NNXMLP(rngs=nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    wrapped = wrap(model)
    assert type(model.gate) is nnx.Linear
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))
    kernels = [param.get_value() for param in (model.gate.kernel, model.down.kernel)]
    assert wrap(model, donate=True) is model
    assert all(kernel.is_deleted() for kernel in kernels)
    np.testing.assert_array_equal(model(x), wrapped(x))


def test_donate_refuses_an_array_that_another_variable_holds():
    model: Any = NNXMLP(rngs=nnx.Rngs(0))
    model.average = nnx.Variable(model.up.kernel.get_value())
    with pytest.raises(ValueError, match="'average', 'up/kernel'"):
        wrap(model, donate=True)
    assert type(model.gate) is nnx.Linear
    assert not any(x.is_deleted() for x in jax.tree.leaves(nnx.state(model)))


def test_a_missing_stream_of_keys_is_named_before_a_kernel_is_donated():
    model, rngs = nnx.Linear(64, 8, rngs=nnx.Rngs(0)), nnx.Rngs(params=0)
    match = r"`rngs` must have the streams \['params', 'dropout'\].* Got \['params'\]"
    with pytest.raises(ValueError, match=match):
        ql.nnx.wrap(model, DROPOUT, rngs=rngs, donate=True)
    assert not model.kernel.get_value().is_deleted()


def test_a_base_that_is_trained_stays_a_param():
    wrapped = wrap(OWN_MODEL, dataclasses.replace(CONFIG, freeze_base=False))
    assert type(wrapped.w) is nnx.Param
    merged = ql.nnx.merge(wrapped)
    assert type(merged) is NNXOwn and type(merged.w) is nnx.Param


@pytest.mark.slow
def test_scan_by_filters_names_the_packed_variables(x):
    wrapped = wrap(stack(NNXMLP))
    axes = nnx.StateAxes({(nnx.Param, ql.nnx.Packed): 0, ...: None})
    assert_close(scan(wrapped, x, axes), scan(wrapped, x))
    with pytest.raises(ValueError, match=r"ql.nnx.Packed"):
        scan(wrapped, x, nnx.StateAxes({nnx.Param: 0, ...: None}))


@pytest.mark.slow
def test_dropout_in_a_scanned_stack_draws_its_own_mask_in_each_layer(x):
    wrapped = randomize_b(wrap(stack(NNXMLP), DROPOUT))
    keys = jax.random.key_data(wrapped.gate.kernel_lora.rngs.key[...])
    assert keys.shape[0] == 3 and len(np.unique(keys, axis=0)) == 3
    assert not np.array_equal(scan(wrapped, x), scan(wrapped, x))
    wrapped.eval()
    np.testing.assert_array_equal(scan(wrapped, x), scan(wrapped, x))


def test_the_dropout_rate_is_an_attribute_that_other_adapters_keep(x):
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(layer, ql.QLoRAConfig(rank=4, dropout=0.5)))
    base, _ = ql.nnx.split(wrapped)
    assert not np.array_equal(wrapped(x), wrapped(x))
    wrapped.set_attributes(rate=0.0)
    np.testing.assert_array_equal(wrapped(x), wrapped(x))
    # An adapter that replaces weights has no dropout rate.
    rows = {"kernel": ql.TrainedRows(jnp.ones((2, 8)), (3, 5))}
    joined = ql.nnx.join(wrap(layer, ql.QLoRAConfig(rank=4, dropout=0.5)), base, rows)
    assert_close(joined(x), ql.apply(base, rows, x))


class Sine(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(rngs.params.normal((64, 256)))

    def __call__(self, x):
        return jnp.sin(x @ self.kernel[...])


def test_residuals_of_a_module_that_reads_its_kernel_are_its_product_and_codes():
    """Neither float weights nor the equally large product of A and B are kept."""
    model = wrap(Sine(rngs=nnx.Rngs(0)), ql.QLoRAConfig(rank=4, targets="kernel"))
    graph, state = nnx.split(model)

    def run(x, state):
        return nnx.merge(graph, state, copy=True)(x)

    _, pull = jax.vjp(run, normal(1, (5, 64)), state)
    shapes = {a.shape for a in jax.tree.leaves(pull)}
    assert (5, 256) in shapes and (32, 256) in shapes and (64, 256) not in shapes


class Kernels(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.linear = nnx.Linear(16, 8, rngs=rngs)
        self.general = nnx.LinearGeneral(16, (2, 8), rngs=rngs)
        self.einsum = nnx.Einsum("bd,df->bf", (16, 8), rngs=rngs)
        self.conv = nnx.Conv(16, 8, (5,), rngs=rngs)


@pytest.mark.slow
def test_stacks_along_another_axis_than_the_first_are_refused_by_name():
    config = ql.QLoRAConfig(rank=4, targets=r".*/kernel")
    names = [f"  {name}/" for name in ("linear", "general", "einsum", "conv")]

    def run():
        return wrap(stack(Kernels, out_axes=1), config)

    refusal(run, "axes of a stack must come before", *names)


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
    names = "proj/bias", "tied/kernel", "many/0", "unread/w", "ints", "gain"

    def run():
        return wrap(
            Odd(rngs=nnx.Rngs(0)), ql.QLoRAConfig(rank=4, fmt=None, targets=r".*")
        )

    assert "proj/kernel" not in refusal(run, *names)


@pytest.mark.slow
def test_join_refuses_what_the_modules_would_not_read():
    """The module of a leaf that is trained in full reads an array, not a product."""
    model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)))
    options: Any = {"rank": 2, "fmt": None}
    in_full = ql.QLoRAConfig(
        targets="layers/0/kernel", trainable="layers/1/kernel", **options
    )
    wrapped = wrap(model, in_full), wrap(model, ql.QLoRAConfig(**options))
    (base, lora), (_, both_lora) = map(ql.nnx.split, wrapped)
    reason = "layers/1/kernel: its adapter must be a {}, as in the model. Got a {}."
    refusal(
        lambda: ql.nnx.join(wrapped[0], base, both_lora),
        reason.format("Trained", "LoRA"),
    )
    refusal(
        lambda: ql.nnx.join(wrapped[1], base, lora), reason.format("LoRA", "Trained")
    )


def test_join_names_leaves_of_a_wrong_type():
    layer = wrap(nnx.Linear(64, 8, use_bias=False, rngs=nnx.Rngs(0)), CONFIG)
    base, lora = ql.nnx.split(layer)
    array = {"kernel": jnp.ones((64, 8))}
    is_lora = "kernel: it must be a kernel or an array. Got LoRA."
    refusal(lambda: ql.nnx.join(layer, lora, base), is_lora, "adapter. Got QTensor.")
    refusal(lambda: ql.nnx.join(layer, base, array), "adapter. Got ArrayImpl.")


def test_a_model_that_is_wrapped_is_not_wrapped_again():
    up = ql.QLoRAConfig(targets="up/kernel")
    wrapped = wrap(NNXMLP(rngs=nnx.Rngs(0)), up)
    match = r"`model` must not be wrapped already.*\['up/kernel'\].*nnx.merge"
    with pytest.raises(ValueError, match=match):
        wrap(wrapped, up)
    both = wrap(wrapped, ql.QLoRAConfig(targets="down/kernel", block_size=32))
    assert type(both.down) is type(wrapped.up)
    plain = wrap(NNXMLP(rngs=nnx.Rngs(0)), ql.QLoRAConfig(rank=4, fmt=None))
    match = "kernel: its module has adapters already, of kernel: .* wrapped before"
    with pytest.raises(ValueError, match=match):
        wrap(plain)


class HoldsDict(nnx.Module):
    def __init__(self):
        self.w = nnx.Param({"a": jnp.ones((64, 8))})

    def __call__(self, x):
        return x @ self.w["a"]


def normalized(cls):
    return cls(nnx.Linear(32, 16, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: wrap(nn.Dense(8)), TypeError,
         "Got Dense. For a linen module, use ql.linen"),
        (lambda: ql.nnx.merge(nn.Dense(8)), TypeError, "nnx.Module. Got Dense"),
        (lambda: ql.nnx.split({}), TypeError, "nnx.Module. Got dict"),
        (lambda: ql.nnx.join(None, {}, {}), TypeError, "nnx.Module. Got NoneType"),
        (lambda: ql.nnx.place(5, jax.make_mesh((1,), ("a",))), TypeError,
         "nnx.Module. Got int"),
        (lambda: wrap(normalized(nnx.WeightNorm)), ValueError,
         "instance/kernel: it is inside a WeightNorm, which writes normalized"),
        (lambda: wrap(normalized(nnx.SpectralNorm)), ValueError,
         "instance/kernel: it is inside a SpectralNorm, which writes normalized"),
        (lambda: ql.nnx.wrap(OWN_MODEL, CONFIG, rngs=0), TypeError,
         "`rngs` must be an nnx.Rngs. Got int"),
        (lambda: wrap(OWN_MODEL, backend="tiled"), TypeError,
         r"must fit NNXOwn.__call__: .*'backend'. Got 0 .* \['backend'\]"),
        (lambda: wrap(HoldsDict(), ql.QLoRAConfig(targets="w")), ValueError,
         "w: weights must be a floating-point array.* Got dict"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_custom_dot_general_is_still_called(x):
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(1)
        return jax.lax.dot_general(*args, **kwargs)

    layer = nnx.Linear(64, 8, dot_general=dot_general, rngs=nnx.Rngs(0))
    wrapped = randomize_b(wrap(layer))
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))
    assert calls


class Stateful(nnx.Module):
    """Reads its kernel, counts its calls, draws from its stream, calls its methods."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.w = nnx.Param(nnx.initializers.normal(0.1)(rngs.params(), (64, 16)))
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
def test_materialized_methods_keep_state_flags_and_what_is_no_array(x):
    wrapped = randomize_b(wrap(Stateful(rngs=nnx.Rngs(0, dropout=3))))
    merged = ql.nnx.merge(wrapped)
    for deterministic in (True, False, False):
        y = wrapped(x, deterministic=deterministic)
        assert_close(y, merged(x, deterministic=deterministic))
    y = wrapped(x, nnx.Rngs(dropout=5), deterministic=False)
    assert_close(y, merged(x, nnx.Rngs(dropout=5), deterministic=False))
    assert int(wrapped.count[...]) == 4
    assert wrapped.project(x)[1] == "plain"
    assert_close(wrapped.project(x, "other"), merged.project(x, "other"))


class FeatureShapes(nnx.Module):
    """Stores its features as MaxText's DenseGeneral does."""

    def __init__(self, inputs, outputs, *, rngs: nnx.Rngs):
        self.in_features_shape, self.out_features_shape = inputs, outputs
        self.kernel = nnx.Param(rngs.params.normal((*inputs, *outputs)))

    def __call__(self, x):
        return jnp.tensordot(x, self.kernel[...], len(self.in_features_shape))


@pytest.mark.slow
def test_kinds_are_read_from_the_shapes_of_features():
    wrapped = randomize_b(wrap(FeatureShapes((2, 16), (8,), rngs=nnx.Rngs(0))))
    assert wrapped.kernel_lora.a.shape == (32, 4)
    x = normal(1, (3, 2, 16))
    assert_close(wrapped(x), ql.nnx.merge(wrapped)(x))

    def make_feature_shapes(rngs):
        return FeatureShapes((16,), (2, 8), rngs=rngs)

    with pytest.raises(ValueError, match="before .*16, 2, 8.*param_scan_axis=0"):
        wrap(stack(make_feature_shapes, out_axes=1))


class Argument(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.w = nnx.Param(rngs.params.normal((4, 64, 16)))

    def __call__(self, equation, x):
        return jnp.einsum(equation, x, self.w[...])


@pytest.mark.slow
def test_the_equation_of_a_registered_class_may_be_an_argument(x):
    ql.nnx.register(Argument, kernel=lambda module: "w", einsum="equation")
    config = dataclasses.replace(DROPOUT, contract={"w": "nkn"})
    wrapped = randomize_b(wrap(Argument(rngs=nnx.Rngs(0)), config))
    assert not np.array_equal(wrapped("btd,ndh->btnh", x), wrapped("btd,ndh->btnh", x))
    wrapped.eval()
    merged = ql.nnx.merge(wrapped)
    assert_close(wrapped("btd,ndh->btnh", x), merged("btd,ndh->btnh", x))
    with pytest.raises(ValueError, match="the kernel is stored with axes 'nkn'"):
        wrapped("bth,ndh->btnd", x[..., :16])


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


class Registered(NNXOwn):
    pass


def test_a_class_that_is_not_registered_here_is_named_when_unpickled(monkeypatch):
    ql.nnx.register(Registered, kernel="w", einsum="equation")
    layer = Registered((32, 16), "bd,df->bf", rngs=nnx.Rngs(0))
    data = pickle.dumps(wrap(layer))
    monkeypatch.setattr(RULES, "_rules", {})  # as in a process without registrations
    with pytest.raises(TypeError, match="`Registered` must be registered before it is"):
        pickle.loads(data)


@pytest.mark.slow
@pytest.mark.parametrize("create", [nnx.eval_shape, lambda f: nnx.jit(f)()])
def test_a_model_of_an_outer_scope_is_wrapped_in_a_trace(create):
    model = NNXMLP(rngs=nnx.Rngs(0))
    wrapped = create(lambda: wrap(model))
    state, want = nnx.state(wrapped), nnx.state(wrap(model))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, want)


@pytest.mark.slow
def test_an_abstract_wrapped_model_takes_a_restored_state(x):
    """The usual way to restore a checkpoint: no weights are made before it is read."""

    def create():
        return wrap(NNXMLP(rngs=nnx.Rngs(0)))

    saved = randomize_b(create())
    graphdef, state = nnx.split(nnx.eval_shape(create))
    leaves = jax.tree.leaves(nnx.state(saved))
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(x), saved(x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_abstract_wrapped_model_on_a_mesh_has_packed_kernels(kind):
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(kind, kind))
    config = dataclasses.replace(CONFIG, trainable=".*bias", dropout=0.5)

    def create():
        return wrap(nnx.Linear(64, 24, rngs=nnx.Rngs(0)), config)

    with jax.set_mesh(mesh):
        got, want = nnx.state(nnx.eval_shape(create)), nnx.state(create())
    assert jax.tree.structure(got) == jax.tree.structure(want)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.Param])
def test_the_optimizer_decides_what_a_gradient_without_diff_state_trains(wrt):
    model = randomize_b(wrap(NNXMLP(rngs=nnx.Rngs(0))))
    optimizer = nnx.Optimizer(model, optax.sgd(1.0), wrt=wrt)
    old, x = nnx.to_pure_dict(nnx.state(model, nnx.Param)), normal(1, (2, 5, 64))
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    optimizer.update(model, grads)
    new = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), old, new)
    leaves = jax.tree_util.tree_leaves_with_path(changed)
    others = [is_changed for path, is_changed in leaves if "_lora" not in str(path)]
    assert any(others) == (wrt is nnx.Param)
    assert all(is_changed for path, is_changed in leaves if "_lora" in str(path))
