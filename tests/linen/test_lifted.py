"""`ql.linen.wrap` under Flax's lifted transforms: `nn.jit`, `nn.vjp` and others."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import randomized
from integration_models import INIT
from linen_helpers import CONFIG, assert_as_merged, merged, variables_of
from tolerances import assert_close

import qlora_jax as ql

KEY = jax.random.key(0)


@pytest.mark.slow
def test_methods_of_unbound_modules_and_lifted_models_are_no_reads(x):
    """Flax first runs the setup of a lifted model without parameters."""

    class Doubled(nn.Module):
        def double(self, x):
            return 2 * x

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(Doubled(parent=None).double(x))

    axes, rngs = {"params": 0}, {"params": True}
    heads = nn.vmap(nn.Dense, variable_axes=axes, split_rngs=rngs, axis_size=2)
    for model in (Model(), heads(8)):
        variables = variables_of(model, x, ql.QLoRAConfig(rank=4, dropout=0.5))
        apply = ql.linen.wrap(model).apply
        dropped = apply(variables, x, rngs={"dropout": KEY})
        assert not np.allclose(dropped, apply(variables, x))


class Repeated(nn.Module):
    """Runs one layer several times on the same parameters: row i of x is call i."""

    kind: str
    split: Any = None  # `split_rngs` of the transform

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(64, use_bias=False, name="layer")
        split = self.split or {"params": False, "dropout": True}
        if self.kind == "vmap":
            run = nn.vmap(
                lambda layer, row: layer(row),
                variable_axes={"params": None},
                split_rngs=split,
            )
            return run(layer, x)
        if self.kind == "scan":
            run = nn.scan(
                lambda layer, carry, row: (carry, layer(row)),
                variable_broadcast="params",
                split_rngs=split,
            )
            return run(layer, None, x)[1]
        return jnp.stack([layer(row) for row in x])


def draw_masks(model, rngs, x=None):
    """Returns which inputs each call keeps: W is 0, and A and B are the identity."""
    x = jnp.ones((4, 64)) if x is None else x
    params = {"layer": {"kernel": jnp.zeros((64, 64))}}
    config = ql.QLoRAConfig(rank=64, alpha=64, dropout=0.5, fmt=None)
    base, lora = ql.init(KEY, params, config)
    lora = jax.tree.map(lambda a: jnp.eye(64), lora)
    y = ql.linen.wrap(model).apply({"params": base, "lora": lora}, x, rngs=rngs)
    y = np.asarray(y)
    np.testing.assert_array_equal(y[y != 0], 2)  # dropout scales what it keeps
    return y != 0


@pytest.mark.parametrize("kind", ["vmap", "scan", "calls"])
@pytest.mark.parametrize("stream", ["dropout", "params"])
def test_each_call_of_a_layer_draws_its_own_dropout_mask(kind, stream):
    """As `nn.Dropout` does."""
    split = {"params": stream == "params", "dropout": True}
    model = Repeated(kind, split)
    masks = draw_masks(model, {stream: jax.random.key(3)})
    assert len(np.unique(masks, axis=0)) == len(masks)
    # A quarter passes any two masks. It would be a half if the masks were equal.
    both = masks[:, None] & masks[None, :]
    assert abs(both[~np.eye(4, dtype=bool)].mean() - 0.25) < 0.1
    np.testing.assert_array_equal(draw_masks(model, {stream: jax.random.key(3)}), masks)


@pytest.mark.parametrize("kind", ["vmap", "scan"])
def test_calls_share_a_dropout_mask_if_flax_gives_them_one_key(kind):
    model = Repeated(kind, {"params": False, "dropout": False})
    masks = draw_masks(model, {"dropout": jax.random.key(3)})
    assert len(np.unique(masks, axis=0)) == 1


@pytest.mark.parametrize("kind", ["vmap", "scan"])
def test_a_dropout_stream_that_does_not_reach_the_layer_is_named(kind):
    """`nn.Dropout` raises an error there, too."""
    model = Repeated(kind, {"params": False})
    with pytest.raises(ValueError, match="layer/kernel: .*`split_rngs`.*'dropout'"):
        draw_masks(model, {"dropout": jax.random.key(3)})


TRACES: list = []


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        TRACES.append(self.path)
        w = self.param("w", INIT, (64, 64))
        return nn.Dense(64, name="dense")(jnp.einsum("btd,df->btf", x, w))


class JittedMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return Jitted(name="inside")(x)


class JittedTwice(nn.Module):
    """Two modules that differ only in their names share one trace."""

    @nn.compact
    def __call__(self, x):
        layer = nn.jit(Jitted)
        return layer(name="second")(layer(name="first")(x))


@pytest.mark.slow
def test_modules_under_nn_jit_are_all_seen_and_share_one_trace(x):
    model, config = JittedTwice(), ql.QLoRAConfig(rank=4, targets=".*/(kernel|w)")
    variables = variables_of(model, x, config)
    assert set(variables["lora"]) == {"first", "second"}
    TRACES.clear()
    got = ql.linen.wrap(model).apply(variables, x)
    assert TRACES == [("first",)]
    assert_close(got, model.apply(merged(variables), x))


@pytest.mark.slow
def test_nn_jit_takes_no_trace_of_another_back_end_or_registration(x):
    model, config = JittedMethod(), ql.QLoRAConfig(rank=4, targets=".*/kernel")
    variables = variables_of(model, x, config)

    def traces(**options):
        TRACES.clear()
        ql.linen.wrap(model, **options).apply(variables, x)
        return len(TRACES)

    traces()
    assert traces() == 0
    assert traces(backend="reference") == 1
    assert traces(backend="reference") == 0
    with pytest.raises(ValueError, match="Got 'nothing'"):
        traces(backend="nothing")

    class OtherLayer(nn.Module):
        def __call__(self, x):
            return x

    for _ in range(2):  # again too: it may have another equation
        ql.linen.register(OtherLayer, kernel="w", einsum="ab,bc->ac")
        assert traces() == 1


@pytest.mark.slow
def test_a_model_under_nn_jit_is_traced_anew_each_time(x):
    class Attend(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((4, 64, 16), "BTD,NDH->BTNH", name="q")(x)

    params = Attend().init(KEY, x)["params"]
    Attend().apply({"params": params}, x)
    for _ in range(2):
        base, lora = ql.linen.init(KEY, Attend(), params, CONFIG, x)
        assert lora["q"]["kernel"].a.shape == (64, 4)
    variables = {"params": base, "lora": randomized(lora)}
    assert_as_merged(Attend(), x, variables, gradients=False)


class Lifted(nn.Module):
    """Calls the layer that owns the kernel in a function under a lifted transform."""

    transform: str

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(64, name="layer")

        def call(layer, x):
            return layer(x)

        if self.is_initializing():
            return layer(x)
        if self.transform == "vjp":
            y, backward = nn.vjp(call, layer, x)
            return y, backward(jnp.sin(y))[1]
        if self.transform == "custom_vjp":

            def forward(layer, x):
                return nn.vjp(call, layer, x)

            def backward(residuals, g):
                params, *inputs = residuals(g)
                return params, *(2 * g for g in inputs)

            return nn.custom_vjp(call, forward, backward)(layer, x)
        if self.transform == "jvp":
            return nn.jvp(call, layer, (x,), (x,), variable_tangents={})

        def cond(layer, carry):
            return carry[0] < 2

        def body(layer, carry):
            return (carry[0] + 1, jnp.tanh(layer(carry[1])))

        return nn.while_loop(cond, body, layer, (0, x))[1]


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["vjp", "custom_vjp", "while_loop"])
def test_functions_of_a_layer_may_be_lifted(transform, x):
    model = Lifted(transform)
    variables = variables_of(model, x)

    def packed(x):
        return ql.linen.wrap(model).apply(variables, x)

    def plain(x):
        return model.apply(merged(variables), x)

    assert_close(jax.jit(packed)(x), jax.jit(plain)(x))
    if transform == "custom_vjp":

        def grad(f):
            return jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(f(x)))))(x)

        assert_close(grad(packed), grad(plain))


class Mapped(nn.Module):
    """Transforms its layer's variables by `nn.map_variables`, perhaps in a scan."""

    collection: str = "params"
    in_scan: bool = False

    @nn.compact
    def __call__(self, x):
        def double(variables):
            return jax.tree.map(lambda w: 2 * w, variables)

        layer = nn.Dense(64, name="layer")

        def call(layer, x):
            return layer(x)

        if self.in_scan:
            body = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )

            def call(layer, x):
                return body(layer, x, None)[0]

        return nn.map_variables(call, self.collection, double, init=True)(layer, x)


