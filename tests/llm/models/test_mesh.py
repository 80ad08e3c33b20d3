"""A decoder on a mesh with data, FSDP and tensor axes trains as on one device."""

import contextlib
import functools

import hlo_collectives
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from attention_oracle import attention
from flax import nnx
from hlo_text import OPERATION, collectives, most_floats
from jax.sharding import AxisType, PartitionSpec
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.models.config import DecoderConfig
from qlora_jax.llm.models.constraints import split_attention
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.sharding import place_arguments
from qlora_jax.llm.train.arrays import put_rows

pytestmark = pytest.mark.slow
SIZES = dict(vocab_size=256, hidden_size=128, intermediate_size=256, num_layers=2)
CONFIG = DecoderConfig(**SIZES, num_heads=8, num_kv_heads=4)
TIED = DecoderConfig(**SIZES, num_heads=8, num_kv_heads=4, tie_embeddings=True)
QLORA = ql.QLoRAConfig(rank=4, block_size=16, targets="layers/.*_proj/kernel")
# SGD, since Adam divides gradients by their size, which amplifies the rounding of
# gradients near zero.
OPTIMIZER = optax.sgd(0.5, momentum=0.9)
MESHES = {
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "fsdp and tensor": {"fsdp": 4, "tensor": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
BATCH = 8


def batches(count=5, seed=0):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        ids = rng.integers(0, 256, (BATCH, 8)).astype(np.int32)
        positions = np.broadcast_to(np.arange(8, dtype=np.int32), ids.shape)
        weights = rng.integers(0, 2, ids.shape).astype(np.float32)
        targets = np.roll(ids, -1, 1)
        batch = data.Batch(ids, ids * 0 + 1, positions, positions, targets, weights)
        result.append(batch)
    return result


def make_mesh(sizes, kind="Auto"):
    kinds = (getattr(AxisType, kind),) * len(sizes)
    return jax.make_mesh((*sizes.values(),), (*sizes,), axis_types=kinds)


def in_numpy(tree):
    """Returns NumPy arrays, which JAX splits without compiling for each shape."""

    def is_key(x):
        return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)

    return jax.tree.map(lambda x: x if is_key(x) else np.asarray(x), tree)


@functools.cache
def trees(config):
    decoder, tokens = Decoder(config), jnp.zeros((1, 2), jnp.int32)
    params = jax.jit(decoder.init)(jax.random.key(0), tokens)["params"]
    base_and_lora = ql.linen.init(jax.random.key(1), decoder, params, QLORA, tokens)
    return in_numpy(base_and_lora)


@functools.cache
def wrapped(config, tile=None):
    decoder = Decoder(config, remat=True, mlp_tile=tile)
    return ql.linen.wrap(decoder, scanned=Decoder.scanned)


def placed(config, mesh):
    base, lora = trees(config)
    arguments = place_arguments(config, base, mesh)

    def put(batch):
        return put_rows(batch, mesh, arguments["rows"][0])

    return *ql.sharding.place(base, lora, mesh, **arguments), put


def run(config, base, lora, put=lambda batch: batch, tile=None):
    """Returns the losses of five steps, and the last state."""
    step = train.make_step(train.decoder_loss(wrapped(config, tile)), OPTIMIZER)
    lora = jax.tree.map(jnp.array, lora)  # the state is donated
    state, losses = train.State.create(lora, OPTIMIZER, seed=0), []
    for batch in batches():
        state, report = step(state, base, [put(batch)])
        losses.append(float(report.loss))
    return losses, state


@functools.cache
def on_one_device(config):
    losses, state = run(config, *trees(config))
    return losses, jax.tree.map(np.asarray, state.lora)


@functools.cache
def on_mesh(name, kind, tile):
    mesh = make_mesh(MESHES[name], kind)
    base, lora, put = placed(CONFIG, mesh)
    with jax.set_mesh(mesh):
        return run(CONFIG, base, lora, put, tile)


# The mesh, the type of its axes, and the number of tokens in a tile of an MLP.
CASES = [(name, "Auto", None) for name in ("fsdp", "tensor", "all")]
CASES += [("all", "Explicit", None), ("fsdp and tensor", "Auto", 3)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_five_steps_equal_those_of_one_device(case):
    losses, state = on_mesh(*case)
    assert_equal_runs((losses, state.lora), on_one_device(CONFIG))


def assert_equal_runs(run, expected):
    (losses, lora), (expected_losses, expected_lora) = run, expected
    assert_close(losses, expected_losses)
    assert_close(lora, expected_lora)


@functools.cache
def nnx_parts():
    tokens = jnp.zeros((1, 2), jnp.int32)
    bridge = nnx.bridge.ToNNX(Decoder(CONFIG, remat=True), rngs=nnx.Rngs(0))
    model = bridge.lazy_init(tokens)
    definition, state = nnx.split(ql.nnx.wrap(model, QLORA, tokens, rngs=nnx.Rngs(1)))
    return definition, in_numpy(state)


def nnx_model():
    definition, state = nnx_parts()
    return nnx.merge(definition, jax.tree.map(lambda x: x, state))


def run_nnx(model, put=lambda batch: batch):
    """Returns the losses and the adapters of five steps of an nnx model."""
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.LoRAParam)
    adapters = nnx.DiffState(0, nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            definition, state = nnx.split(model)

            def compute(state, batch):
                logits = nnx.merge(definition, state)(batch.ids)
                losses = optax.softmax_cross_entropy_with_integer_labels(
                    logits, batch.targets
                )
                return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

            if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
                run = jax.sharding.auto_axes(compute, out_sharding=PartitionSpec())
                return run(state, batch)
            return compute(state, batch)

        value, grads = nnx.value_and_grad(loss, argnums=adapters)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer, put(batch))) for batch in batches()]
    return losses, jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))


