"""`ql.optim.offload` against the same transformation on the device."""

import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import assert_same, fast_and_slow, normal, spread
from integration_models import NNXMLP
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from optimizer_helpers import (
    ONE_TREE,
    carried,
    is_paged,
    run_donated,
    train_in_a_scan,
    train_tree,
)
from tolerances import assert_close
from tpu_helpers import chips_of, needs_libtpu, run_script

import qlora_jax as ql

STEPS = 50


@functools.cache
def make_trees(**settings):
    """Returns stacks of two different depths, and an adapter without layers."""

    def kernel(*shape):
        return {"kernel": normal(len(shape), shape, scale=1 / 8)}

    params = {
        "layers": {"q": kernel(5, 32, 16), "k": kernel(5, 32, 8)},
        "experts": kernel(2, 3, 32, 16),
        "head": kernel(64, 24),
    }
    config = ql.QLoRAConfig(rank=4, block_size=32, **settings)
    return ql.init(jax.random.key(0), params, config)


def make_lora():
    """Returns adapters of stacks of five and of two layers, and of a single layer."""
    lora = make_trees()[1]
    return {**lora, "layers": {"q": lora["layers"]["q"]}}


def gradients(tree, seed):
    """Gradients of `sum((p - target)**2) / 2`, with another target in each step."""
    leaves, treedef = jax.tree.flatten(tree)

    # Only sums: a product with a sum may be rounded once or twice.
    def wave(i, size):
        return jnp.cos(jnp.arange(size) + 1.7 * i + seed)

    def target_of(i, x):
        return wave(i, x.size).reshape(x.shape)

    grads = [(x - target_of(i, x)).astype(x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(grads)


def run(tx, tree, steps=STEPS, **extra):
    return train_tree(tx, tree, gradients, steps, **extra)


@functools.cache
def on_device(name):
    """Returns the transformation without `offload`."""
    return run(transformation(name), make_lora())


def transformation(name):
    tx = ENTRYWISE.get(name) or MIXING[name][0]
    return tx() if name == "add_noise" else tx  # its key is donated with its state


def paged(tx):
    """Returns the offloaded transformation, which must work layer by layer."""
    return ql.optim.offload(tx, layerwise=True)


ADAMW = optax.adamw(1e-2)


def close(got, want, terms=64, **settings):
    """Compares trees. Updates have a magnitude of 0.01, and their sums may cancel."""

    def without_keys(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    got, want = jax.tree.map(without_keys, (got, want))
    magnitude = jax.tree.map(lambda x: np.float64(x) ** 2 + 1e-4, want)
    magnitude = jax.tree.map(np.sqrt, magnitude)
    assert_close(got, want, terms, magnitude=magnitude, **settings)


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 5, STEPS)
ENTRYWISE = {
    "adamw": ADAMW,
    "adamw, bfloat16 mu": optax.adamw(1e-2, mu_dtype=jnp.bfloat16),
    "adamw, masked by axes": optax.adamw(
        1e-2, mask=lambda tree: jax.tree.map(lambda x: x.ndim > 2, tree)
    ),
    "lion": optax.lion(1e-3),
    "sgd": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "rmsprop, clipped entries": optax.chain(optax.clip(0.5), optax.rmsprop(1e-2)),
    "schedule": optax.adamw(SCHEDULE),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "MultiSteps": optax.MultiSteps(ADAMW, 3),
    "MultiSteps of a schedule": optax.MultiSteps(optax.lion(SCHEDULE), 4),
    "partition": optax.partition(
        {"layers": ADAMW, "rest": optax.lion(1e-3)},
        lambda tree: {k: "layers" if k == "layers" else "rest" for k in tree},
    ),
    # XLA takes long to compile Threefry for each leaf.
    "add_noise": lambda: optax.chain(
        optax.add_noise(0.1, 0.5, jax.random.key(0, impl="unsafe_rbg")),
        optax.sgd(1e-2, momentum=0.9),
    ),
}
by_norm = optax.chain(optax.clip_by_global_norm(0.1), ADAMW)
by_rms = optax.chain(optax.clip_by_block_rms(0.1), optax.lion(1e-3))
MIXING = {
    "adafactor": (optax.adafactor(1e-2), "reduce_sum"),
    "clip_by_global_norm": (by_norm, "reduce_sum"),
    "clip_by_block_rms": (by_rms, "reduce_sum"),
    "lamb": (optax.lamb(1e-2), "reduce_sum"),
    "apply_if_finite": (optax.apply_if_finite(ADAMW, 3), "reduce_and"),
    "sm3": (optax.sm3(1e-2), "reshape"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENTRYWISE, *MIXING])
def test_whole_leaves_are_bit_identical(name):
    off = ql.optim.offload(transformation(name), layerwise=False)
    got = run(off, make_lora())
    assert is_paged(got[1])
    assert_same(got, on_device(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENTRYWISE)
def test_layer_by_layer_is_the_same_within_rounding(name):
    got, want = run(paged(transformation(name)), make_lora()), on_device(name)
    assert is_paged(got[1])
    # A bfloat16 moment may differ by one rounding.
    dtype = "bfloat16" if "bfloat16" in name else None
    close(got, want, dtype=dtype)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_layers_takes_whole_leaves_or_is_refused(name):
    tx, lora = transformation(name), make_lora()
    assert carried(ql.optim.offload(tx), lora) == set()
    demanding, reason = paged(tx), MIXING[name][1]
    with pytest.raises(ValueError) as error:
        demanding.update(lora, demanding.init(lora), lora)
    # The error names the arrays whose layers are mixed.
    words = f"`layerwise` must be None or False.*{reason}"
    for match in (words, r"experts/kernel/a.*layers/q/kernel/b"):
        assert error.match(match)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [True, False])
def test_a_state_from_elsewhere_is_moved_to_the_host(layerwise):
    lora = make_lora()
    off = ql.optim.offload(ADAMW, layerwise=layerwise)
    got = jax.jit(off.update)(lora, ADAMW.init(lora), lora)
    assert is_paged(got[1])
    close(got, jax.jit(ADAMW.update)(lora, ADAMW.init(lora), lora))


def test_a_state_of_other_parameters_is_refused():
    lora, off = make_lora(), paged(ADAMW)
    for tree in (lora["head"], jax.tree.map(lambda x: x[:1], lora)):
        with pytest.raises(ValueError, match="`state` does not come from `init`"):
            off.update(lora, off.init(tree), lora)


def stateless(fn):
    return optax.stateless(lambda updates, _: jax.tree.map(fn, updates))


IN_THE_PROGRAM = {
    "the number of layers": lambda g: g / g.shape[0],
    "a branch on the shape": lambda g: 2 * g if g.shape[0] > 1 else g,
    "the layer's index": lambda g: g * jax.lax.broadcasted_iota("float32", g.shape, 0),
    "a scan over the layers": lambda g: jax.lax.map(lambda x: x / jnp.abs(x).max(), g),
    "sizes that it insists on": lambda g: g * {2: 1.0, 4: 1.0, 5: 1.0, 64: 1.0}[len(g)],
}
DEPENDENT = {
    "a number of entries that is computed": lambda g: g / jnp.ones_like(g).sum(),
    "the entry before": lambda g: jnp.roll(g, 1, axis=0),
    "the largest entry": lambda g: g / jnp.abs(g).max(),
    "a branch on a value": lambda g: jax.lax.cond(g.sum() > 0, lambda: g, lambda: -g),
    "a scan that sees the stack": lambda g: jax.lax.map(lambda x: x / g.max(), g),
    "a scan that carries": lambda g: jax.lax.scan(
        lambda c, x: (c + x, c), jnp.zeros(g.shape[1:]), g
    )[1],
    "the sum before": lambda g: jnp.cumsum(g, axis=0),
    "a loop": lambda g: jax.lax.fori_loop(0, 3, lambda _, x: x / jnp.sum(x), g),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IN_THE_PROGRAM, *DEPENDENT])
def test_other_dependences_are_followed_or_found(name):
    lora = make_lora()
    fn = IN_THE_PROGRAM.get(name) or DEPENDENT[name]
    tx = optax.chain(optax.trace(0.9), stateless(fn))
    grads = jax.tree.map(lambda x: x + 1.0, lora)
    want, _ = jax.jit(tx.update)(grads, tx.init(lora))
    off = ql.optim.offload(tx)
    got, _ = jax.jit(off.update)(grads, off.init(lora))
    close(got, want)
    demanding = paged(tx)
    if name in IN_THE_PROGRAM:
        close(jax.jit(demanding.update)(grads, off.init(lora))[0], want)
        return
    with pytest.raises(ValueError, match="`layerwise` must be None or False"):
        demanding.update(grads, off.init(lora))


clipped = optax.chain(optax.clip_by_global_norm(0.1), paged(ADAMW))
several = optax.MultiSteps(paged(ADAMW), 3)


def paged_adamw(learning_rate):
    return paged(optax.adamw(learning_rate))


injected = optax.inject_hyperparams(paged_adamw)(learning_rate=SCHEDULE)
# Transformations around the offloaded one, where its state is, and `terms`. The first
# steps of injected hyperparameters divide by 1 - b2**count, where terms cancel.
AROUND = {
    "clip_by_global_norm": (clipped, lambda s: s[1], 64),
    "MultiSteps": (several, lambda s: s.inner_opt_state, 64),
    "inject_hyperparams": (injected, lambda s: s.inner_state, 4096),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", AROUND)
def test_transformations_around_a_paged_one(name):
    around, inner, terms = AROUND[name]
    (got, state), (want, _) = run(around, make_lora()), on_device(name)
    assert is_paged(inner(state))
    close(got, want, terms)


def test_hyperparams_of_the_state_can_be_set():
    lora = make_lora()
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1e-2, momentum=0.9)
    off = paged(tx)
    state = off.init(lora)
    state.hyperparams["learning_rate"] = jnp.float32(0.5)
    updates, state = jax.jit(off.update)(lora, state, lora)
    close(updates, jax.tree.map(lambda x: -0.5 * x, lora))
    assert float(state.hyperparams["learning_rate"]) == 0.5


@pytest.mark.slow
def test_extra_arguments_are_passed_on():
    settings = {"factor": 0.5, "patience": 2, "accumulation_size": 1}
    tx = optax.chain(ADAMW, optax.contrib.reduce_on_plateau(**settings))

    def run_ten_steps(tx):
        return run(tx, make_lora(), 10, value=jnp.float32(3.0))

    got, want = run_ten_steps(paged(tx)), run_ten_steps(tx)
    assert float(want[1][1].scale) < 1
    close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [True, False])
