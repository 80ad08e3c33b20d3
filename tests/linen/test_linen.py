"""`ql.linen` beyond the contract of both integrations: collections, rngs, errors."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.errors import ScopeParamShapeError
from helpers import randomized
from integration_models import INIT, LinenMLP, LinenOwn, LinenTwoKernels
from linen_helpers import CONFIG, assert_as_merged, make_x, merged, setup, variables_of
from tolerances import assert_close

import qlora_jax as ql

KEY = jax.random.key(0)
OWN_MODEL = LinenOwn((64, 32), "btd,df->btf")
DROPOUT = ql.QLoRAConfig(rank=4, dropout=0.5)
LINEAR = nnx.bridge.to_linen(nnx.Linear, 64, 8)


class Project(nn.Module):
    """A layer that gets its equation as an argument of the call, as in `gemma`."""

    shape: tuple
    weight_name: str = "w"

    @nn.compact
    def __call__(self, equation, x):
        w = self.param(self.weight_name, INIT, self.shape)
        return jnp.einsum(equation, x, w)


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Project((4, 64, 16), name="heads")("BTD,NDH->BTNH", x)


def test_the_equation_of_a_registered_class_may_be_an_argument(x):
    def get_weight_name(module):
        return module.weight_name

    ql.linen.register(Project, kernel=get_weight_name, einsum="equation")
    config = ql.QLoRAConfig(rank=2, targets=".*/w", block_size=16, dropout=0.1)
    variables = variables_of(Heads(), x, config)
    assert variables["params"]["heads"]["w"].scales.shape == (64 // 16, 4 * 16)
    assert_as_merged(Heads(), x, variables, gradients=False)


def test_one_tree_has_the_gradients_of_two(x):
    """tests/optim/test_optim.py has optimizers on one tree."""
    wrapped = ql.linen.wrap(LinenMLP())
    _, base, lora = setup(LinenMLP(), x)

    def loss(params):
        return jnp.mean((wrapped.apply({"params": params}, x) - x) ** 2)

    def loss_of_two(lora):
        return loss(ql.combine(base, lora))

    value, grads = jax.jit(ql.value_and_grad(loss))(ql.combine(base, lora))
    result = value, ql.split(grads)[1]
    assert_close(result, jax.jit(jax.value_and_grad(loss_of_two))(lora))


def test_without_adapters_it_is_the_model_on_dequantized_weights(x):
    _, base, _ = setup(OWN_MODEL, x, ql.QLoRAConfig(targets="w"))
    want = OWN_MODEL.apply({"params": ql.dequantize(base)}, x)
    assert_close(ql.linen.wrap(OWN_MODEL).apply({"params": base}, x), want)


@pytest.mark.slow
def test_other_collections_mutable_and_method_pass_through(x):
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(32)
            self.norm = nn.BatchNorm()

        def __call__(self, x, train=False):
            x = self.norm(self.project(x), use_running_average=not train)
            self.sow("intermediates", "normed", x)
            return x

        def project(self, x):
            return self.dense(x)

    model = Model()
    packed, wrapped = variables_of(model, x), ql.linen.wrap(model)
    for options in (
        {"train": True, "mutable": ["batch_stats", "intermediates"]},
        {"mutable": "intermediates"},
        {"method": "project"},
        {"method": Model.project},
    ):
        want = model.apply(merged(packed), x, **options)
        assert_close(wrapped.apply(packed, x, **options), want)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [(), "layers"])
def test_mutable_params_come_back_as_they_were_given(scanned, x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(64)(LinenTwoKernels(name="self_read")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, rngs = {"params": 0, "intermediates": 0}, {"params": True}
            layers = nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=2)
            x = layers(name="layers")(x, None)[0]
            self.sow("intermediates", "last", x)
            return x

    config = ql.QLoRAConfig(rank=4, targets=".*(kernel|gate|up)", block_size=32)
    variables = variables_of(Model(), x, config)
    wrapped = ql.linen.wrap(Model(), scanned=scanned)
    y, got = wrapped.apply(variables, x, mutable=True)
    assert set(got) == {"params", "lora", "intermediates"}
    assert_close({name: got[name] for name in variables}, variables)
    assert_close(wrapped.apply(got, x), y)
    combined = {"params": ql.combine(*variables.values())}
    assert_close(wrapped.apply(combined, x, mutable="params")[1], combined)


class Stateful(nn.Module):
    """Reads its kernel, counts its calls, draws from its stream, calls itself."""

    def setup(self):
        self.kernel = self.param("kernel", INIT, (64, 32))
        self.count = self.variable("counts", "calls", lambda: jnp.array(0))
        self.dropout = nn.Dropout(0.5)

    def width(self):
        return 32

    def project(self, x, name="plain"):
        return x @ self.kernel, name

    def __call__(self, x, head, *, deterministic):
        self.count.value += 1
        y, name = self.project(x)
        assert name == "plain"
        return head(self.dropout(y, deterministic=deterministic) @ self.kernel.T)


class Outside(nn.Module):
    """Needs Python values from what it calls, and passes it a module."""

    def setup(self):
        self.inside = Stateful()
        self.head = nn.Dense(8)

    def __call__(self, x, deterministic):
        y, name = self.inside.project(x, name="other")
        assert name == "other" and self.inside.width() == 32
        return y, self.inside(x, self.head, deterministic=deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_materialized_methods_keep_state_flags_and_what_is_no_array(deterministic, x):
    model, rngs = Outside(), {"dropout": jax.random.key(3)}
    variables = variables_of(model, x, CONFIG, True, mutable="counts")
    variables["counts"] = {"inside": {"calls": jnp.array(5)}}

    def call(apply, variables):
        return jax.jit(
            lambda v: apply(v, x, deterministic, rngs=rngs, mutable="counts")
        )(variables)

    got = call(ql.linen.wrap(model).apply, variables)
    assert_close(got, call(model.apply, merged(variables)))
    assert int(got[1]["counts"]["inside"]["calls"]) == 6


def test_arguments_that_are_not_arrays_stay_as_they_are(x):
    class Outer(nn.Module):
        @nn.compact
        def __call__(self, equation, x):
            return nn.Einsum((4, 64, 16), name="q")(x, equation)

    args = ("BTD,NDH->BTNH", x)
    params = Outer().init(KEY, *args)["params"]
    base, _ = ql.linen.init(KEY, Outer(), params, CONFIG, *args)
    got = ql.linen.wrap(Outer()).apply({"params": base}, *args)
    assert_close(got, Outer().apply({"params": ql.dequantize(base)}, *args))


@pytest.mark.slow
def test_shapes_in_place_of_parameters_give_shapes(x):
    params = LinenMLP().init(KEY, x)["params"]
    shapes = jax.eval_shape(lambda: params)

    def run(params):
        return ql.linen.init(KEY, LinenMLP(), params, CONFIG, x)

    got = jax.eval_shape(lambda: run(shapes))
    assert jax.tree.structure(got) == jax.tree.structure(run(params))


@pytest.mark.slow
def test_attention_with_a_cache_decodes_as_the_merged_model(x):
    model = nn.MultiHeadDotProductAttention(4, qkv_features=64, decode=True)
    variables = model.init(KEY, x)
    cache, tokens = variables["cache"], jnp.split(x, x.shape[1], axis=1)
    options = {"other_variables": {"cache": cache}, "mutable": "cache"}
    trees = ql.linen.init(KEY, model, variables["params"], CONFIG, tokens[0], **options)
    variables = {"params": trees[0], "lora": randomized(trees[1])}

    def decode(apply, variables):
        step = jax.jit(lambda *args: apply(*args, mutable="cache"))
        outputs, state = [], {"cache": cache}
        for token in tokens:
            y, state = step({**variables, **state}, token)
            outputs.append(y)
        return outputs, state

    got = decode(ql.linen.wrap(model).apply, variables)
    assert_close(got, decode(model.apply, merged(variables)))
    assert int(got[1]["cache"]["cache_index"]) == len(tokens)


def test_clones_are_wrapped_and_binding_is_refused(x):
    variables = variables_of(nn.Dense(8, name="old"), x)
    wrapped = ql.linen.wrap(nn.Dense(4), backend="reference")
    for clone in (wrapped.clone(features=8), wrapped.copy(features=8, name="new")):
        assert isinstance(clone, ql.linen.WrappedModel)
        assert (clone.features, clone.backend) == (8, ("reference",))
    assert_close(clone.apply(variables, x), nn.Dense(8).apply(merged(variables), x))
    with pytest.raises(AttributeError, match="no `bind`.*Use apply"):
        wrapped.bind(variables)


@pytest.mark.slow
def test_a_tree_that_is_packed_in_part_can_be_packed_further(x):
    model = LinenMLP()
    _, base, _ = setup(model, x, ql.QLoRAConfig(rank=4, targets="up/kernel"))
    packed = base["up"]["kernel"]

    config = ql.QLoRAConfig(fmt="int4", block_size=32, targets="(up|down)/kernel")
    both, lora = ql.linen.init(KEY, model, base, config, x)
    assert both["up"]["kernel"] is packed and both["down"]["kernel"].fmt == "int4"
    assert set(lora) == {"up", "down"}


@pytest.mark.slow
def test_a_wrapped_model_may_call_another(x):
    """Both models have a kernel at the path "w"."""
    inner_config = ql.QLoRAConfig(rank=4, block_size=16, targets="w")
    inner = variables_of(OWN_MODEL, x, inner_config)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, inner, params):
            w = self.param("w", INIT, (32, 16))
            return jnp.einsum("btd,df->btf", inner.apply(params, x), w)

    plain, packed = (OWN_MODEL, merged(inner)), (ql.linen.wrap(OWN_MODEL), inner)
    params = Outer().init(KEY, x, *plain)["params"]
    base, lora = ql.linen.init(KEY, Outer(), params, inner_config, x, *plain)
    variables = {"params": base, "lora": randomized(lora)}
    got = ql.linen.wrap(Outer()).apply(variables, x, *packed)
    assert_close(got, Outer().apply(merged(variables), x, *plain))


@pytest.mark.slow
def test_dropout_takes_the_keys_that_flax_takes(x):
    """`make_rng("dropout")` falls back to the "params" stream."""
    variables = variables_of(nn.Dense(8), x, DROPOUT)
    apply = ql.linen.wrap(nn.Dense(8)).apply
    key = jax.random.key(3)
    want = apply(variables, x)
    for rngs in (key, {"params": key}, {"dropout": key}):
        assert not np.allclose(apply(variables, x, rngs=rngs), want)
    np.testing.assert_array_equal(apply(variables, x, rngs={"other": key}), want)


@pytest.mark.slow
def test_dropout_is_refused_by_name_where_a_kernel_is_read_as_floats(x):
    """This is without `linen.init`, which would refuse dropout earlier."""
    model = LinenTwoKernels()
    params = model.init(KEY, x)["params"]
    config = ql.QLoRAConfig(rank=4, dropout=0.1, targets=".*")
    variables = dict(zip(("params", "lora"), ql.init(KEY, params, config), strict=True))

    def apply(**options):
        return ql.linen.wrap(model).apply(variables, x, **options)

    assert_close(apply(), model.apply(merged(variables), x))
    reason = ": .*reads it itself.*dropout=0.1"
    with pytest.raises(ValueError, match=f"(?s)gate{reason}.*up{reason}"):
        apply(rngs={"dropout": KEY})


def test_a_wrapped_model_is_wrapped_once(x):
    wrapped = ql.linen.wrap(nn.Dense(8))
    assert ql.linen.wrap(wrapped) is wrapped
    base, _ = ql.linen.init(KEY, wrapped, wrapped.init(KEY, x)["params"], CONFIG, x)
    assert base["kernel"].shape == (64, 8)


def applied(**renamed):
    variables = variables_of(nn.Dense(8), make_x())
    collections = {name: variables[old] for name, old in renamed.items()}
    return ql.linen.wrap(nn.Dense(8)).apply(collections, make_x())


NNX = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
USE_NNX = "must be a linen module. Got Linear, an nnx module. Use ql.nnx.wrap"
SUMS = {"preferred_element_type": jnp.float32}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: ql.linen.wrap(3), TypeError, "must be a linen module. Got int"),
        (lambda x: ql.linen.wrap(LinenMLP), TypeError,
         "Got the class LinenMLP. Pass an instance"),
        (lambda x: ql.linen.wrap(NNX), TypeError, USE_NNX),
        (lambda x: ql.linen.wrap(LinenMLP(), scanned=None), TypeError,
         "`scanned` must be a regular expression, or a list of them. Got None"),
        (lambda x: ql.linen.wrap(LinenMLP(), scanned="layers["), ValueError,
         r"`scanned` must be a regular expression. Got 'layers\['"),
        (lambda x: ql.linen.init(KEY, NNX, {}, CONFIG, x), TypeError, USE_NNX),
        (lambda x: applied(params="params", loras="lora"), ValueError,
         r"adapters in the collection 'lora'. Got adapters in \['loras'\]"),
        (lambda x: applied(parms="params", lora="lora"), ValueError,
         r"must have a collection 'params', the base tree. Got \['parms'\]"),
        (lambda x: setup(nn.Einsum((64, 8), "BTD,DN->BTN", **SUMS), x, DROPOUT),
         ValueError, "kernel: .*no dropout can act"),
        (lambda x: setup(LINEAR, x, DROPOUT), ValueError,
         "kernel: its module reads it itself"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, words, x):
    with pytest.raises(error, match=words):
        call(x)


class Refused(nn.Module):
    """Contracted in two ways, in none, or along a wrong axis; and an unused kernel."""

    @nn.compact
    def __call__(self, x):
        tied = nn.Einsum((64, 64), use_bias=False, name="tied")
        x = tied(tied(x, "btd,df->btf"), "btd,fd->btf")
        x = nn.Einsum((5, 64), "btd,td->btd", use_bias=False, name="gate")(x)
        axes, rngs = {"params": 1}, {"params": True}
        layers = nn.vmap(nn.Dense, variable_axes=axes, split_rngs=rngs, axis_size=2)
        return layers(64, name="mapped")(x)


def test_leaves_that_cannot_be_targets_are_all_named_in_one_error(x):
    params = dict(Refused().init(KEY, x)["params"])
    params["unused"] = {"kernel": jnp.ones((64, 8))}
    params["ints"] = {"kernel": jnp.ones((64, 8), jnp.int32)}
    config = ql.QLoRAConfig(rank=4, targets=".*")
    with pytest.raises(ValueError, match="these leaves cannot be targets") as error:
        ql.linen.init(KEY, Refused(), params, config, x)
    lines = str(error.value).splitlines()[1:]
    reasons = dict(line.strip().split(": ", 1) for line in lines)
    expected = {
        "tied/kernel": r"must be contracted in one way. Got several: \['kn', 'nk'\]",
        "gate/kernel": "must contract the kernel.*Got 'btd,td->btd'",
        "mapped/kernel": "must be stacked along axis 0.*Got axis 1",
        "mapped/bias": "must be stacked along axis 0.*Got axis 1",
        "unused/kernel": "no module that ran owns it",
        "ints/kernel": "no module that ran owns it",
    }
    assert set(reasons) == set(expected)
    for path, reason in expected.items():
        assert re.search(reason, reasons[path]), reasons[path]
    packed = ql.quantize(params["mapped"]["kernel"], contract=-3)
    params["mapped"] = params["mapped"] | {"kernel": packed}
    with pytest.raises(ValueError, match="mapped/kernel: .*Got axis 1"):
        ql.linen.wrap(Refused()).apply({"params": params}, x)


MODULES = {
    "dense": nn.Dense(64),
    "general": nn.DenseGeneral((4, 16)),
    "einsum": nn.Einsum((64, 8), "bk,kn->bn"),
    "embed": nn.Embed(64, 8),
}


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODULES)
def test_a_plain_model_refuses_packed_kernels(name, fmt):
    """int8 codes have the kernel's shape, so Flax's check of shapes accepts them."""
    x = jnp.ones((2, 64), jnp.int32 if name == "embed" else jnp.float32)
    params = MODULES[name].init(KEY, x)["params"]

    def pack(w):
        return ql.quantize(w, fmt, contract=-w.ndim)

    base = {k: w if k == "bias" else pack(w) for k, w in params.items()}
    # The error is Flax's about a shape, or a QTensor's about its use as an array.
    match = 'For parameter "(kernel|embedding)"|QTensor is not an array'
    with pytest.raises((TypeError, ScopeParamShapeError), match=match):
        MODULES[name].apply({"params": base}, x)


class Projections(nnx.Module):
    """Kernels in a list, and a kernel that is not a matrix."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(64, rngs=rngs, use_running_average=True)
        self.heads = nnx.LinearGeneral(64, (16, 2), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.heads(self.norm(x))


class Bridged(nn.Module):
    """A linen model around an nnx module."""

    @nn.compact
    def __call__(self, x, _=None):
        heads = nnx.bridge.to_linen(Projections, name="inside")(x)
        return nn.Dense(64)(heads.reshape(*x.shape[:-1], 32)), None


class BridgedStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": 0, "batch_stats": 0}, {"params": True}
        layers = nn.scan(
            nn.remat(Bridged), variable_axes=axes, split_rngs=rngs, length=2
        )
        return layers(name="layers")(x, None)[0]


class OwnToLinen(nn.Module):
    """A copy of `nnx.bridge.ToLinen`, as MaxText has one, for a single nnx.Linear."""

    nnx_class: Any
    args: tuple = ()

    @nn.compact
    def __call__(self, x):
        inside = self.nnx_class(*self.args, rngs=nnx.Rngs(0))
        if self.is_initializing():
            self.put_variable("params", "inside", {"kernel": inside.kernel.get_value()})
        inside.kernel.set_value(nn.unbox(self.variables)["params"]["inside"]["kernel"])
        return inside(x)


BRIDGES = {
    "stack": BridgedStack(),
    "linear": LINEAR,
    "copy": OwnToLinen(nnx.Linear, (64, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BRIDGES)
def test_nnx_modules_inside_compute_what_the_merged_model_does(name, x):
    variables = variables_of(BRIDGES[name], x)
    if name == "stack":
        inside = variables["params"]["layers"]["inside"]["layers"]
        assert isinstance(inside[1]["kernel"], ql.QTensor)
    assert_as_merged(BRIDGES[name], x, variables)


@pytest.mark.slow
def test_mutable_params_of_nnx_modules_come_back_packed(x):
    variables = variables_of(LINEAR, x)
    _, got = ql.linen.wrap(LINEAR).apply(variables, x, mutable="params")
    assert_close(got["params"], variables["params"])