@functools.cache
def nnx_on_one_device():
    return run_nnx(nnx_model())


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_five_steps_of_an_nnx_model_equal_those_of_one_device(kind):
    mesh = make_mesh(MESHES["all"], kind)
    arguments = place_arguments(CONFIG, trees(CONFIG)[0], mesh)
    model = ql.nnx.place(nnx_model(), mesh, **arguments)

    def put(batch):
        return put_rows(batch, mesh, arguments["rows"][0])

    with jax.set_mesh(mesh):
        got = run_nnx(model, put)
    assert_equal_runs(got, nnx_on_one_device())


def test_a_packed_embedding_is_split_between_blocks_of_the_hidden_size():
    """A tied embedding `[V, D]` contracts the hidden size: two blocks here."""
    mesh = make_mesh(MESHES["fsdp and tensor"])
    base = trees(TIED)[0]
    table = base["embed_tokens"]["embedding"]
    packed = ql.quantize(table, block_size=64, contract="nk")
    base = {**base, "embed_tokens": {"embedding": packed}}
    arguments = place_arguments(TIED, base, mesh)
    assert arguments["rules"]["embed_tokens/embedding"] == PartitionSpec(None, "tensor")
    placed_base, _ = ql.sharding.place(base, {}, mesh, **arguments)
    codes = placed_base["embed_tokens"]["embedding"].codes  # [D / 2, V]
    assert codes.sharding.shard_shape(codes.shape) == (32, 256)


def test_state_is_split_as_the_adapters_are():
    """After each step a device holds an eighth of A and B, and of their momentum."""
    _, state = on_mesh("fsdp and tensor", "Auto", 3)
    for tree in (state.lora, state.opt_state[0].trace):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            share = x.size // x.addressable_shards[0].data.size
            assert share == 8, (jax.tree_util.keystr(path), x.sharding.spec)


def compiled(config, sizes, *, gradient=True, kind="Auto", tile=None):
    """Compiles the loss of a batch, or the loss with its gradient, on a mesh."""
    mesh = make_mesh(sizes, kind)
    base, lora, put = placed(config, mesh)
    loss = train.decoder_loss(wrapped(config, tile))

    def run(lora, base, batch):
        return loss(lora, base, batch, None)[0]

    out = None
    if gradient:
        run = jax.value_and_grad(run)
        out = None, jax.tree.map(lambda x: x.sharding, lora)
    with jax.set_mesh(mesh):
        lowered = jax.jit(run, out_shardings=out).lower(lora, base, put(batches(1)[0]))
        return lowered.compile()


