"""Flax models and layers give the same results on several devices as on one."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import pytest
from flax.linen.spmd import with_logical_constraint
from helpers import make_mesh, normal, randomized, spread
from integration_helpers import CONFIG, INTEGRATIONS, Linen, value_and_gradients
from integration_models import NNXMLP, LinenMLP
from integration_pairs import Pair
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql

# `gate` and `up` of the MLP are split by columns and `down` by rows, or all by "a".
COLUMNS, ROWS, FSDP = (P(None, "b"), P("b")), (P("b", None), P()), (P("a", None), P())
LAYOUTS = {
    "tensor": {"gate": COLUMNS, "up": COLUMNS, "down": ROWS},
    "fsdp": {"gate": FSDP, "up": FSDP, "down": FSDP},
}
MODELS = itertools.product(INTEGRATIONS.values(), ["Auto", "Explicit"], LAYOUTS, [True])


@pytest.fixture
def x():
    return normal(0, (8, 128))


def place(params, layout, mesh):
    def put(layer, kernel, bias):
        return {
            "kernel": spread(layer["kernel"], mesh, *kernel),
            "bias": spread(layer["bias"], mesh, *bias),
        }

    return {name: put(params[name], *specs) for name, specs in LAYOUTS[layout].items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flax", "kind", "layout", "freeze_base"),
    [*MODELS, (Linen, "Explicit", "tensor", False)],
)
def test_models(flax, kind, layout, freeze_base, x):
    """Compares with the merged model on one device. test_mesh.py has stacks."""
    mesh = make_mesh(kind)
    linen = functools.partial(LinenMLP, hidden=128)
    pair = Pair(linen, functools.partial(NNXMLP, None, 128, 128), x.shape, {})
    config = dataclasses.replace(CONFIG, freeze_base=freeze_base)
    wrapped = flax.wrap(flax.make(pair), config, x)
    model = flax.make(pair, lambda params: place(params, layout, mesh))
    on_mesh = flax.wrap(model, config, x)
    if freeze_base:
        base, _ = on_mesh.trees(on_mesh.lora, on_mesh.base)
        for name, (spec, _) in LAYOUTS[layout].items():
            codes = base[name]["kernel"].codes
            assert codes.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)
    lora = randomized(wrapped.lora)
    want = value_and_gradients(wrapped.merged, wrapped.base)(lora, x)
    arguments = spread(lora, mesh), spread(x, mesh, "a", None)
    assert_close(value_and_gradients(on_mesh.apply, on_mesh.base)(*arguments), want)


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
    assert_close(got, jax.jit(model.apply)({"params": merged}, x))