def test_a_skipped_update_leaves_the_state_on_the_host(layerwise):
    lora, clip = make_lora(), optax.clip_by_global_norm(1e9)
    off = ql.optim.offload(ADAMW, layerwise=layerwise)
    tx = ql.optim.skippable(optax.chain(clip, off))
    step = jax.jit(lambda g, state, skip: tx.update(g, state, lora, skip=skip))
    before = step(lora, tx.init(lora), False)[1]
    nan = jax.tree.map(lambda x: x * jnp.nan, lora)
    updates, after = step(nan, before, True)
    assert is_paged(after[1])
    assert_same(after, before)
    assert_same(updates, jax.tree.map(jnp.zeros_like, lora))
    plain = optax.chain(clip, ADAMW)
    update = jax.jit(lambda state: plain.update(lora, state, lora))
    close(step(lora, after, False), update(update(plain.init(lora))[1]))


def test_a_host_state_whose_update_drops_skip_is_refused():
    lora, off = make_lora(), ql.optim.offload(ADAMW)
    without_keywords = optax.GradientTransformation(
        off.init, lambda *args: off.update(*args)
    )
    tx = ql.optim.skippable(without_keywords)
    with pytest.raises(ValueError, match=r"`tx` must keep.*'0/mu/experts/kernel/a'"):
        jax.eval_shape(lambda s: tx.update(lora, s, lora, skip=True), tx.init(lora))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ONE_TREE)
