"""8-bit AdamW against a NumPy definition of its codes, and against optax.adamw."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_same, slow_but_every, spread
from optimizer_helpers import carried, is_paged, train_in_a_scan, train_tree
from tolerances import assert_close, rounding

import qlora_jax as ql
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.optim.blocks import BLOCK, Blocks, from_blocks, grid_of, to_blocks


def dynamic_map(signed):
    """Returns the sorted map in float64, from the definition in the paper."""
    top_decade = 6 if signed else 7
    decades = range(0 if signed else 1, top_decade + 1)

    def value(e, j):
        return 10.0 ** (e - top_decade) * (0.1 + 0.9 * (j + 0.5) / 2**e)

    positive = [value(e, j) for e in decades for j in range(2**e)]
    negative = [-x for x in positive] if signed else []
    return np.array(sorted([*negative, 0.0, *positive, 1.0]))


MAPS = {True: dynamic_map(True), False: dynamic_map(False)}
SIGNED = pytest.mark.parametrize("signed", [True, False])


def definition(x, signed):
    """Returns codes and scales of `[blocks, 256]`, and the distances to ties."""
    table = MAPS[signed]
    scales = np.abs(x).max(1)
    shares = x.astype(np.float64) / np.where(scales > 0, scales, 1)[:, None]
    ties = (table[1:] + table[:-1]) / 2
    codes = np.searchsorted(ties, shares)
    if not signed:
        codes = np.where((x > 0) & (codes == 0), 1, codes)
    indices = np.clip(np.searchsorted(ties, shares), 1, 254)
    near = np.minimum(
        np.abs(shares - ties[indices]), np.abs(shares - ties[indices - 1])
    )
    return codes, scales, near / np.maximum(np.abs(shares), 1e-12)


def codes_of(blocks):
    """Returns codes of a grid `[layers, rows, columns]` from the bytes of its words."""
    words = np.asarray(blocks.codes)
    layers, quarter, columns = words.shape
    codes = [(words >> (8 * i)) & 255 for i in range(4)]
    return np.stack(codes, 2).reshape(layers, 4 * quarter, columns)


@functools.partial(jax.jit, static_argnames="signed")
def pack(x, signed):
    return to_blocks(x, signed)


@functools.partial(jax.jit, static_argnames="signed")
def round_trip(x, signed):
    return from_blocks(to_blocks(x, signed), x, signed)


def values(shape, signed, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10 ** rng.uniform(-8, 0, size=shape)
    return np.asarray(x if signed else np.abs(x), np.float32)


@SIGNED
def test_every_code_stands_for_the_value_of_the_map(signed):
    table = MAPS[signed]
    assert len(table) == 256
    # Each row is a block that has all codes and whose scale is 1.
    code = np.tile(np.arange(256, dtype=np.uint32) * 0x01010101, (1, 4, 1))
    blocks = Blocks(jnp.asarray(code), jnp.ones((1, 4, 4)))
    like = jnp.zeros((16, 256))
    got = np.asarray(from_blocks(blocks, like, signed))
    is_zero = table == 0
    assert not got[:, is_zero].any()
    # Compare entry by entry, also entries of 1e-7 times the largest.
    ratios = got[:, ~is_zero] / table[~is_zero]
    assert_close(ratios, np.ones_like(ratios), terms=4)
    # Encoding the value of a code gives that code again.
    np.testing.assert_array_equal(codes_of(pack(got, signed)), codes_of(blocks))


SHAPES = {
    "rows along the second axis": (2, 24, 512),
    "rows along the first": (2, 512, 24),
    "flattened": (2, 30, 140),
    "experts": (2, 3, 512, 8),
    "a matrix": (512, 12),
    "a vector": (5000,),
}


@pytest.mark.parametrize("name", slow_but_every(3, SHAPES))
def test_blocks_of_any_shape(name):
    shape = SHAPES[name]
    x = values(shape, True)
    grid, blocks = grid_of(shape), pack(x, True)
    layers = shape[0] if len(shape) > 2 else 1
    assert blocks.codes.shape[0] == blocks.scales.shape[0] == layers
    got = np.asarray(round_trip(x, True))
    # Layers and blocks are encoded independently of each other.
    if len(shape) > 2:
        for i in range(layers):
            np.testing.assert_array_equal(got[i], round_trip(x[i : i + 1], True)[0])

    def view_as_blocks(x):
        return x.reshape(layers, -1)

    if grid.axis is not None:

        def view_as_blocks(x):
            return np.moveaxis(x, grid.axis, -1)

    flat, decoded = (
        view_as_blocks(x).reshape(layers, -1),
        view_as_blocks(got).reshape(layers, -1),
    )
    missing = -flat.shape[1] % BLOCK
    flat = np.pad(flat, ((0, 0), (0, missing))).reshape(-1, BLOCK)
    decoded = np.pad(decoded, ((0, 0), (0, missing))).reshape(-1, BLOCK)
    codes, scales, near = definition(flat, True)
    want = MAPS[True][codes] * scales[:, None]
    is_clear = near > 1e-6
    np.testing.assert_array_equal(decoded[is_clear] == 0, want[is_clear] == 0)
    is_clear &= want != 0
    ratios = decoded[is_clear] / want[is_clear]
    assert_close(ratios, np.ones_like(ratios), terms=4)


@pytest.mark.parametrize(
    ("column", "value"), [(0, np.nan), (100, np.inf), (255, -np.inf)]
)
def test_a_value_that_is_not_finite_shows(column, value):
    x = values((16, 512), True)
    x[3, column] = value
    got = np.asarray(round_trip(x, True))
    wrong = np.zeros((16, 512), bool)
    wrong[3, :256] = True
    np.testing.assert_array_equal(np.isnan(got), wrong)
    # Other rows share its words.
    clean = np.where(np.isfinite(x), x, 0)
    np.testing.assert_array_equal(got[~wrong], round_trip(clean, True)[~wrong])


@SIGNED
def test_zeros_are_exact(signed):
    x = values((16, 512), signed)
    x[:, 1::2], x[2] = 0, 0
    got = np.asarray(round_trip(x, signed))
    np.testing.assert_array_equal(got[x == 0], 0)
    assert not np.isnan(got).any()


def test_a_positive_second_moment_is_never_zero():
    x = np.full((16, 256), 1e-30, np.float32)
    x[:, 0] = 1e10  # the quotient is below the smallest float32
    assert np.all(np.asarray(round_trip(x, False)) > 0)


def make_tree(rank=8):
    shapes = {"layers": (3, 512, 256), "experts": (2, 3, 512, 24), "head": (700, 24)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    config = ql.QLoRAConfig(rank=rank, fmt=None)
    return ql.init(jax.random.key(0), params, config)[1]


def gradients(tree, seed):
    """Returns gradients of very different sizes, so that blocks use all of the map."""
    leaves, treedef = jax.tree.flatten(tree)

    def wave(i, x):
        return jnp.sin(jnp.arange(x.size) * (i + 1.3) + seed).reshape(x.shape)

    return treedef.unflatten([wave(i, x) ** 3 * 1e-2 for i, x in enumerate(leaves)])


def run(tx, tree, steps=4, **extra):
    return train_tree(tx, tree, gradients, steps, **extra)


@functools.cache
def trained():
    return run(ql.optim.adamw8bit(1e-2), make_tree())


def assert_alike(got, want):
    """Asserts that trees agree, except for a few values that follow from ties.

    Another program rounds sums differently. A moment at a tie may then get a
    neighboring code. At a learning rate of 1e-2 that is less than a twentieth of an
    update.
    """
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if x.dtype == np.uint32:
            x, y = x.view(np.uint8).astype(int), y.view(np.uint8).astype(int)
            assert np.abs(x - y).max() <= 1 and np.mean(x != y) < 1e-3
        else:
            differs = np.abs(x - y) > rounding(4096) * (1 + np.abs(y))
            assert np.mean(differs) < 1e-3
            assert np.abs(x - y).max() < 1e-2 / 20


def test_steps_are_those_of_the_algorithm():
    """Loshchilov and Hutter 2019, algorithm 2, with moments rounded between steps."""
    w = np.random.default_rng(0).normal(size=(16, 256)).astype(np.float32)
    tx = ql.optim.adamw8bit(0.1, 0.8, 0.95, 1e-6, weight_decay=0.2)
    step, params = jax.jit(tx.update), jnp.asarray(w)
    state, w = tx.init(params), w.astype(np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, 5):
        g = values(w.shape, True, seed=t)
        updates, state = step(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, updates)
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g.astype(np.float64) ** 2
        adam = m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-6)
        w = w - 0.1 * (adam + 0.2 * w)
        assert_close(params, w)
        for moment, x, signed in ((state[0].mu, m, True), (state[0].nu, v, False)):
            codes, scales, near = definition(x, signed)
            got, is_clear = codes_of(moment)[0], near > 1e-5
            assert is_clear.mean() > 0.99
            np.testing.assert_array_equal(got[is_clear], codes[is_clear])
            assert_close(moment.scales.ravel(), scales)
            # Both continue from the same codes.
            x[:] = MAPS[signed][got] * np.asarray(moment.scales, np.float64).reshape(
                16, 1
            )
    assert int(state[0].count) == 4


def test_small_arrays_are_those_of_adamw():
    tree = {"bias": jnp.arange(4095.0) / 100, "none": None, "scalar": jnp.float32(3)}

    def train(adamw):
        return run(adamw(1e-2, weight_decay=0.1, eps_root=1e-12), tree)

    assert_alike(train(ql.optim.adamw8bit), train(optax.adamw))


def test_the_state_takes_a_quarter_of_the_bytes():
    tree = {"a": jnp.zeros((3, 512, 8)), "b": jnp.zeros((3, 8, 1024))}

    def bytes_of(tree):
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    state = ql.optim.adamw8bit(1e-2).init(tree)
    # A byte per value and four bytes per block.
    assert (
        bytes_of(state[0].mu)
        == bytes_of(state[0].nu)
        == bytes_of(tree) / 4 * (1 + 4 / 256)
    )
    assert 3.9 < bytes_of(optax.adamw(1e-2).init(tree)) / bytes_of(state) < 4


@pytest.mark.slow
def test_a_scan_over_steps():
    tx = ql.optim.adamw8bit(1e-2)
    assert_alike(train_in_a_scan(tx, make_tree(), gradients, 4), trained())


def test_vmap():
    tx = ql.optim.adamw8bit(1e-2)
    trees = {"w": jnp.asarray(values((2, 16, 256), True))}

    def step(tree):
        return tx.update(tree, tx.init(tree), tree)

    got = jax.jit(jax.vmap(step))(trees)
    for i in range(2):
        member = jax.tree.map(lambda x, i=i: x[i], trees)
        assert_alike(jax.tree.map(lambda x, i=i: x[i], got), jax.jit(step)(member))


@pytest.mark.slow
def test_schedules_masks_and_what_optax_wraps():
    tree = make_tree()
    schedule = optax.linear_schedule(1e-2, 1e-3, 4)
    plain = run(ql.optim.adamw8bit(schedule), tree)
    injected = run(optax.inject_hyperparams(ql.optim.adamw8bit)(schedule), tree)
    assert_alike(injected[0], plain[0])
    several = optax.MultiSteps(ql.optim.adamw8bit(1e-2), 2)
    assert int(run(several, tree)[1].inner_opt_state[0].count) == 2
    labels = {"layers": "a", "experts": "b", "head": "b"}
    parts = {"a": ql.optim.adamw8bit(1e-2), "b": optax.set_to_zero()}
    partitioned = run(optax.partition(parts, labels), tree)[0]
    assert_alike(partitioned["layers"], trained()[0]["layers"])
    assert_same(partitioned["head"], tree["head"])
    # Without weight decay, updates do not depend on the parameters.
    w, zeros = {"w": jnp.ones((16, 256))}, {"w": jnp.zeros((16, 256))}

    def update(tx, params):
        return tx.update(w, tx.init(w), params)[0]

    mask = {"weight_decay": 1.0, "mask": lambda params: {"w": False}}
    want = update(ql.optim.adamw8bit(0.1), zeros)
    assert_same(update(ql.optim.adamw8bit(0.1, **mask), w), want)


@pytest.mark.slow
def test_optax_tree_utils():
    tree, tx = make_tree(), ql.optim.adamw8bit(1e-2)
    state = trained()[1]
    assert int(optax.tree_utils.tree_get(state, "count")) == 4
    mu = optax.tree_utils.tree_get(state, "mu")
    assert isinstance(mu["head"]["kernel"].a, Blocks)
    zeros = optax.tree_utils.tree_map_params(tx, jnp.zeros_like, state)
    assert int(zeros[0].count) == 4
    assert jax.tree.structure(zeros) == jax.tree.structure(tx.init(tree))
    assert not any(np.any(x) for x in jax.tree.leaves(zeros[0].nu))


@functools.cache
def language_model():
    """Returns a small decoder, its adapters, and batches that repeat.

    Rows come from a random Markov chain in which each of 64 tokens has four equally
    likely successors, so no model has a loss below log 4 nats on new rows.
    """
    rng = np.random.default_rng(0)
    successors = rng.integers(0, 64, (64, 4))
    rows = np.zeros((8, 8, 17), np.int32)  # eight batches, which repeat
    for t in range(1, 17):
        choice = rng.integers(0, 4, (8, 8))
        rows[..., t] = successors[rows[..., t - 1], choice]
    config = DecoderConfig(64, 128, 128, 2, num_heads=2, num_kv_heads=2)
    decoder, key = Decoder(config), jax.random.key(0)
    params = jax.jit(decoder.init)(key, rows[0, :, :-1])["params"]
    targets = "layers/.*(q|v|up|down)_proj/kernel"
    config = ql.QLoRAConfig(rank=32, fmt=None, targets=targets)
    base, lora = ql.init(key, params, config)
    return ql.linen.wrap(decoder, scanned=decoder.scanned), base, lora, rows


@functools.cache
def language_model_losses(name):
    model, base, lora, rows = language_model()
    lora = jax.tree.map(jnp.array, lora)  # it is donated
    tx = ql.optim.adamw8bit(3e-3) if "8bit" in name else optax.adamw(3e-3)
    if "offloaded" in name:
        tx = ql.optim.offload(tx, layerwise=True)

    def loss(lora, batch):
        logits = model.apply({"params": base, "lora": lora}, batch[:, :-1])
        token_losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batch[:, 1:]
        )
        return token_losses.mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora, state, batch):
        value, grads = jax.value_and_grad(loss)(lora, batch)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, losses = tx.init(lora), []
    for number in range(300):
        lora, state, value = step(lora, state, rows[number % 8])
        losses.append(float(value))
    blocks = [x for x in jax.tree.leaves(state) if x.dtype == jnp.uint32]
    assert ("8bit" in name) == bool(blocks)
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw8bit", "adamw8bit, offloaded"])
def test_losses_of_a_language_model_are_close_to_those_of_adamw(name):
    """Final perplexities, averaged over a pass over the data, agree to 3%."""

    def smooth(x):
        return np.convolve(x, np.ones(8) / 8, "valid")

    got, want = map(smooth, map(language_model_losses, (name, "adamw")))
    assert want[-1] < 0.2 * want[0]
    assert np.abs(got - want).max() < 0.06
    assert abs(got[-1] - want[-1]) < np.log(1.03)


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [True, False])
def test_offloaded_moments(layerwise):
    tree = make_tree()
    off = ql.optim.offload(ql.optim.adamw8bit(1e-2), layerwise=layerwise)
    got = run(off, tree)
    assert is_paged(got[1])
    assert_alike(got, trained())
    if layerwise:
        # Loops carry the stacks of moments with layers as the first axis.
        host = carried(off, tree)
        stacks = {(3, 2, 512), (3, 4, 4), (2, 6, 512), (2, 4, 12)}
        assert stacks <= host and {shape[0] for shape in host} == {2, 3}


SPECS = {"a": (None, "a", None), "b": (None, None, "a"), "m": ("a", None)}


@pytest.mark.slow
def test_over_several_devices(mesh):
    shapes = {"a": (2, 1024, 8), "b": (2, 8, 520), "m": (512, 16)}
    tree = {k: jnp.asarray(values(shape, True)) for k, shape in shapes.items()}
    tx = ql.optim.adamw8bit(1e-2)
    step = jax.jit(lambda g, s, params: tx.update(g, s, params))
    want, got = tx.init(tree), None
    with jax.set_mesh(mesh):
        split = {k: spread(x, mesh, *SPECS[k]) for k, x in tree.items()}
        got = tx.init(split)
        for seed in range(2):

            def scale_by(tree, n=seed + 1.0):
                return jax.tree.map(lambda x: x * n, tree)

            updates, got = step(scale_by(split), got, split)
            expected_updates, want = step(scale_by(tree), want, tree)
            assert_alike(updates, expected_updates)
            assert_alike(got, want)
    for k, x in updates.items():
        assert x.sharding.is_equivalent_to(split[k].sharding, x.ndim)
    # Columns run along the split axis, so each device has a quarter of the codes.
    codes = got[0].mu["a"].codes
    assert codes.sharding.shard_shape(codes.shape) == (2, 2, 256)


def update_with(**changed):
    tx, tree = ql.optim.adamw8bit(1e-2), {"w": jnp.ones((16, 256)), "b": jnp.ones(3)}
    return tx.update({**tree, **changed}, tx.init(tree), {**tree, **changed})


NOT_FLOAT = {"w": jnp.ones(3), "codes": jnp.ones(3, jnp.uint8), "z": jnp.ones(3) * 1j}
adamw = ql.optim.adamw8bit


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: adamw(1, b1=1.0), r"`b1` must be in \[0, 1\)\. Got 1\.0\."),
        (lambda: adamw(1, b2=-0.1), r"`b2` must be in \[0, 1\)\. Got -0\.1\."),
        (lambda: adamw(1, eps=0), "`eps` must be positive and finite. Got 0."),
        (lambda: adamw(1, eps=np.nan), "`eps` must be positive and finite. Got nan."),
        (lambda: adamw(1).init(NOT_FLOAT), r"real float.*codes: uint8.*z: complex64"),
        (lambda: update_with(w=jnp.ones((32, 256))), r"`state` must come.*\['w'\]"),
        (lambda: update_with(w=jnp.ones(16)), r"`state` must come.*\['w'\]"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()