KERNELS = 7  # of a layer
TOKENS = BATCH * 8


@pytest.mark.parametrize(
    ("config", "kind"),
    [(CONFIG, "Auto"), (TIED, "Auto"), (CONFIG, "Explicit")],
    ids=["head", "tied", "explicit"],
)
def test_fsdp_gathers_each_layer_once_a_direction_in_bytes(config, kind):
    """The program has one loop over layers forward, and one backward."""
    program = compiled(config, {"fsdp": 8}, kind=kind)
    assert collectives(program).count("all-gather u8") == 2 * KERNELS
    # Other arrays are at most as large as the hidden states of the batch: no device
    # holds a complete kernel, head or embedding in float.
    assert most_floats(program.as_text()) <= TOKENS * config.hidden_size
    assert TOKENS < config.vocab_size and TOKENS < config.intermediate_size


def test_an_mlp_in_tiles_is_gathered_once_a_direction():
    """Kernels and adapters are gathered as often as without tiles, counting loops."""
    sizes = {"fsdp": 4, "tensor": 2}
    counts = []
    for tile in (None, 2):
        program = compiled(CONFIG, sizes, tile=tile)
        rows = hlo_collectives.collectives(program.as_text())
        gathers = [row for row in rows if row["operation"] == "all-gather"]
        counts.append({row["dtype"]: (row["count"], row["bytes"]) for row in gathers})
    assert counts[0] == counts[1]
    assert counts[0]["u8"][0] == 2 * KERNELS * CONFIG.num_layers


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
def test_tensor_parallel_sums_twice_a_layer_forward(config):
    """The sums come after attention and after the MLP, and include the adapters."""
    program = compiled(config, {"data": 2, "tensor": 4}, gradient=False)
    shape = f"f32[{BATCH // 2},8,{config.hidden_size}]"
    moved = OPERATION.findall(program.as_text())
    sums = [result for result, name in moved if name == "all-reduce"]
    assert sum(result.count(shape) for result in sums) == 2
    assert not [result for result, _ in moved if "u8" in result]
    assert most_floats(program.as_text()) <= TOKENS // 2 * config.hidden_size


@pytest.mark.parametrize("heads, sizes", [(2, {"fsdp": 2, "tensor": 4}), (4, {})])
def test_a_kernel_attends_on_each_device_to_its_rows_and_heads(heads, sizes):
    """Also where `tensor` does not divide the key heads, and without a mesh."""
    rng = np.random.default_rng(0)

    def draw(n):
        return rng.normal(size=(2, 128, n, 8)).astype(np.float32)

    operands = draw(8), draw(heads), draw(heads), jnp.linspace(-1.0, 2.0, 8)
    ids = (np.arange(128) > np.array([[40], [70]])).astype(np.int32)
    splash = functools.partial(ql.memory.splash_attention, interpret=True)
    split = functools.partial(split_attention(splash), segment_ids=ids)

    def attend_on_devices(q, k, v, sinks):
        return split(q, k, v, sinks=sinks)

    visible = (ids[:, :, None] == ids[:, None]) & np.tri(128, dtype=bool)
    settings = {"visible": visible, "scale": 8**-0.5, "xp": jnp}

    def attend_by_definition(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, **settings)

    def sum_of_squares(attend):
        return lambda *x: jnp.sum(jnp.square(attend(*x)))

    def value_and_grad(attend):
        return jax.jit(jax.value_and_grad(sum_of_squares(attend), (0, 1, 2, 3)))(
            *operands
        )

    with jax.set_mesh(make_mesh(sizes)) if sizes else contextlib.nullcontext():
        sharded_results = value_and_grad(attend_on_devices)
    assert_close(sharded_results, value_and_grad(attend_by_definition))