def test_one_tree(kind):
    base, lora = make_trees()

    def one_tree_gradients(tree, seed):
        frozen, lora = ql.split(tree)
        return ql.combine(jax.tree.map(jnp.zeros_like, frozen), gradients(lora, seed))

    tx = ONE_TREE[kind](paged(ADAMW))
    tree, state = train_tree(tx, ql.combine(base, lora), one_tree_gradients, 10)
    got_base, got_lora = ql.split(tree)
    assert_same(got_base, base)
    want, want_state = run(ADAMW, lora, 10)
    close(got_lora, want)
    # There are moments of adapters only, all of them in host memory.
    assert is_paged(state)

    def count(tree):
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count(state) == count(want_state)


@pytest.mark.slow
def test_an_nnx_optimizer():
    @nnx.jit
    def step(model, optimizer, x):
        wrt = nnx.DiffState(0, nnx.LoRAParam)

        def model_loss(model):
            return jnp.mean((model(x) - 1) ** 2)

        optimizer.update(model, nnx.grad(model_loss, argnums=wrt)(model))

    def train(tx):
        config = ql.QLoRAConfig(rank=4, block_size=32)
        model = ql.nnx.wrap(NNXMLP(rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)
        for _ in range(3):
            step(model, optimizer, jnp.ones((4, 64)))
        return nnx.state(model, nnx.LoRAParam), nnx.state(optimizer, nnx.OptState)

    want, got = train(ADAMW), train(ql.optim.offload(ADAMW))
    assert is_paged(got[1])
    assert_same(got[0], want[0])


def plain_tree():
    def normal_array(*shape):
        return normal(sum(shape), shape)

    return {
        "layers": {
            "scale": normal_array(4, 16),
            "gate": normal_array(4),
            "one": normal_array(4, 1),
        },
        "other": {"scale": normal_array(3, 16)},
        "temperature": normal_array(),
        "bias": normal_array(16),
        "row": normal_array(1, 4),
    }


def shapes(*trees):
    return {x.shape for x in jax.tree.leaves(trees)}


# A tree, the arrays declared as stacks, and the shapes that move layer by layer.
STACKS = {
    "adapters": (
        lambda: make_trees()[1], (), lambda t: shapes(t["layers"], t["experts"])
    ),
    "trained kernels": (
        lambda: make_trees(freeze_base=False)[0], (),
        lambda tree: {(5, 32, 16), (5, 32, 8), (2, 3, 32, 16)},
    ),
    "named": (
        plain_tree, ["layers/.*", "other/scale"],
        lambda tree: {(4, 16), (4,), (4, 1), (3, 16)},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", fast_and_slow(["adapters"], ["trained kernels", "named"])
)
def test_stacks_pass_layer_by_layer_and_others_whole(name):
    make, stacks, want = STACKS[name]
    tree = make()
    assert carried(ql.optim.offload(ADAMW, stacks=stacks), tree) == want(tree)
    assert carried(ql.optim.offload(ADAMW, layerwise=False), tree) == set()
    if name != "adapters":
        off = ql.optim.offload(ADAMW, stacks=stacks, layerwise=True)
        close(run(off, tree, 5), run(ADAMW, tree, 5))


@pytest.mark.slow
def test_low_precision_gradients_and_parameters():
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_lora())
    tx = optax.adamw(1e-2, mu_dtype=jnp.float32)
    close(run(paged(tx), low, 5), run(tx, low, 5), roundings=5)


def test_updates_of_another_dtype_than_gradients():
    lora = make_lora()
    cast = stateless(lambda u: u.astype(jnp.bfloat16))
    tx = optax.chain(optax.trace(0.9), cast)
    off = paged(tx)
    updates, _ = jax.jit(off.update)(lora, off.init(lora))
    assert_same(updates, jax.tree.map(lambda x: x.astype(jnp.bfloat16), lora))


def test_init():
    lora = make_lora()
    tx = optax.adamw(1e-2, mu_dtype=jnp.bfloat16)
    off, want = ql.optim.offload(tx), tx.init(lora)
    for init in (off.init, jax.jit(off.init)):
        assert is_paged(init(lora))
        assert_same(init(lora), want)
    state = jax.eval_shape(off.init, lora)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, want)


