"""`ql.bank` and `ql.select`: several adapters over one base in one batch."""

import contextlib
import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import make_mesh, normal, randomized, relative_error, trees_of
from integration_models import LinenStack
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax._jax.modes import split_as

IDS = np.array([1, 0, -1, 2, 1, 0, 2, -1])
SHAPES = {"up": (64, 128), "down": (128, 64), "stack": (2, 64, 64)}


def trees(**settings):
    """Returns a base, and three adapters of different ranks and scalings."""
    params = {
        k: {"kernel": normal(i, s) / 8} for i, (k, s) in enumerate(SHAPES.items())
    }
    initialized = [
        trees_of(params, rank=rank, alpha=3.0, block_size=16, **settings)
        for rank in (4, 2, 3)
    ]
    loras = [randomized(lora, seed) for seed, (_, lora) in enumerate(initialized)]
    if not settings:
        del loras[1]["down"]
    return initialized[0][0], loras


def forward(base, lora, x):
    """Runs a layer up and a layer down, then a scan over two layers."""
    h = jnp.tanh(ql.apply(base["up"], lora["up"], x))
    h = ql.apply(base["down"], lora.get("down"), h)

    def layer(h, args):
        y = jnp.tanh(ql.apply(*args, h))
        return h + split_as(y, h), None

    args = base["stack"]["kernel"], lora["stack"]["kernel"]
    return jax.lax.scan(jax.checkpoint(layer), h, args)[0]


def by_hand(base, loras, ids, x):
    """Computes each row separately with NumPy's weights in float64."""
    weights = jax.tree.map(lambda w: np.asarray(w, np.float64), ql.dequantize(base))

    def kernel(name, adapter_id):
        adapter = loras[adapter_id].get(name) if adapter_id >= 0 else None
        if adapter is None:
            return weights[name]["kernel"]
        a, b = (
            np.asarray(x, np.float64)
            for x in (adapter["kernel"].a, adapter["kernel"].b)
        )
        change = adapter["kernel"].scaling * (a @ b)
        return weights[name]["kernel"] + change.reshape(SHAPES[name])

    rows = []
    for adapter_id, row in zip(ids, np.asarray(x, np.float64), strict=True):
        h = np.tanh(row @ kernel("up", adapter_id)) @ kernel("down", adapter_id)
        for w in kernel("stack", adapter_id):
            h = h + np.tanh(h @ w)
        rows.append(h)
    return np.stack(rows)


def test_each_row_has_its_adapter():
    base, loras = trees()
    bank, x = ql.bank(loras, capacity=5), normal(9, (8, 3, 64))
    got = jax.jit(lambda ids: forward(base, ql.select(bank, ids), x))(IDS)
    assert_close(got, by_hand(base, loras, IDS, x))
    for adapter_id in (-1, 2):
        want = by_hand(base, loras, [adapter_id] * 8, x)
        assert_close(forward(base, ql.select(bank, adapter_id), x), want)
    alone = jax.jit(forward)(base, {"up": {}, "stack": {"kernel": None}}, x)
    assert_close(got[2], alone[2], terms=64)


@pytest.mark.newest
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_bank_on_a_mesh(kind):
    mesh, x = make_mesh(kind, axes=("fsdp", "tensor")), normal(9, (8, 3, 64))
    rules = {"up/kernel": P("fsdp", "tensor"), "down/kernel": P("tensor", "fsdp")}
    rules |= {"stack/kernel": P(None, "fsdp", "tensor")}
    base, loras = trees()

    def reshard(lora):
        return ql.sharding.place(base, lora, mesh, rules, rows=["fsdp"])

    bank = ql.bank([reshard(lora)[1] for lora in loras])
    a = bank.lora["up"]["kernel"].a
    assert tuple(a.sharding.spec)[:2] == (None, ("fsdp", "tensor"))
    put = jax.device_put(x, jax.NamedSharding(mesh, P("fsdp")))

    def loss(lora, base, x):
        return sum_of_squares(bank, base, IDS, x)(lora)

    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss))(bank.lora, reshard(loras[0])[0], put)
    bank = ql.bank(loras)
    assert_close(got, jax.jit(jax.value_and_grad(loss))(bank.lora, base, x))


