"""`ql.linen.wrap(scanned=...)` against stacks that the scan slices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same
from integration_models import INIT, LinenBlock, LinenOwn, LinenStack
from linen_helpers import merged, setup, variables_of
from tolerances import assert_close

import qlora_jax as ql

BLOCKS = LinenStack(LinenBlock)
CONFIG = ql.QLoRAConfig(rank=4, alpha=8, block_size=16, targets=".*/(kernel|w)")


class MixedBlock(nn.Module):
    """Partitioned parameters, experts, and a kernel that the block reads itself."""

    @nn.compact
    def __call__(self, x, _):
        kernel = nn.with_partitioning(INIT, ("x", "y"))
        bias = nn.with_partitioning(nn.initializers.normal(), ("y",))
        x = x + nn.Dense(64, kernel_init=kernel, bias_init=bias)(x)
        halves = jnp.moveaxis(x.reshape(*x.shape[:-1], 2, 32), -2, 0)
        experts = nn.Einsum((2, 32, 48), "EBTD,EDF->EBTF", name="experts")(halves)
        x = x + nn.Dense(64)(jnp.moveaxis(experts, 0, -2).reshape(*x.shape[:2], 96))
        return x + jnp.tanh(LinenOwn((64, 64), "btd,df->btf", name="own")(x)), None


class MixedStack(nn.Module):
    remat: bool = False
    jit: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(MixedBlock) if self.remat else MixedBlock
        layers = nn.scan(
            nn.jit(block) if self.jit else block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return nn.Dense(64, name="head")(layers(name="layers")(x, None)[0])


STACKS = {
    "scan": BLOCKS,
    "remat": LinenStack(LinenBlock, remat=True),
    "mixed": MixedStack(),
    "mixed-remat": MixedStack(remat=True),
    "mixed-jit": MixedStack(jit=True),
}


def scanned_bytes(jaxpr):
    """Returns the shapes of uint8 arrays that a scan slices or stacks."""
    shapes = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            outside = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            inside = [v.aval for v in (*body.invars, *body.outvars)]
            shapes |= {
                stack.shape
                for stack, part in zip(outside, inside, strict=True)
                if stack.dtype == jnp.uint8 and stack.shape != part.shape
            }
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                shapes |= scanned_bytes(getattr(value, "jaxpr", value))
    return shapes


def is_jaxpr(value):
    return hasattr(value, "eqns")


def apply_to(variables, model, **options):
    """Returns the wrapped model as a function of the adapters and the input."""
    wrapped = ql.linen.wrap(model, **options)
    return lambda lora, x: wrapped.apply({**variables, "lora": lora}, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "jit"),
    [("scan", False), ("scan", True), ("mixed-remat", True), ("mixed-jit", True)],
)
def test_values_and_gradients_are_the_same_bit_for_bit(name, jit, x):
    variables = variables_of(STACKS[name], x, CONFIG)

    def run(**options):
        apply = apply_to(variables, STACKS[name], **options)

        def loss(lora, x):
            return jnp.sum(jnp.square(apply(lora, x)))

        def value_and_gradients(*args):
            return (apply(*args), jax.grad(loss, argnums=(0, 1))(*args))

        return (jax.jit(value_and_gradients) if jit else value_and_gradients)(
            variables["lora"], x
        )

    got = run(scanned="layers")
    assert_same(got, run())
    if name == "mixed-jit":
        assert_close(got[0], jax.jit(STACKS[name].apply)(merged(variables), x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scan", "remat", "mixed", "mixed-remat"])
def test_no_scan_slices_codes_or_stacks_them_up(name, x):
    variables = variables_of(STACKS[name], x, CONFIG)

    def scanned_shapes(**options):
        apply = apply_to(variables, STACKS[name], **options)

        def loss(lora):
            return apply(lora, x).sum()

        return scanned_bytes(jax.make_jaxpr(jax.grad(loss))(variables["lora"]).jaxpr)

    def is_packed(node):
        return isinstance(node, ql.QTensor)

    kernels = jax.tree.leaves(variables["params"]["layers"], is_leaf=is_packed)
    assert scanned_shapes() >= {q.codes.shape for q in kernels if is_packed(q)}
    assert scanned_shapes(scanned="layers") == set()


@pytest.mark.without_noise  # noise takes memory
@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
def test_memory_is_that_of_packed_weights(remat):
    """Neither float weights nor codes are stacked up for the backward pass."""

    def dense(name):
        return nn.Dense(512, use_bias=False, name=name)

    model, x = LinenStack(dense, length=16, remat=remat), jnp.ones((8, 512))
    params, base, lora = setup(model, x)

    def temporaries(**options):
        wrapped = ql.linen.wrap(model, **options)

        def loss(lora, base, x):
            return wrapped.apply({"params": base, "lora": lora}, x)

        grad = jax.jit(jax.grad(lambda *args: loss(*args).sum()))
        memory = grad.lower(lora, base, x).compile().memory_analysis()
        return memory.temp_size_in_bytes

    sliced, indexed = temporaries(), temporaries(scanned="layers")
    float_stack = sum(a.nbytes for a in jax.tree.leaves(params))
    assert indexed < sliced + float_stack // 128  # a 16th of the codes
    assert indexed < float_stack // 4


@pytest.mark.slow
def test_a_scan_in_a_scan_is_sliced_as_ever(x):
    model = LinenStack(lambda name: LinenStack(LinenBlock, length=2, name=name))
    variables = variables_of(model, x)

    def run(**options):
        return ql.linen.wrap(model, **options).apply(variables, x)

    for scanned in ("layers", "layers/layer/layers"):
        np.testing.assert_array_equal(run(scanned=scanned), run())


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x):
        left, right = (LinenStack(LinenBlock, name=n) for n in ("left", "right"))
        return right(left(x))


@pytest.mark.slow
def test_modules_are_named_by_patterns_for_their_whole_paths(x):
    variables = variables_of(Tower(), x)

    def count_sliced(scanned):
        apply = apply_to(variables, Tower(), scanned=scanned)
        jaxpr = jax.make_jaxpr(lambda lora: apply(lora, x))(variables["lora"])
        return len(scanned_bytes(jaxpr.jaxpr))

    assert count_sliced(()) == count_sliced("left/layers") > 0  # the same shapes, once
    assert count_sliced(["left/layers", "right/layers"]) == 0
    assert count_sliced("(left|right)/layers") == count_sliced("left|right") == 0


@pytest.mark.slow
def test_names_of_no_module_and_of_no_scan_are_refused(x):
    wrapped = ql.linen.wrap(BLOCKS, scanned=["layers", "layer", "mlp"])
    match = r"Got \['layer', 'mlp'\], which match none"
    with pytest.raises(ValueError, match=match):
        wrapped.apply(variables_of(BLOCKS, x), x)
    experts = LinenOwn((2, 64, 96), "btd,ndf->nbtf")
    config = ql.QLoRAConfig(targets="w")
    wrapped = ql.linen.wrap(experts, scanned=".*")
    with pytest.raises(ValueError, match="run under nn.scan.*'w', of which 2"):
        wrapped.apply(variables_of(experts, x, config), x)


def test_wrapping_again_takes_the_new_options():
    wrapped = ql.linen.wrap(BLOCKS)
    again = ql.linen.wrap(wrapped, scanned="layers", backend="tiled")
    assert (again.scanned, again.backend) == (("layers",), ("tiled",))
    assert again.module is wrapped.module
    assert ql.linen.wrap(again) is again


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [(), "layers"])
def test_a_back_end_can_be_chosen(scanned, x):
    config = ql.QLoRAConfig(rank=4, fmt="int8", block_size=16)
    variables = variables_of(BLOCKS, x, config)
    want = ql.linen.wrap(BLOCKS).apply(variables, x)

    def run(backend):
        wrapped = ql.linen.wrap(BLOCKS, scanned=scanned, backend=backend)
        return wrapped.apply(variables, x)

    assert_close(run("reference"), want)
    with pytest.raises(ValueError, match="`backend` must be one of.*Got 'nothing'"):
        run("nothing")
    with pytest.raises(NotImplementedError, match="`pallas_tpu_v5e` does not support"):
        run("pallas_tpu_v5e")  # blocks of 16 in 8 bits