@pytest.mark.slow
def test_optax_tree_utils():
    lora, off = make_lora(), ql.optim.offload(ADAMW, stacks="head/.*")
    state = off.init(lora)
    assert int(optax.tree_utils.tree_get(state, "count")) == 0
    doubled = optax.tree_utils.tree_map_params(off, lambda x: x.ndim, state)
    assert jax.tree.leaves(doubled[0].mu) == [x.ndim for x in jax.tree.leaves(lora)]


@pytest.mark.slow
def test_an_eager_update():
    lora, off = make_lora(), paged(ADAMW)
    got = off.update(lora, off.init(lora), lora)
    assert is_paged(got[1])
    close(got, ADAMW.update(lora, ADAMW.init(lora), lora))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [("a", None, None), (None, "a", None)], ids=str)
def test_over_several_devices(spec, mesh):
    """Moments in host memory are sharded as their parameters are."""
    tree = {"layers": spread(normal(0, (4, 8, 6)), mesh, *spec)}
    off = ql.optim.offload(ADAMW, stacks="layers")
    with jax.set_mesh(mesh):
        got, want = run(off, tree, 5), run(ADAMW, tree, 5)
        assert is_paged(got[1])
        close(got, want)
        moments = got[1][0].mu["layers"].sharding
    sharding = NamedSharding(mesh, PartitionSpec(*spec), memory_kind="pinned_host")
    assert moments.is_equivalent_to(sharding, 3)