def sum_of_squares(bank, base, ids, x):
    return lambda lora: jnp.sum(
        forward(base, ql.select(dataclasses.replace(bank, lora=lora), ids), x) ** 2
    )


@pytest.mark.newest
def test_rows_give_gradients_to_their_adapters():
    """Gradients equal those of the adapter's own rows. Padding and others get zeros."""
    base, loras = trees(dropout=0.1)
    bank, x = ql.bank(loras, capacity=4), normal(9, (8, 3, 64))
    grads = jax.jit(jax.grad(sum_of_squares(bank, base, IDS, x)))(bank.lora)
    alone = jax.jit(jax.grad(lambda lora, x: jnp.sum(forward(base, lora, x) ** 2)))
    for adapter_id in range(len(loras)):
        # An adapter with the bank's scaling, which is that of the largest rank.
        lora = bank[adapter_id]
        expected = jax.tree.leaves(alone(lora, x[IDS == adapter_id]))
        for got, want in zip(jax.tree.leaves(grads), expected, strict=True):
            own_block = tuple(map(slice, want.shape))
            assert_close(got[adapter_id][own_block], want)
            assert np.count_nonzero(got[adapter_id]) == np.count_nonzero(want)
    assert not any(np.any(got[3]) for got in jax.tree.leaves(grads))


def test_adapters_come_and_go_without_compiling():
    base, loras = trees()
    x = normal(9, (8, 3, 64))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(bank, ids):
        return forward(base, ql.select(bank, ids), x)

    bank = ql.bank(loras[:1], capacity=3)
    for adapter_id, lora in [(1, loras[1]), (2, loras[2]), (1, loras[2])]:
        bank = bank.with_adapter(adapter_id, lora)
        got = run(bank, np.full(8, adapter_id))
        assert_close(got, by_hand(base, [lora], [0] * 8, x))
    # The bank has the scaling of the adapter with the largest rank.
    chex.assert_trees_all_equal(*jax.tree.map(np.asarray, (bank[0], loras[0])))
    assert bank[2]["up"]["kernel"].rank == loras[2]["up"]["kernel"].rank
    assert_close(ql.merge(base, bank[2]), ql.merge(base, loras[2]), terms=64)


def test_unused_places_add_nothing():
    x, ids = normal(9, (2, 3, 64)), np.array([0, 1])
    base, (lora, *_) = trees()
    got = forward(base, ql.select(ql.bank([lora], capacity=2), ids), x)
    assert_close(got, by_hand(base, [lora], [0, -1], x))


@pytest.mark.newest
def test_each_adapter_may_have_an_optimizer_of_its_own():
    base, loras = trees()
    loras[1] = loras[0]
    bank, x, ids = ql.bank(loras[:2]), normal(9, (4, 3, 64)), np.array([0, 0, 1, 1])
    x = jnp.concatenate([x[:2], x[:2]])
    optimizer = optax.inject_hyperparams(optax.adamw)(learning_rate=0.0)
    state = jax.vmap(optimizer.init)(bank.lora)
    state.hyperparams["learning_rate"] = jnp.array([1e-3, 1e-2])
    lora = bank.lora
    for _ in range(2):
        grads = jax.jit(jax.grad(sum_of_squares(bank, base, ids, x)))(lora)
        updates, state = jax.vmap(optimizer.update)(grads, state, lora)
        lora = optax.apply_updates(lora, updates)
    trained = dataclasses.replace(bank, lora=lora)
    for adapter_id, rate in enumerate([1e-3, 1e-2]):
        alone, alone_optimizer = loras[0], optax.adamw(rate)
        state = alone_optimizer.init(alone)

        def loss(lora):
            return jnp.sum(forward(base, lora, x[:2]) ** 2)

        for _ in range(2):
            grads = jax.jit(jax.grad(loss))(alone)
            updates, state = alone_optimizer.update(grads, state, alone)
            alone = optax.apply_updates(alone, updates)
        assert_close(trained[adapter_id], alone)


