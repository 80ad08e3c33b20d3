"""`ql.optim.offload` against the same transformation on the device."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import assert_same, normal, spread
from integration_models import NNXMLP
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optimizer_helpers import ONE_TREE, is_paged, run_donated, train_tree
from tolerances import assert_close
from tpu_helpers import chips_of, needs_libtpu, run_script

import qlora_jax as ql

ADAMW = optax.adamw(1e-2, weight_decay=0.1)


@functools.cache
def make_trees():
    """Returns stacks of two depths, experts, and a kernel without layers."""
    shapes = {
        "q": (5, 32, 16),
        "k": (2, 32, 8),
        "experts": (2, 3, 32, 16),
        "o": (64, 24),
    }
    params = {name: {"kernel": normal(0, shape)} for name, shape in shapes.items()}
    config = ql.QLoRAConfig(rank=4, block_size=32)
    return ql.init(jax.random.key(0), params, config)


def make_lora():
    return make_trees()[1]


def make_grads(tree, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    grads = [normal(seed + i, x.shape).astype(x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(grads)


def run(tx, lora):
    """Returns the updates of the third step, and the state."""
    step = jax.jit(lambda grads, state: tx.update(grads, state, lora))
    state = tx.init(lora)
    for seed in range(3):
        updates, state = step(make_grads(lora, seed), state)
    return updates, state


SEPARATE = {
    "adamw": ADAMW,
    "bfloat16 moment": optax.adamw(1e-2, mu_dtype=jnp.bfloat16),
    "lion": optax.lion(1e-3),
    "sgd": optax.sgd(1e-2),
    "schedule": optax.adamw(optax.linear_schedule(1e-2, 0, 5)),
    "adafactor": optax.adafactor(1e-2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(1e-2),
    "MultiSteps": optax.MultiSteps(ADAMW, 2).gradient_transformation(),
    "block norms": optax.chain(optax.clip_by_block_rms(0.1), optax.sgd(1e-2, 0.9)),
    "mask": optax.adamw(1e-2, weight_decay=0.1, mask=ql.lora_mask),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SEPARATE)
def test_the_state_has_the_bits_of_the_plain_optimizer(name):
    updates, state = run(ql.optim.offload(SEPARATE[name]), make_lora())
    want_updates, want_state = run(SEPARATE[name], make_lora())
    assert_same(state, want_state)
    assert is_paged(state) or name == "sgd"  # which has no state
    # XLA may compute a product and a sum in one operation, with a single rounding.
    assert_close(updates, want_updates)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), ADAMW),
        optax.apply_if_finite(optax.chain(optax.clip_by_global_norm(1.0), ADAMW), 3),
        optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), ADAMW),
    ],
    ids=["norm", "nested norm", "noise"],
)
def test_a_transformation_that_mixes_parameters_is_refused(tx):
    with pytest.raises(ValueError, match="`tx` must update each parameter separately"):
        ql.optim.offload(tx).init(make_lora())


def test_parameters_in_host_memory_are_refused():
    lora = make_lora()
    head = jax.device_put(lora["o"], jax.memory.Space.Host)
    with pytest.raises(ValueError, match=r"`params`.*o/kernel/a"):
        ql.optim.offload(ADAMW).init({**lora, "o": head})


@pytest.mark.slow
def test_a_skipped_update_leaves_the_state_on_the_host():
    lora = make_lora()
    tx = optax.chain(optax.clip_by_global_norm(1e9), ql.optim.offload(ADAMW))
    step = jax.jit(lambda g, state, skip: tx.update(g, state, lora, skip=skip))
    before = step(lora, tx.init(lora), False)[1]
    nan = jax.tree.map(lambda x: x * jnp.nan, lora)
    updates, after = step(nan, before, True)
    assert is_paged(after[1])
    assert_same(after, before)
    assert_same(updates, jax.tree.map(jnp.zeros_like, lora))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_TREE)
def test_one_tree(kind):
    base, lora = make_trees()

    def gradients(tree, seed):
        frozen, lora = ql.split(tree)
        zeros = jax.tree.map(jnp.zeros_like, frozen)
        return ql.combine(zeros, jax.tree.map(jnp.sin, lora))

    tx = ONE_TREE[kind](ql.optim.offload(ADAMW))
    tree, state = train_tree(tx, ql.combine(base, lora), gradients, 3)
    want, _ = train_tree(ADAMW, lora, lambda x, _: jax.tree.map(jnp.sin, x), 3)
    assert_same(ql.split(tree)[0], base)
    assert_close(ql.split(tree)[1], want)
    assert is_paged(state)


@pytest.mark.slow
def test_an_nnx_optimizer():
    model = NNXMLP(rngs=nnx.Rngs(0))
    config = ql.QLoRAConfig(rank=4, block_size=32)
    model = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, ql.optim.offload(ADAMW), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, x):
        def loss(model):
            return jnp.mean((model(x) - 1) ** 2)

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model)
        optimizer.update(model, grads)
        return value

    x = normal(0, (4, 64))
    first, *_, last = [step(model, optimizer, x) for _ in range(5)]
    assert last < first
    assert is_paged(nnx.state(optimizer, nnx.OptState))


def test_optax_finds_the_state_of_parameters():
    """`optax.tree.map_params` passes a placeholder without arrays to `init`."""
    lora, off = make_lora(), ql.optim.offload(ADAMW)
    ndims = optax.tree.map_params(off, lambda x: x.ndim, off.init(lora))
    assert jax.tree.leaves(ndims[0].mu) == [x.ndim for x in jax.tree.leaves(lora)]


def test_init_under_transformations():
    lora, off = make_lora(), ql.optim.offload(ADAMW)
    want = ADAMW.init(lora)
    for init in (off.init, jax.jit(off.init)):
        assert is_paged(init(lora))
        assert_same(init(lora), want)
    shapes = jax.eval_shape(off.init, lora)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, want)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [("a", None, None), (None, "a", None)], ids=str)
def test_over_several_devices(spec, mesh):
    """Moments in host memory are sharded as their parameters are."""
    tree = {"layers": spread(normal(0, (4, 8, 6)), mesh, *spec), "o": normal(1, (3, 2))}
    with jax.set_mesh(mesh):
        got, want = run(ql.optim.offload(ADAMW), tree), run(ADAMW, tree)
        assert is_paged(got[1])
        assert_close(got, want)
        moments = got[1][0].mu["layers"].sharding
    sharding = NamedSharding(mesh, PartitionSpec(*spec), memory_kind="pinned_host")
    assert moments.is_equivalent_to(sharding, 3)


@pytest.mark.slow
def test_a_scan_over_steps():
    lora = make_lora()

    def train(tx):
        def step(carry, seed):
            lora, state = carry
            updates, state = tx.update(jax.tree.map(jnp.cos, lora), state, lora)
            return (optax.apply_updates(lora, updates), state), None

        return jax.jit(lambda *x: jax.lax.scan(step, x, jnp.arange(4))[0])(
            lora, tx.init(lora)
        )

    got = train(ql.optim.offload(ADAMW))
    assert is_paged(got[1])
    assert_close(got, train(ADAMW))


@pytest.mark.slow
def test_a_donated_step_frees_the_state_and_compiles_once():
    lora, off = make_lora(), ql.optim.offload(ADAMW)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(tree, state):
        updates, state = off.update(jax.tree.map(jnp.sin, tree), state, tree)
        return optax.apply_updates(tree, updates), state

    run_donated(step, (jax.tree.map(jnp.array, lora), off.init(lora)))


RANK, LAYERS, WIDTHS, KERNELS = 64, 16, (2048, 4096), 4
MOMENTS = 2 * 4 * KERNELS * LAYERS * RANK * sum(WIDTHS)


def compile_for_tpu(tx, on_host, devices=1):
    """Compiles a step for v5e chips; returns XLA's sizes in bytes."""
    axes = ("fsdp", "tensor")
    chips = chips_of("v5e")[:devices].reshape(-(-devices // 2), -1)
    mesh = Mesh(chips, axes, axis_types=(AxisType.Auto,) * 2)

    def put(x, memory="device"):
        # Split the longer axis of factors and of moments.
        longest = max(x.shape, default=0)
        spec = [axes if i and n == longest else None for i, n in enumerate(x.shape)]
        place = NamedSharding(mesh, PartitionSpec(*spec), memory_kind=memory)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def make_lora(key):
        kernel = {"kernel": jnp.zeros((LAYERS, *WIDTHS), jnp.bfloat16)}
        params = {str(i): kernel for i in range(KERNELS)}
        return ql.init(key, params, ql.QLoRAConfig(rank=RANK, fmt=None))[1]

    lora = jax.eval_shape(make_lora, jax.random.key(0))
    state = jax.eval_shape(tx.init, lora)

    def memory_kind(x):
        return "pinned_host" if on_host and x.ndim else "device"

    state = jax.tree.map(lambda x: put(x, memory_kind(x)), state)

    def step(lora, state):
        grads = jax.tree.map(jnp.sin, lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(jax.tree.map(put, lora), state)
    analysis = lowered.compile().memory_analysis()
    names = ["argument_size", "temp_size"]
    names += [f"host_{n}_size" for n in ("argument", "output", "alias", "temp")]
    return {name: getattr(analysis, f"{name}_in_bytes") for name in names}


@functools.cache
def compiled_for_tpu():
    return dict(run_script(__file__))


@pytest.mark.slow
@needs_libtpu
def test_on_a_tpu_moments_stay_in_host_memory():
    plain, offloaded, split = (compiled_for_tpu()[name] for name in UPDATES)
    for name in ("argument", "output", "alias"):
        assert offloaded[f"host_{name}_size"] == MOMENTS, name
        assert split[f"host_{name}_size"] == MOMENTS / 4, name  # of each chip
    assert offloaded["host_temp_size"] == split["host_temp_size"] == 0
    saved = plain["argument_size"] - offloaded["argument_size"]
    assert MOMENTS <= saved < 1.01 * MOMENTS
    # The moments, old and new, of one of the eight parameters, and its gradient.
    assert offloaded["temp_size"] < MOMENTS / 2
    assert split["temp_size"] < MOMENTS / 8


UPDATES = ("resident", "offloaded", "four chips")

if __name__ == "__main__":
    adamw = optax.adamw(1e-4)
    paged = ql.optim.offload(adamw)
    cases = [(adamw, False), (paged, True), (paged, True, 4)]
    for name, case in zip(UPDATES, cases, strict=True):
        print(json.dumps([name, compile_for_tpu(*case)]))
