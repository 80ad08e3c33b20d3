"""Flax models and layers give the same results on several devices as on one."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.linen.spmd import with_logical_constraint
from helpers import close, make_mesh, normal, randomized, relative_error, spread
from integration_models import NNXMLP, LinenMLP, LinenStack
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
CASES = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.fixture
def x():
    return normal(0, (8, 128))


def nnx_mlp() -> Any:
    model = NNXMLP(dim=128, hidden=128, rngs=nnx.Rngs(0))
    for name, bias in (("gate", 0.1), ("up", 0.3), ("down", -0.2)):
        getattr(model, name).bias.set_value(jnp.linspace(0, bias, 128))
    return model


def place(params, layout, mesh, lead=()):
    put = lambda layer, specs: {
        name: spread(layer[name], mesh, *lead, *spec)
        for name, spec in zip(("kernel", "bias"), specs, strict=True)
    }
    return {name: put(params[name], specs) for name, specs in LAYOUTS[layout].items()}


def result_and_gradients(apply, *args):
    """The result, and the gradients of the sum of its sines."""

    def loss(*args):
        y = apply(*args)
        return jnp.sum(jnp.sin(y)), y

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*args)


def check(got, apply, *args):
    gradients, y = result_and_gradients(apply, *args)
    assert relative_error(got[1], y) < 1e-5
    close(got[0], gradients, 1e-4)


def check_linen(model, mesh, x, lora, base, sharded, **options):
    """The model on sharded trees against that on merged weights on one device."""
    wrapped = ql.linen.wrap(model, **options)
    merged = lambda lora, x: model.apply({"params": ql.merge(base, lora)}, x)
    apply = lambda lora, x: wrapped.apply({"params": sharded, "lora": lora}, x)
    arguments = spread(lora, mesh), spread(x, mesh, "a", None)
    check(result_and_gradients(apply, *arguments), merged, lora, x)


@pytest.mark.slow
@CASES
def test_linen_models(mesh, layout, x):
    model = LinenMLP(hidden=128)
    params, base, lora = setup(model, x)
    params = place(params, layout, mesh)
    sharded, _ = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
    for name, (spec, _) in LAYOUTS[layout].items():
        codes = sharded[name]["kernel"].codes
        assert codes.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    check_linen(model, mesh, x, randomized(lora), base, sharded)


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
    model = LinenStack(functools.partial(LinenMLP, hidden=128), length=2, remat=True)
    config = dataclasses.replace(CONFIG, freeze_base=freeze_base)
    params, base, lora = setup(model, x, config)
    layer = place(params["layers"]["layer"], layout, mesh, lead=(None,))
    sharded = ql.quantize({"layers": {"layer": layer}}, config)
    check_linen(model, mesh, x, randomized(lora), base, sharded, scanned=scanned)


def check_nnx(model, sharded, mesh, x):
    lora = randomized(nnx.state(model, nnx.LoRAParam))
    nnx.update(model, lora)

    def function_of(model):
        graphdef, _, rest = nnx.split(model, nnx.LoRAParam, ...)
        return lambda lora, x: nnx.merge(graphdef, lora, rest)(x)

    arguments = spread(lora, mesh), spread(x, mesh, "a", None)
    got = result_and_gradients(function_of(sharded), *arguments)
    assert relative_error(got[1], ql.nnx.merge(model)(x)) < 1e-5
    check(got, function_of(model), lora, x)


@pytest.mark.slow
@CASES
def test_nnx_models(mesh, layout, x):
    model = nnx_mlp()
    layers = {name: getattr(model, name) for name in LAYOUTS[layout]}
    arrays = lambda layer: {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    params = {name: arrays(layer) for name, layer in layers.items()}
    split = nnx_mlp()
    for name, leaves in place(params, layout, mesh).items():
        getattr(split, name).kernel.set_value(leaves["kernel"])
        getattr(split, name).bias.set_value(leaves["bias"])
    wrap = lambda model: ql.nnx.wrap(model, CONFIG, rngs=nnx.Rngs(2))
    check_nnx(wrap(model), wrap(split), mesh, x)


@pytest.mark.slow
def test_logical_names_are_kept_with_packed_kernels(x):
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            named = nn.with_logical_partitioning
            up = named(init, ("embed", "mlp"))
            bias = named(nn.initializers.normal(), ("mlp",))
            x = nn.Dense(128, kernel_init=up, bias_init=bias)(x)
            x = with_logical_constraint(x, ("batch", "mlp"))
            down = nn.with_partitioning(init, ("b", "a"))
            return nn.Dense(64, kernel_init=down)(x)

    mesh, model = make_mesh("Auto"), Named()
    rules = [("embed", "a"), ("mlp", "b"), ("batch", "a")]
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        base, lora = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
        variables = {"params": base, "lora": (lora := randomized(lora))}
        got = jax.jit(ql.linen.wrap(model).apply)(variables, spread(x, mesh, "a"))
    for name in ("kernel", "bias"):
        assert isinstance(base["Dense_0"][name], nn.LogicallyPartitioned)
    merged = ql.merge(base, lora)
    assert relative_error(got, jax.jit(model.apply)({"params": merged}, x)) < 1e-5


def test_a_drop_in_layer(x):
    mesh, (spec, bias_spec) = make_mesh("Auto"), LAYOUTS["tensor"]["up"]
    config = ql.QLoRAConfig(rank=4, block_size=16, double_quant=False)
    layer = ql.linen.QLoRADense(128, config, bias_init=nn.initializers.normal())
    variables = layer.init(jax.random.key(0), x)
    base, lora = variables["params"], randomized(variables["lora"])
    kernel = spread(ql.dequantize(base)["kernel"], mesh, *spec)
    sharded = ql.quantize({"kernel": kernel}, config)
    sharded["bias"] = spread(base["bias"], mesh, *bias_spec)
    dense = nn.Dense(128)
    merged = lambda lora, x: dense.apply({"params": ql.merge(base, lora)}, x)
    apply = lambda lora, x: layer.apply({"params": sharded, "lora": lora}, x)
    arguments = spread(lora, mesh), spread(x, mesh, "a", None)
    check(result_and_gradients(apply, *arguments), merged, lora, x)