@pytest.mark.newest
def test_models_of_flax_take_chosen_adapters():
    x, config = normal(9, (3, 2, 64)), ql.QLoRAConfig(rank=4)
    ids = jnp.array([1, -1, 0])
    model = LinenStack(functools.partial(nn.Dense, 64), length=2)
    params = model.init(jax.random.key(0), x)["params"]
    base, lora = ql.linen.init(jax.random.key(1), model, params, config, x)
    loras = [randomized(lora, seed) for seed in (1, 2)]
    bank, wrapped = ql.bank(loras), ql.linen.wrap(model, scanned="layers")
    run = jax.jit(lambda lora: wrapped.apply({"params": base, "lora": lora}, x))
    got = run(ql.select(bank, ids))
    for row, adapter_id in enumerate(ids):
        want = run({} if adapter_id < 0 else loras[adapter_id])
        assert_close(got[row], want[row])
        assert_close(run(ql.select(bank, adapter_id))[row], want[row])
    layer = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    layer = ql.nnx.wrap(layer, config, rngs=nnx.Rngs(1))
    base, lora = ql.nnx.split(layer)
    loras = [randomized(lora, seed) for seed in (1, 2)]
    run = nnx.jit(lambda model, x: model(x))
    got = run(ql.nnx.join(layer, base, ql.select(ql.bank(loras), ids)), x)
    for row, adapter_id in enumerate(ids):
        joined = ql.nnx.join(layer, base, loras[max(adapter_id, 0)])
        with (
            ql.nnx.disable_adapters(joined)
            if adapter_id < 0
            else contextlib.nullcontext()
        ):
            assert_close(got[row], run(joined, x)[row])


def test_the_base_is_decoded_once_and_a_bank_is_as_large_as_its_adapters():
    """6.0 MB per adapter (MaxText issue 5129 reports 1,194 MB for one of 6.1)."""
    config = ql.QLoRAConfig(rank=16)

    def make_params():
        return {"kernel": jnp.zeros((23, 2048, 2048), jnp.bfloat16)}

    base, lora = jax.eval_shape(
        lambda: ql.init(jax.random.key(0), make_params(), config)
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(lora))
    assert size == 23 * 2 * 2048 * 16 * 4
    bank = jax.eval_shape(lambda *loras: ql.bank(loras), *[lora] * 8)
    assert bank.nbytes == 8 * size

    def forward(base, lora, x):
        def layer(x, args):
            return (ql.apply(*args, x), None)

        return jax.lax.scan(layer, x, (base["kernel"], lora["kernel"]))[0]

    def run(base, bank, ids, x):
        return forward(base, ql.select(bank, ids), x)

    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    x = jax.ShapeDtypeStruct((8, 1, 2048), jnp.float32)
    single = jax.jit(forward).lower(base, lora, x).compile()
    several = jax.jit(run).lower(base, bank, ids, x).compile()

    def loops(program):
        return program.as_text().count(" while(")

    assert loops(several) == loops(single) > 0

    def extra_bytes(name):
        return getattr(several.memory_analysis(), name) - getattr(
            single.memory_analysis(), name
        )

    assert extra_bytes("argument_size_in_bytes") == bank.nbytes - size + 8 * 4
    # Allows a transposed copy [layers, 8, ...], and A and B of each row in one layer.
    assert extra_bytes("temp_size_in_bytes") < 1.4 * bank.nbytes