@pytest.mark.slow
def test_a_scan_over_steps():
    def train(tx):
        return train_in_a_scan(tx, make_lora(), gradients, 10)

    got = train(paged(ADAMW))
    assert is_paged(got[1])
    close(got, train(ADAMW))


@pytest.mark.slow
def test_a_donated_step_frees_the_state_and_compiles_once():
    lora, off = make_lora(), paged(ADAMW)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(1)
    def step(tree, state):
        updates, state = off.update(gradients(tree, 0), state, tree)
        return optax.apply_updates(tree, updates), state

    run_donated(step, (jax.tree.map(jnp.array, lora), off.init(lora)))


def with_head_on_the_host():
    lora = make_lora()
    return {**lora, "head": jax.device_put(lora["head"], jax.memory.Space.Host)}


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ql.optim.offload(optax.adamw), TypeError,
         "`tx` must be an optax.GradientTransformation"),
        (lambda: ql.optim.offload(ADAMW).init(with_head_on_the_host()), ValueError,
         r"device memory.*\['head/kernel/a', 'head/"),
        (lambda: ql.optim.offload(ADAMW, stacks=["bias", "x"]).init(plain_tree()),
         ValueError, r"`stacks` must match.*Got \['x'\]"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


RANK, LAYERS, WIDTHS = 64, 16, (2048, 4096)
MOMENTS = 2 * 4 * LAYERS * RANK * sum(WIDTHS)


def compile_for_tpu(tx, on_host, devices=1, only_init=False, rank=RANK):
    """Compiles an update, or `init`, for v5e chips; returns XLA's sizes in bytes."""
    axes = ("fsdp", "tensor")
    chips = chips_of("v5e")[:devices].reshape(-(-devices // 2), -1)
    mesh = Mesh(chips, axes, axis_types=(AxisType.Auto,) * 2)

    def put(x, memory="device"):
        # Split the longer axis of factors and of moments.
        longest = max(x.shape, default=0)
        spec = [axes if i and n == longest else None for i, n in enumerate(x.shape)]
        place = NamedSharding(mesh, PartitionSpec(*spec), memory_kind=memory)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    def make_trees(key):
        params = {"kernel": jnp.zeros((LAYERS, *WIDTHS), jnp.bfloat16)}
        config = ql.QLoRAConfig(rank=rank, fmt=None)
        return ql.init(key, params, config)[1]

    lora = jax.eval_shape(make_trees, jax.random.key(0))
    tx = paged(tx) if on_host else tx
    state = jax.eval_shape(tx.init, lora)

    def memory_kind(x):
        return "pinned_host" if on_host and x.ndim else "device"

    state = jax.tree.map(lambda x: put(x, memory_kind(x)), state)

    def step(lora, state):
        # A TPU chooses the layout of gradients: at ranks below 128 it swaps the axes of
        # the gradients of A, and of the moments of A.
        grads = jax.tree.map(jnp.sin, lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    lora = jax.tree.map(put, lora)
    if only_init:
        shardings = jax.tree.map(lambda x: x.sharding, state)
        lowered = jax.jit(tx.init, out_shardings=shardings).lower(lora)
    else:
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(lora, state)
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
    plain, offloaded, packed, split = (compiled_for_tpu()[name] for name in UPDATES)
    for name in ("argument", "output", "alias"):
        assert offloaded[f"host_{name}_size"] == MOMENTS, name
        assert split[f"host_{name}_size"] == MOMENTS / 4, name  # of each chip
    assert offloaded["host_temp_size"] == split["host_temp_size"] == 0
    saved = plain["argument_size"] - offloaded["argument_size"]
    assert MOMENTS <= saved < 1.01 * MOMENTS
    # A few of the 16 layers at once.
    assert offloaded["temp_size"] < MOMENTS / 3
    assert split["temp_size"] < MOMENTS / 12
    # 8-bit moments: no array of the stack is copied as a whole or to another layout.
    for name in ("argument", "output", "alias"):
        assert MOMENTS / 4 < packed[f"host_{name}_size"] < 1.1 * MOMENTS / 4, name
    assert packed["host_temp_size"] == 0
    assert packed["temp_size"] < MOMENTS / 3


@pytest.mark.slow
@needs_libtpu
def test_on_a_tpu_the_first_state_is_made_layer_by_layer():
    """At ranks below 128, a TPU swaps the axes of A's moments in memory.

    Moments in float32 then pass through the device array by array.
    """
    unsplit, split, packed = (compiled_for_tpu()[name] for name in INITS)
    assert unsplit["host_output_size"] == 4 * MOMENTS
    assert split["host_output_size"] == MOMENTS
    assert MOMENTS / 4 < packed["host_output_size"] < 1.1 * MOMENTS / 4
    for sizes in (unsplit, split, packed):
        assert sizes["host_temp_size"] == 0
        assert sizes["temp_size"] < 2 * sizes["host_output_size"] / LAYERS


UPDATES = ("resident", "offloaded", "8 bits", "four chips")
INITS = ("init", "init on four chips", "init of 8 bits")

if __name__ == "__main__":
    adamw, packed = optax.adamw(1e-4), ql.optim.adamw8bit(1e-4)
    cases = [(adamw, False), (adamw, True), (packed, True), (adamw, True, 4)]
    cases += [(adamw, True, n, True, 4 * RANK) for n in (1, 4)]
    cases += [(packed, True, 1, True)]
    for name, case in zip((*UPDATES, *INITS), cases, strict=True):
        print(json.dumps([name, compile_for_tpu(*case)]))
