"""Wrapped Flax models give the same results on several devices as on one."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.linen.spmd import with_logical_constraint
from helpers import close, make_mesh, randomized, relative_error
from integration_models import NNXMLP, LinenMLP
from jax.sharding import NamedSharding, PartitionSpec
from linen_helpers import CONFIG, setup

import qlora_jax as ql

P = PartitionSpec
# Of the MLP, `gate` and `up` are split by columns and `down` by rows, or all by "a".
COLUMNS, ROWS, FSDP = (P(None, "b"), P("b")), (P("b", None), P()), (P("a", None), P())
LAYOUTS = {
    "tensor": {"gate": COLUMNS, "up": COLUMNS, "down": ROWS},
    "fsdp": {"gate": FSDP, "up": FSDP, "down": FSDP},
}


CASES = pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("Auto", "tensor"),
        ("Auto", "fsdp"),
        ("Explicit", "fsdp"),
        ("Explicit", "tensor"),
    ],
)


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).normal(size=(8, 128)), jnp.float32)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + LinenMLP(hidden=128, name="mlp")(x), None


class Layers(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Residual, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return stack(name="layers")(x, None)[0]


def nnx_mlp():
    model = NNXMLP(dim=128, hidden=128, rngs=nnx.Rngs(0))
    for name, bias in (("gate", 0.1), ("up", 0.3), ("down", -0.2)):
        getattr(model, name).bias.set_value(jnp.linspace(0, bias, 128))
    return model


def place(params, layout, mesh):
    put = lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec))
    return {
        name: {
            "kernel": put(params[name]["kernel"], kernel),
            "bias": put(params[name]["bias"], bias),
        }
        for name, (kernel, bias) in LAYOUTS[layout].items()
    }


def spread(tree, mesh, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def loss_of(apply):
    return lambda *args: jnp.sum(jnp.sin(apply(*args)))


@pytest.mark.slow
@CASES
def test_linen_models(kind, layout, x):
    mesh = make_mesh(kind)
    model = LinenMLP(hidden=128)
    params, base, lora = setup(model, x)
    lora = randomized(lora)
    merged = lambda lora, x: model.apply({"params": ql.merge(base, lora)}, x)
    want = jax.jit(jax.grad(loss_of(merged), argnums=(0, 1)))(lora, x)

    params = place(params, layout, mesh)
    sharded, _ = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
    for name, (spec, _) in LAYOUTS[layout].items():
        codes = sharded[name]["kernel"].codes
        assert codes.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    wrapped = ql.linen.wrap(model)
    apply = lambda lora, x: wrapped.apply({"params": sharded, "lora": lora}, x)
    arguments = spread(lora, mesh), spread(x, mesh, "a", None)
    assert relative_error(jax.jit(apply)(*arguments), merged(lora, x)) < 1e-5
    close(jax.jit(jax.grad(loss_of(apply), argnums=(0, 1)))(*arguments), want, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "scanned", "freeze_base"),
    [
        ("Auto", "fsdp", (), True),
        ("Auto", "tensor", "layers", True),
        ("Explicit", "tensor", (), True),
        ("Explicit", "fsdp", "layers", True),
        ("Explicit", "tensor", (), False),
    ],
)
def test_scanned_linen_models(kind, layout, scanned, freeze_base, x):
    mesh = make_mesh(kind)
    model = Layers()
    config = dataclasses.replace(CONFIG, freeze_base=freeze_base)
    params, base, lora = setup(model, x, config)
    lora = randomized(lora)
    merged = lambda lora, x: model.apply({"params": ql.merge(base, lora)}, x)
    want = jax.jit(jax.grad(loss_of(merged), argnums=(0, 1)))(lora, x)

    specs = {
        name: {"kernel": P(None, *kernel), "bias": P(None, *bias)}
        for name, (kernel, bias) in LAYOUTS[layout].items()
    }
    one = lambda spec, array: jax.device_put(array, NamedSharding(mesh, spec))
    mlp = jax.tree.map(one, specs, params["layers"]["mlp"])
    sharded = ql.quantize({"layers": {"mlp": mlp}}, config)
    wrapped = ql.linen.wrap(model, scanned=scanned)
    apply = lambda lora, x: wrapped.apply({"params": sharded, "lora": lora}, x)
    got = jax.jit(jax.grad(loss_of(apply), argnums=(0, 1)))(
        spread(lora, mesh), spread(x, mesh, "a", None)
    )
    close(got, want, 1e-4)


@pytest.mark.slow
@CASES
def test_nnx_models(kind, layout, x):
    mesh = make_mesh(kind)

    def make(params=None):
        model = nnx_mlp()
        for name in params or {}:
            layer = getattr(model, name)
            layer.kernel.set_value(params[name]["kernel"])
            layer.bias.set_value(params[name]["bias"])
        return ql.nnx.wrap(model, CONFIG, rngs=nnx.Rngs(2))

    layers = {name: getattr(nnx_mlp(), name) for name in LAYOUTS[layout]}
    params = {
        name: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
        for name, layer in layers.items()
    }

    def run(model, lora, x):
        graphdef, _, rest = nnx.split(model, nnx.LoRAParam, ...)

        @jax.jit
        def step(lora, x):
            apply = lambda lora, x: nnx.merge(graphdef, lora, rest)(x)
            value = loss_of(apply)
            return apply(lora, x), jax.grad(value, argnums=(0, 1))(lora, x)

        return step(lora, x)

    model = make()
    lora = randomized(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, lora)
    sharded = make(place(params, layout, mesh))
    merged = ql.nnx.merge(model)
    y, grads = run(sharded, spread(lora, mesh), spread(x, mesh, "a", None))
    want_y, want_grads = run(model, lora, x)
    assert relative_error(y, merged(x)) < 1e-5
    close((y, grads), (want_y, want_grads), 1e-4)


@pytest.mark.slow
@CASES
def test_drop_in_modules(kind, layout, x):
    """`QLoRALinear`, by its options the same as `nnx.Linear` wrapped."""
    mesh = make_mesh(kind)
    codes_spec, bias_spec = LAYOUTS[layout]["down"]

    def make(sharded):
        layer = ql.nnx.QLoRALinear(128, 128, ql.QLoRAConfig(rank=4), rngs=nnx.Rngs(0))
        if sharded:
            q = layer.kernel.get_value()
            spread_one = lambda a, spec: spread(a, mesh, *spec)
            scales = spread_one(q.scales, (None, codes_spec[1]))
            codes = spread_one(q.codes, codes_spec)
            rest = {
                k: spread(getattr(q, k), mesh) for k in ("scale_scales", "scale_offset")
            }
            layer.kernel.set_value(
                dataclasses.replace(q, codes=codes, scales=scales, **rest)
            )
            layer.bias.set_value(spread_one(layer.bias[...], bias_spec))
        return layer

    def run(layer, lora, x):
        graphdef, _, rest = nnx.split(layer, nnx.LoRAParam, ...)
        apply = lambda lora, x: nnx.merge(graphdef, lora, rest)(x)
        grad = jax.grad(loss_of(apply), argnums=(0, 1))
        return jax.jit(lambda lora, x: (apply(lora, x), grad(lora, x)))(lora, x)

    layer = make(sharded=False)
    lora = randomized(nnx.state(layer, nnx.LoRAParam))
    nnx.update(layer, lora)
    y, grads = run(make(sharded=True), spread(lora, mesh), spread(x, mesh, "a", None))
    assert relative_error(y, ql.nnx.merge(layer)(x)) < 1e-5
    close((y, grads), run(layer, lora, x), 1e-4)


@pytest.mark.slow
def test_logical_names_are_kept_with_packed_kernels(x):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            named = nn.with_logical_partitioning
            x = nn.Dense(
                128,
                kernel_init=named(init, ("embed", "mlp")),
                bias_init=named(nn.initializers.normal(), ("mlp",)),
            )(x)
            x = with_logical_constraint(x, ("batch", "mlp"))
            down = nn.with_partitioning(init, ("b", "a"))
            return nn.Dense(64, kernel_init=down)(x)

    mesh = make_mesh("Auto")
    model = Named()
    rules = [("embed", "a"), ("mlp", "b"), ("batch", "a")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        base, lora = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
        lora = randomized(lora)
        variables = {"params": base, "lora": lora}
        got = jax.jit(ql.linen.wrap(model).apply)(variables, spread(x, mesh, "a"))
    assert isinstance(base["Dense_0"]["kernel"], nn.LogicallyPartitioned)
    assert isinstance(base["Dense_0"]["bias"], nn.LogicallyPartitioned)
    merged = ql.merge(base, lora)
    assert relative_error(got, jax.jit(model.apply)({"params": merged}, x)) < 1e-5


def test_a_drop_in_layer(x):
    mesh = make_mesh("Auto")
    spec, bias_spec = LAYOUTS["tensor"]["up"]
    normal = nn.initializers.normal()
    config = ql.QLoRAConfig(rank=4, block_size=16, double_quant=False)
    layer = ql.linen.QLoRADense(128, config, bias_init=normal)
    variables = layer.init(jax.random.key(0), x)
    variables["lora"] = randomized(variables["lora"])
    floats = ql.merge(variables["params"], variables["lora"])
    want = jax.grad(loss_of(lambda x: nn.Dense(128).apply({"params": floats}, x)))(x)
    packed = ql.dequantize(variables["params"])
    packed = ql.quantize({"kernel": spread(packed["kernel"], mesh, *spec)}, config)
    packed["bias"] = spread(variables["params"]["bias"], mesh, *bias_spec)
    sharded = {"params": packed, "lora": spread(variables["lora"], mesh)}
    run = jax.jit(jax.grad(loss_of(lambda x: layer.apply(sharded, x))))
    got = run(spread(x, mesh, "a", None))
    assert relative_error(got, want) < 1e-4