def test_gradients_keep_no_adapters_of_rows():
    """This needs no `jax.checkpoint`. Keeping them took twice as much memory."""
    layers, width, rank, num_rows = 16, 512, 16, 8
    config = ql.QLoRAConfig(rank=rank)
    params = {"kernel": jax.ShapeDtypeStruct((layers, width, width), jnp.float32)}
    init = functools.partial(ql.init, jax.random.key(0), config=config)
    base, lora = jax.eval_shape(init, params)
    bank = jax.eval_shape(lambda lora: ql.bank([lora, lora]), lora)

    def loss(tree, base, bank, ids, x):
        chosen = ql.select(dataclasses.replace(bank, lora=tree), ids)

        def layer(x, args):
            return (jnp.tanh(ql.apply(*args, x)), None)

        return jnp.sum(jax.lax.scan(layer, x, (base["kernel"], chosen["kernel"]))[0])

    ids = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    x = jax.ShapeDtypeStruct((num_rows, 4, width), jnp.float32)
    program = jax.jit(jax.grad(loss)).lower(bank.lora, base, bank, ids, x).compile()
    of_all_layers = 4 * layers * num_rows * 2 * width * rank
    used = program.memory_analysis().temp_size_in_bytes
    assert used < of_all_layers


def test_what_does_not_fit_is_refused():
    base, (first, second, third) = trees()
    _, (dora, *_) = trees(use_dora=True)
    bank = ql.bank([second, second], capacity=3)
    half = ql.bank([jax.tree.map(lambda x: x.astype(jnp.bfloat16), second)])
    misplaced = {"up": {"kernel": first["down"]["kernel"]}}
    up = {"up": {"kernel": jnp.ones((64, 4))}}
    _, trained = ql.init(
        jax.random.key(0), up, ql.QLoRAConfig(targets=[], trainable=".*")
    )

    def choose(*ids):
        return ql.select(bank, np.array(ids))

    for call, words in (
        (lambda: ql.bank([first, second], capacity=1), "and at most `capacity`. Got 2"),
        (lambda: ql.bank([{}, {}]), "`adapters` must have an adapter. Got none"),
        (lambda: ql.bank([first], dropout=1.5), r"`dropout` must be in .* Got 1.5"),
        (lambda: ql.bank([trained], dropout=0.1), "up/kernel, .* a trained cannot be"),
        (lambda: ql.bank([first, misplaced]),
         "up/kernel, adapter 1: it must be a lora"),
        (lambda: ql.bank([dora, dora]), "a dora cannot be in a bank"),
        (lambda: bank.with_adapter(0, first),
         "up/kernel, adapter 0: its rank must be a"),
        (lambda: bank.with_adapter(0, second | {"down": first["down"]}),
         "no adapter there"),
        (lambda: half.with_adapter(0, second),
         "A must fit the bank's dtype bfloat16. Go"),
        (lambda: ql.select(bank, np.array(3)), "`ids` must be from -1 to 2"),
        (lambda: choose(0, -2), "`ids` must be from -1 to 2"),
        (lambda: forward(base, choose(0, 1), jnp.ones((3, 64))),
         r"Got 2 for an input \(3, 64\)"),
        (lambda: ql.merge(base, choose(0, 1)), "one number where weights are merged"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(IndexError, match="the bank has places 0 to 2. Got 3"):
        bank[3]
    for call in (ql.bank, lambda tree: ql.merge_adapters(tree, [1.0])):
        with pytest.raises(TypeError, match="a list of lora trees. Got dict"):
            call(first)
    with pytest.raises(TypeError, match="a list of lora trees. Got generator"):
        ql.bank(tree for tree in [first])
    with pytest.raises(TypeError, match="`capacity` must be an integer. Got 2.5"):
        ql.bank([first], capacity=2.5)
    with pytest.raises(TypeError, match="must be integers. Got float"):
        ql.select(bank, 1.0)
    out = jax.jit(lambda i: forward(base, ql.select(bank, i), jnp.ones((1, 64))))
    assert np.isnan(out(3)).all() and not np.isnan(out(1)).any()


@pytest.mark.parametrize("dropout", [0, np.float32(0)])
def test_equal_dropouts_of_other_types_are_equal(dropout):
    _, (first, *_) = trees()
    bank = ql.bank([first], capacity=2, dropout=dropout)
    assert len(bank.with_adapter(1, first)) == 2


def test_a_chosen_adapter_merges_as_itself():
    base, (first, *_, third) = trees()
    bank = ql.bank([first, third])
    for adapter_id, want in [(0, ql.merge(base, first)), (-1, ql.dequantize(base))]:
        chex.assert_trees_all_equal(ql.merge(base, ql.select(bank, adapter_id)), want)


@pytest.mark.parametrize("ids", [1, IDS])
@pytest.mark.parametrize("optimize", [optax.masked, "partition"])
def test_only_a_and_b_of_chosen_adapters_are_trained(optimize, ids):
    base, (lora, *_) = trees()
    base, lora = base["up"], lora["up"]
    chosen = ql.select(ql.bank([lora, lora, lora]), ids)
    names = {
        path[-1].name
        for path, label in jax.tree_util.tree_leaves_with_path(ql.lora_labels(chosen))
        if label == "lora"
    }
    assert names == {"a", "b"}
    tree = ql.combine(base, chosen)
    x = normal(9, (len(IDS), 64))

    def loss(tree, x):
        return jnp.sum(ql.apply(*ql.split(tree), x))

    value, grads = jax.jit(ql.value_and_grad(loss))(tree, x)
    want, (grad_a, grad_b) = jax.value_and_grad(
        lambda arrays: loss(ql.combine(base, with_arrays(chosen, *arrays)), x)
    )((chosen["kernel"].adapters.a, chosen["kernel"].adapters.b))
    assert_close(value, want)
    assert_close(grads["kernel"].lora.adapters.a, grad_a)
    assert_close(grads["kernel"].lora.adapters.b, grad_b)
    # A step of AdamW, whose weight decay moves whatever it takes for trained.
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    if optimize == "partition":
        parts = {"lora": adamw, "frozen": optax.set_to_zero()}
        optimizer = optax.partition(parts, ql.lora_labels)
    else:
        optimizer = optax.masked(adamw, ql.lora_mask)
    updates, _ = optimizer.update(grads, optimizer.init(tree), tree)
    new = optax.apply_updates(tree, updates)["kernel"].lora
    old = chosen["kernel"]
    np.testing.assert_array_equal(new.ids, old.ids)
    assert new.adapters.scaling == old.adapters.scaling
    assert np.any(new.adapters.b != old.adapters.b)


def with_arrays(chosen, a, b):
    adapters = dataclasses.replace(chosen["kernel"].adapters, a=a, b=b)
    return {"kernel": dataclasses.replace(chosen["kernel"], adapters=adapters)}


@pytest.mark.parametrize("use_jit", [False, True])
def test_one_layer_of_a_chosen_stack(use_jit):
    base, loras = trees()
    base, loras = base["stack"]["kernel"], [lora["stack"] for lora in loras]
    chosen = ql.select(ql.bank(loras), 2)["kernel"]

    def second_layer(lora):
        return lora.at((1,))

    layer = (jax.jit(second_layer) if use_jit else second_layer)(chosen)
    x = normal(9, (3, 64))
    got = ql.apply(jax.tree.map(lambda array: array[1], base), layer, x)
    w, lora = np.asarray(ql.dequantize(base)[1], np.float64), loras[2]["kernel"]
    change = lora.scaling * np.asarray(lora.a[1]) @ np.asarray(lora.b[1])
    assert_close(got, x @ (w + change))


@pytest.mark.newest
def test_an_adapter_on_an_adapted_model():
    """The first adapter is frozen. Loss and gradient are those on merged weights."""
    base, (first, second, _) = trees()
    x = normal(9, (8, 3, 64))

    def loss(new, first):
        return jnp.sum(forward(base, ql.merge_adapters([first, new], [1, 1]), x) ** 2)

    def on_merged(new):
        return jnp.sum(forward(ql.merge(base, first), {"down": None, **new}, x) ** 2)

    got, grads = jax.jit(jax.value_and_grad(loss))(second, first)
    want, expected_grads = jax.value_and_grad(on_merged)(second)
    assert_close(got, want)
    assert_close(grads, expected_grads)
    merged = ql.merge(base, first, requantize=False)
    again, new = ql.init(jax.random.key(0), merged, ql.QLoRAConfig(rank=2))
    assert relative_error(forward(again, new, x), forward(base, first, x)) < 0.2