MAPPED = "layer/kernel: nn.map_variables transforms it"  # twice the codes: no weights
REFUSED: dict[str, Any] = {
    "jvp": (Lifted("jvp"), "layer/kernel: nn.jvp differentiates its product"),
    "map_variables": (Mapped(), MAPPED),
    "map_variables in a scan": (Mapped(in_scan=True), MAPPED),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_packed_kernels_do_not_support_is_refused_by_name(name, x):
    model, match = REFUSED[name]
    params = model.init(KEY, x)["params"]
    with pytest.raises(ValueError, match=match):
        ql.linen.init(KEY, model, params, CONFIG, x)
    with pytest.raises(ValueError, match=match):
        ql.linen.wrap(model).apply({"params": ql.quantize(params, CONFIG)}, x)


@pytest.mark.slow
def test_map_variables_may_transform_other_collections(x):
    model = Mapped("batch_stats")
    assert_as_merged(model, x, variables_of(model, x), gradients=False)


class Normed(nn.Module):
    cls: type
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        return self.cls(nn.Dense(32, name="layer"))(x, **dict(self.options))


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [Normed(nn.WeightNorm), Normed(nn.SpectralNorm, (("update_stats", True),))],
)
def test_normalized_layers_see_the_float_kernel(model, x):
    variables = variables_of(model, x, mutable="batch_stats")
    assert isinstance(variables["params"]["layer"]["kernel"], ql.QTensor)
    assert_as_merged(model, x, variables, mutable="batch_stats")
