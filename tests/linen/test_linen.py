"""linen.wrap against the same model on the float weights that its kernels encode."""

import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.errors import ScopeParamShapeError
from helpers import biases, close, fast_and_slow, put, randomized
from linen_helpers import CONFIG, make_x, setup

import qlora_jax as ql


class MLP(nn.Module):
    """gate and up have one shape, as in SwiGLU."""

    dtype: object = None

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(96, dtype=self.dtype, name="gate")(x)
        up = nn.Dense(96, dtype=self.dtype, name="up")(x)
        return nn.Dense(64, dtype=self.dtype, name="down")(nn.silu(gate) * up)


class Attention(nn.Module):
    dtype: object = None

    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention
        return attend(4, qkv_features=64, dtype=self.dtype)(x)


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.moveaxis(x.reshape(*x.shape[:-1], 2, 32), -2, 0)
        x = nn.Einsum((2, 32, 48), "EBTD,EDF->EBTF", name="experts")(x)
        return jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:3], 96)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = x + MLP(name="mlp")(nn.LayerNorm()(x))
        return x + Attention(name="attention")(x), None


def three_layers(block):
    """Three layers of a block, in a module "layers"."""
    layers = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return layers(name="layers")


class Stack(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        return three_layers(block)(x, None)[0]


class Bare(nn.Module):
    """Reads its kernel itself."""

    @nn.compact
    def __call__(self, x, scale=True):
        w = self.param("kernel", nn.initializers.lecun_normal(), (64, 32))
        return jnp.einsum("btd,df->btf", x, w) * (2.0 if scale else 1.0)


class BareInSetup(nn.Module):
    def setup(self):
        self.w = self.param("kernel", nn.initializers.lecun_normal(), (64, 32))

    def __call__(self, x):
        return x @ self.w


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        lecun = nn.initializers.lecun_normal()
        x = nn.Dense(96, kernel_init=nn.with_partitioning(lecun, ("x", "y")))(x)
        logical = nn.with_logical_partitioning(lecun, ("embed", "mlp"))
        return nn.Dense(64, kernel_init=logical)(x)


# Models that have no pair in the contract of both integrations (test_integrations.py).
MODELS = {"boxed": Boxed(), "bare": Bare(), "mlp": MLP()}


@pytest.fixture
def x():
    return make_x()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_without_adapters_it_is_the_model_on_dequantized_weights(name, x):
    model = MODELS[name]
    params, base, lora = setup(model, x)
    wrapped = ql.linen.wrap(model)
    want = model.apply({"params": ql.dequantize(base)}, x)
    close(wrapped.apply({"params": base, "lora": lora}, x), want)
    close(wrapped.apply({"params": base}, x), want)
    got = jax.jit(wrapped.apply)({"params": ql.combine(base, lora)}, x)
    assert got.dtype == want.dtype
    close(got, want)


@pytest.mark.parametrize("name", fast_and_slow(["bare"], ["boxed", "mlp"]))
def test_with_adapters_it_is_the_model_on_merged_weights(name, x):
    model = MODELS[name]
    params, base, lora = setup(model, x)
    lora = randomized(lora)
    wrapped = ql.linen.wrap(model)
    close(
        wrapped.apply({"params": base, "lora": lora}, x),
        model.apply({"params": ql.merge(base, lora)}, x),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_merged_model(name, x):
    model = MODELS[name]
    params, base, lora = setup(model, x)
    lora = randomized(lora)
    wrapped = ql.linen.wrap(model)

    def packed(lora, x, biases):
        y = wrapped.apply({"params": put(base, biases), "lora": lora}, x)
        return jnp.sum(jnp.sin(y))

    def merged(lora, x, biases):
        params = ql.merge(put(base, biases), lora)
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

    arguments = lora, x, biases(base)
    got = jax.jit(jax.grad(packed, argnums=(0, 1, 2)))(*arguments)
    want = jax.jit(jax.grad(merged, argnums=(0, 1, 2)))(*arguments)
    close(got, want, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_target_is_packed_adapted_and_keeps_its_name_and_shape(name, x):
    model = MODELS[name]
    params, base, lora = setup(model, x)
    flat = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(params))
    kernels = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in flat
        if path[-1].key == "kernel"
    }
    nodes = lambda tree: {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda n: isinstance(n, ql.QTensor | ql.LoRA)
        )
    }
    base = nn.meta.unbox(base)
    packed = {p: q.shape for p, q in nodes(base).items() if isinstance(q, ql.QTensor)}
    assert packed == kernels
    assert set(nodes(lora)) == set(kernels)


class DenseLayer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(self.width, use_bias=False)(x)), None


class BareLayer(nn.Module):
    """Reads its kernel itself."""

    width: int

    @nn.compact
    def __call__(self, x, _):
        shape = (self.width, self.width)
        w = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return jnp.tanh(x @ w), None


class Deep(nn.Module):
    """Sixteen scanned layers and nothing else."""

    layer: type
    width: int
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(self.layer, prevent_cse=False) if self.remat else self.layer
        axes, rngs = {"params": 0}, {"params": True}
        layers = nn.scan(layer, variable_axes=axes, split_rngs=rngs, length=16)
        return layers(self.width, name="layers")(x, None)[0]


def temporaries_of_gradient(model, x, **options):
    """Bytes of temporaries of a step's gradient, and of the stack in float."""
    params, base, lora = setup(model, x)
    wrapped = ql.linen.wrap(model, **options)
    loss = lambda lora, base, x: wrapped.apply({"params": base, "lora": lora}, x).sum()
    compiled = jax.jit(jax.grad(loss)).lower(lora, base, x).compile()
    float_stack = sum(a.nbytes for a in jax.tree.leaves(params))
    return compiled.memory_analysis().temp_size_in_bytes, float_stack


@pytest.mark.slow
def test_a_registered_class_takes_the_packed_product(x, monkeypatch):
    class Project(nn.Module):
        shape: tuple

        @nn.compact
        def __call__(self, equation, x):
            w = self.param("w", nn.initializers.lecun_normal(), self.shape)
            return jnp.einsum(equation, x, w)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Project((4, 64, 16))("BTD,NDH->BTNH", x)

    config = ql.QLoRAConfig(rank=2, targets=".*/w", block_size=16)
    ql.linen.register(Project, kernel="w", einsum=lambda module, eqn, x: (eqn, x))
    model = Model()
    _, base, lora = setup(model, x, config)
    assert base["Project_0"]["w"].scales.shape == (64 // 16, 4 * 16)
    lora = randomized(lora)
    want = model.apply({"params": ql.merge(base, lora)}, x)
    from qlora_jax.linen import float_kernels

    monkeypatch.setattr(
        float_kernels, "effective_kernel", None
    )  # materializing would raise
    wrapped = ql.linen.wrap(model)
    close(wrapped.apply({"params": base, "lora": lora}, x), want)
    x = x.astype(jnp.bfloat16)  # jnp.einsum promotes it
    want = model.apply({"params": ql.merge(base, lora)}, x)
    close(wrapped.apply({"params": base, "lora": lora}, x), want)


@pytest.mark.slow
def test_a_trained_base_is_packed_as_the_model_saw_it(x):
    model = MLP()
    config = ql.QLoRAConfig(rank=4, freeze_base=False, double_quant=False)
    params, base, lora = setup(model, x, config)
    wrapped = ql.linen.wrap(model)
    loss = lambda base: jnp.sum(wrapped.apply({"params": base, "lora": lora}, x) ** 2)
    grads = jax.jit(jax.grad(loss))(base)
    float_loss = lambda params: jnp.sum(model.apply({"params": params}, x) ** 2)
    want = jax.jit(jax.grad(float_loss))(ql.dequantize(base))
    close(jax.tree.leaves(grads), jax.tree.leaves(want), 1e-4)
    base = jax.tree.map(lambda p, g: p - 1e-3 * g, base, grads)
    packed = ql.quantize(base, config)
    close(
        wrapped.apply({"params": packed, "lora": lora}, x),
        wrapped.apply({"params": base, "lora": lora}, x),
    )


@pytest.mark.slow
def test_one_tree_trains_as_two(x):
    wrapped = ql.linen.wrap(MLP())
    _, base, lora = setup(MLP(), x)
    tx = optax.adamw(1e-2)
    loss = lambda params: jnp.mean((wrapped.apply({"params": params}, x) - x) ** 2)
    loss_of_two = lambda lora: loss(ql.combine(base, lora))

    def train(value_and_grad, tx, tree):
        @jax.jit
        def step(tree, state):
            value, grads = value_and_grad(tree)
            updates, state = tx.update(grads, state, tree)
            return optax.apply_updates(tree, updates), state, value

        state, values = tx.init(tree), []
        for _ in range(5):
            tree, state, value = step(tree, state)
            values.append(value)
        assert values[-1] < values[0]
        return tree

    labels = {"lora": tx, "frozen": optax.set_to_zero()}
    want = train(jax.value_and_grad(loss_of_two), tx, lora)
    got = train(
        ql.value_and_grad(loss),
        optax.partition(labels, ql.lora_labels),
        ql.combine(base, lora),
    )
    got_base, got_lora = ql.split(got)
    jax.tree.map(np.testing.assert_array_equal, got_base, base)
    close(got_lora, want)


def test_a_target_that_no_module_runs_is_refused_by_name(x):
    params = MLP().init(jax.random.key(0), x)["params"]
    params["unused"] = {"kernel": jnp.ones((64, 8))}
    with pytest.raises(ValueError, match="unused/kernel: no module that ran owns it"):
        ql.linen.init(jax.random.key(1), MLP(), params, CONFIG, x)


@pytest.mark.slow
def test_layers_scanned_along_another_axis_are_refused(x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(64)(x), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, rngs = {"params": 1}, {"params": True}
            layers = nn.scan(Layer, variable_axes=axes, split_rngs=rngs, length=2)
            return layers()(x, None)[0]

    params = Deep().init(jax.random.key(0), x)["params"]
    path = "ScanLayer_0/Dense_0/kernel"
    match = f"{path}: .*must be stacked along axis 0.*Got axis 1"
    with pytest.raises(ValueError, match=match):
        ql.linen.init(jax.random.key(1), Deep(), params, CONFIG, x)
    variables = {"params": ql.quantize(params, CONFIG)}
    for scanned in ((), "ScanLayer_0"):
        with pytest.raises(ValueError, match=match):
            ql.linen.wrap(Deep(), scanned=scanned).apply(variables, x)


def test_wrap_takes_linen_modules_only():
    with pytest.raises(TypeError, match="must be a linen module. Got int"):
        ql.linen.wrap(3)
    wrapped = ql.linen.wrap(MLP())
    assert ql.linen.wrap(wrapped) is wrapped
    with pytest.raises(TypeError, match="must be a linen module class"):
        ql.linen.register(3, kernel="w", einsum="ab,bc->ac")
    with pytest.raises(TypeError, match="Got the class MLP. Pass an instance"):
        ql.linen.wrap(MLP)


def test_models_and_settings_of_other_kinds_are_refused_by_name(x):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    match = "must be a linen module. Got Linear, an nnx module. Use ql.nnx.wrap"
    with pytest.raises(TypeError, match=match):
        ql.linen.wrap(model)
    with pytest.raises(TypeError, match=match):
        ql.linen.init(jax.random.key(1), model, {}, CONFIG, x)
    with pytest.raises(TypeError, match="`config` must be a QLoRAConfig. Got dict"):
        ql.linen.init(jax.random.key(1), nn.Dense(8), {}, {"rank": 4}, x)


def test_collections_of_other_names_are_refused_by_name(x):
    _, base, lora = setup(nn.Dense(8), x)
    wrapped = ql.linen.wrap(nn.Dense(8))
    match = r"adapters in the collection 'lora'. Got adapters in \['loras'\]"
    with pytest.raises(ValueError, match=match):
        wrapped.apply({"params": base, "loras": lora}, x)
    match = r"must have a collection 'params', the base tree. Got \['parms'\]"
    with pytest.raises(ValueError, match=match):
        wrapped.apply({"parms": base, "lora": lora}, x)


@pytest.mark.slow
def test_shapes_in_place_of_parameters_give_shapes(x):
    params = Boxed().init(jax.random.key(0), x)["params"]
    shapes = jax.eval_shape(lambda: params)
    run = lambda params: ql.linen.init(jax.random.key(1), Boxed(), params, CONFIG, x)
    got = jax.eval_shape(lambda: run(shapes))
    assert jax.tree.structure(got) == jax.tree.structure(run(params))


@pytest.mark.slow
def test_wrapped_models_and_their_variables_can_be_pickled(x):
    _, base, lora = setup(MLP(), x)
    variables = {"params": base, "lora": randomized(lora)}
    wrapped = ql.linen.wrap(MLP(), backend="reference")
    again, theirs = pickle.loads(pickle.dumps((wrapped, variables)))
    assert again == wrapped
    want = wrapped.apply(variables, x)
    np.testing.assert_array_equal(again.apply(theirs, x), want)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [True, False])
def test_dropout_takes_the_keys_that_flax_takes(wrapped, x):
    """`make_rng("dropout")` draws from "params" where there is no "dropout"."""
    if wrapped:
        model = nn.Dense(8)
        _, base, lora = setup(model, x, ql.QLoRAConfig(rank=4, dropout=0.5))
        variables = {"params": base, "lora": randomized(lora)}
        apply = ql.linen.wrap(model).apply
    else:
        layer = ql.linen.QLoRADense(8, rank=4, dropout=0.5)
        variables = layer.init(jax.random.key(0), x)
        variables = {**variables, "lora": randomized(variables["lora"])}
        apply = layer.apply
    key = jax.random.key(3)
    want = apply(variables, x)
    for rngs in (key, {"params": key}, {"dropout": key}):
        assert not np.allclose(apply(variables, x, rngs=rngs), want)
    np.testing.assert_array_equal(apply(variables, x, rngs={"other": key}), want)


class TestQLoRADense:
    def test_is_a_dense_layer_with_its_kernel_packed(self, x):
        layer = ql.linen.QLoRADense(32, rank=4, alpha=8, block_size=32)
        variables = layer.init(jax.random.key(0), x)
        kernel = variables["params"]["kernel"]
        assert (kernel.fmt, kernel.block_size, kernel.double_quant) == ("nf4", 32, True)
        lora = randomized(variables["lora"])
        merged = ql.merge(variables["params"], lora)
        got = layer.apply({"params": variables["params"], "lora": lora}, x)
        close(got, nn.Dense(32).apply({"params": merged}, x))

    @pytest.mark.slow
    def test_trains_its_base_where_asked(self, x):
        layer = ql.linen.QLoRADense(32, freeze_base=False)
        params, lora = (layer.init(jax.random.key(0), x)[c] for c in ("params", "lora"))

        def loss(params):
            return jnp.sum(layer.apply({"params": params, "lora": lora}, x) ** 2)

        def float_loss(params):
            return jnp.sum(nn.Dense(32).apply({"params": params}, x) ** 2)

        want = jax.grad(float_loss)(ql.dequantize(params))  # B is zero
        got = jax.grad(loss)(params)
        close({**got, "kernel": got["kernel"].kernel}, want)

    def test_dropout(self, x):
        layer = ql.linen.QLoRADense(32, dropout=0.5)
        variables = layer.init(jax.random.key(0), x)
        variables = {**variables, "lora": randomized(variables["lora"])}
        dropped = layer.apply(variables, x, rngs={"dropout": jax.random.key(1)})
        assert not np.allclose(layer.apply(variables, x), dropped)

    def test_refuses_bad_settings(self, x):
        with pytest.raises(ValueError, match="`rank` must be a positive integer"):
            ql.linen.QLoRADense(8, rank=0).init(jax.random.key(0), x)


class Tied(nn.Module):
    """Reads the embedding of another module."""

    def setup(self):
        self.embed = nn.Embed(64, 32)

    def __call__(self, x):
        return x @ self.embed.embedding


@pytest.mark.slow
@pytest.mark.parametrize("model", [Bare(), BareInSetup(), Tied()])
def test_dropout_is_refused_by_name_where_a_kernel_is_read_as_floats(model, x):
    """Without `linen.init`, which refuses it earlier."""
    params = model.init(jax.random.key(0), x)["params"]
    config = ql.QLoRAConfig(rank=4, dropout=0.1, targets=".*")
    base, lora = ql.init(jax.random.key(1), params, config)
    apply = lambda **more: ql.linen.wrap(model).apply(
        {"params": base, "lora": lora}, x, **more
    )
    close(apply(), model.apply({"params": ql.merge(base, lora)}, x))
    path = "embed/embedding" if isinstance(model, Tied) else "kernel"
    with pytest.raises(ValueError, match=f"{path}: .*reads it itself.*dropout=0.1"):
        apply(rngs={"dropout": jax.random.key(0)})


@pytest.mark.slow
def test_a_model_under_nn_jit_is_traced_anew_each_time(x):
    class Attend(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x):
            return nn.Einsum((4, 64, 16), "BTD,NDH->BTNH", name="q")(x)

    model = Attend()
    params = model.init(jax.random.key(0), x)["params"]
    model.apply({"params": params}, x)
    for _ in range(2):
        base, lora = ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
        assert lora["q"]["kernel"].a.shape == (64, 4)
    lora = randomized(lora)
    close(
        ql.linen.wrap(model).apply({"params": base, "lora": lora}, x),
        model.apply({"params": ql.merge(base, lora)}, x),
    )


def test_arguments_that_are_not_arrays_stay_as_they_are(x):
    class Project(nn.Module):
        @nn.compact
        def __call__(self, equation, x):
            return nn.Einsum((4, 64, 16), name="q")(x, equation)

    args = ("BTD,NDH->BTNH", x)
    params = Project().init(jax.random.key(0), *args)["params"]
    base, lora = ql.linen.init(jax.random.key(1), Project(), params, CONFIG, *args)
    got = ql.linen.wrap(Project()).apply({"params": base, "lora": lora}, *args)
    close(got, Project().apply({"params": ql.dequantize(base)}, *args))


class MixedBlock(nn.Module):
    """With partitioned parameters, experts, and a kernel that its module reads."""

    @nn.compact
    def __call__(self, x, _):
        lecun = nn.initializers.lecun_normal()
        kernel_init = nn.with_partitioning(lecun, ("x", "y"))
        bias_init = nn.with_partitioning(nn.initializers.normal(), ("y",))
        x = x + nn.Dense(64, kernel_init=kernel_init, bias_init=bias_init)(x)
        x = x + nn.Dense(64)(Experts()(x))
        return x + jnp.tanh(nn.Dense(64)(Bare(name="bare")(x))), None


class MixedStack(nn.Module):
    remat: bool = False
    jit: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(MixedBlock) if self.remat else MixedBlock
        block = nn.jit(block) if self.jit else block
        x = three_layers(block)(x, None)[0]
        return nn.Dense(64, name="head")(x)


def scanned_bytes(jaxpr):
    """Shapes of uint8 arrays that a scan slices, or stacks up."""
    found = set()
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            outside = [v.aval for v in (*eqn.invars, *eqn.outvars)]
            inside = [v.aval for v in (*body.invars, *body.outvars)]
            found |= {
                whole.shape
                for whole, part in zip(outside, inside, strict=True)
                if whole.dtype == jnp.uint8 and whole.shape != part.shape
            }
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                found |= scanned_bytes(getattr(value, "jaxpr", value))
    return found


def is_jaxpr(value):
    return hasattr(value, "eqns")


STACKS = {
    "scan": Stack(),
    "remat": Stack(remat=True),
    "mixed": MixedStack(),
    "mixed-remat": MixedStack(remat=True),
    "mixed-jit": MixedStack(jit=True),
}


class TestScanned:
    """Stacks read by layer index give the results of stacks that the scan slices."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "jit"),
        [("scan", False), ("scan", True), ("mixed-remat", True), ("mixed-jit", True)],
    )
    def test_values_and_gradients_are_the_same_bit_for_bit(self, name, jit, x):
        model = STACKS[name]
        _, base, lora = setup(model, x)
        lora = randomized(lora)

        def run(lora, x, base, **options):
            wrapped = ql.linen.wrap(model, **options)
            apply = lambda lora, x: wrapped.apply({"params": base, "lora": lora}, x)
            loss = lambda lora, x: jnp.sum(jnp.sin(apply(lora, x)))
            return apply(lora, x), jax.grad(loss, argnums=(0, 1))(lora, x)

        sliced = run
        indexed = lambda *args: run(*args, scanned="layers")
        if jit:
            sliced, indexed = jax.jit(sliced), jax.jit(indexed)
        want, got = sliced(lora, x, base), indexed(lora, x, base)
        assert jax.tree.structure(got) == jax.tree.structure(want)
        jax.tree.map(np.testing.assert_array_equal, got, want)
        if name == "mixed-jit":
            merged = lambda lora, x: model.apply({"params": ql.merge(base, lora)}, x)
            close(got[0], jax.jit(merged)(lora, x), 1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "name", fast_and_slow(["scan"], ["remat", "mixed", "mixed-remat"])
    )
    def test_no_scan_slices_codes_or_stacks_them_up(self, name, x):
        model = STACKS[name]
        _, base, lora = setup(model, x)

        def found(**options):
            wrapped = ql.linen.wrap(model, **options)
            loss = lambda lora: wrapped.apply({"params": base, "lora": lora}, x).sum()
            return scanned_bytes(jax.make_jaxpr(jax.grad(loss))(lora).jaxpr)

        is_packed = lambda node: isinstance(node, ql.QTensor)
        kernels = jax.tree.leaves(base["layers"], is_leaf=is_packed)
        assert found() >= {q.codes.shape for q in kernels if is_packed(q)}
        assert found(scanned="layers") == set()

    @pytest.mark.slow
    @pytest.mark.parametrize("remat", [False, True])
    def test_memory_is_that_of_packed_weights(self, remat):
        """Neither float weights nor codes are stacked up for the backward pass."""
        model, x = Deep(DenseLayer, 512, remat), jnp.ones((8, 512))
        sliced, float_stack = temporaries_of_gradient(model, x)
        indexed, _ = temporaries_of_gradient(model, x, scanned="layers")
        codes = float_stack // 8
        assert indexed < sliced + codes // 16
        assert indexed < float_stack // 4

    @pytest.mark.slow
    def test_dropout_is_the_same(self, x):
        model, config = Stack(), ql.QLoRAConfig(rank=4, dropout=0.5)
        _, base, lora = setup(model, x, config)
        variables = {"params": base, "lora": randomized(lora)}
        rngs = {"dropout": jax.random.key(0)}
        want = ql.linen.wrap(model).apply(variables, x, rngs=rngs)
        wrapped = ql.linen.wrap(model, scanned="layers")
        np.testing.assert_array_equal(wrapped.apply(variables, x, rngs=rngs), want)
        assert not np.allclose(wrapped.apply(variables, x), want)

    @pytest.mark.slow
    def test_vmap_over_inputs_adapters_and_bases(self, x):
        model = Stack()
        one, two = (setup(model, x)[1:] for _ in range(2))
        pairs = [(base, randomized(lora)) for base, lora in (one, two)]
        base, lora = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
        xs = jnp.stack([x, 2 * x])
        wrapped = ql.linen.wrap(model, scanned="layers")
        run = lambda b, l, x: wrapped.apply({"params": b, "lora": l}, x)
        alone = jax.jit(run)
        for axes in [(None, None, 0), (None, 0, 0), (0, 0, 0), (0, 0, None)]:
            arguments = [
                whole if axis == 0 else jax.tree.map(lambda a: a[0], whole)
                for axis, whole in zip(axes, (base, lora, xs), strict=True)
            ]
            got = jax.jit(jax.vmap(run, axes))(*arguments)
            for i in range(2):
                rows = [
                    jax.tree.map(lambda a, i=i: a[i], a) if axis == 0 else a
                    for axis, a in zip(axes, arguments, strict=True)
                ]
                close(got[i], alone(*rows))

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["float", "lora only", "straight through"])
    def test_kernels_in_float_are_sliced_as_ever(self, kind, x):
        settings = {"lora only": {"fmt": None}, "straight through": {}}.get(kind)
        if kind == "straight through":
            settings = {"freeze_base": False}
        model, config = Stack(), ql.QLoRAConfig(rank=4, **(settings or {}))
        _, base, lora = setup(model, x, config)
        base = ql.dequantize(base) if kind == "float" else base
        variables = {"params": base, "lora": randomized(lora)}
        want = ql.linen.wrap(model).apply(variables, x)
        got = ql.linen.wrap(model, scanned="layers").apply(variables, x)
        np.testing.assert_array_equal(got, want)

    @pytest.mark.slow
    def test_a_scan_in_a_scan_is_sliced_as_ever(self, x):
        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return Stack(name="stack")(x), None

        class Deep(nn.Module):
            @nn.compact
            def __call__(self, x):
                axes, rngs = {"params": 0}, {"params": True}
                layers = nn.scan(Outer, variable_axes=axes, split_rngs=rngs, length=2)
                return layers(name="outer")(x, None)[0]

        _, base, lora = setup(Deep(), x)
        variables = {"params": base, "lora": randomized(lora)}
        want = ql.linen.wrap(Deep()).apply(variables, x)
        for scanned in ("outer", "outer/stack/layers"):
            got = ql.linen.wrap(Deep(), scanned=scanned).apply(variables, x)
            np.testing.assert_array_equal(got, want)

    @pytest.mark.slow
    def test_modules_are_named_by_patterns_for_their_whole_paths(self, x):
        class Tower(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Stack(name="right")(Stack(name="left")(x))

        _, base, lora = setup(Tower(), x)

        def sliced(scanned):
            wrapped = ql.linen.wrap(Tower(), scanned=scanned)
            run = lambda lora: wrapped.apply({"params": base, "lora": lora}, x)
            return len(scanned_bytes(jax.make_jaxpr(run)(lora).jaxpr))

        assert sliced(()) == sliced("left/layers") > 0  # the same shapes, once
        assert sliced(["left/layers", "right/layers"]) == 0
        assert sliced("(left|right)/layers") == sliced("left|right") == 0

    @pytest.mark.slow
    def test_names_that_match_no_module_are_refused_by_name(self, x):
        _, base, lora = setup(Stack(), x)
        wrapped = ql.linen.wrap(Stack(), scanned=["layers", "layer", "mlp"])
        with pytest.raises(
            ValueError, match=r"Got \['layer', 'mlp'\], which match none"
        ):
            wrapped.apply({"params": base, "lora": lora}, x)

    @pytest.mark.slow
    def test_modules_that_no_scan_slices_are_refused_by_name(self, x):
        class BareExperts(nn.Module):
            @nn.compact
            def __call__(self, x):
                w = self.param("kernel", nn.initializers.lecun_normal(), (2, 64, 96))
                return jnp.einsum("btd,ndf->nbtf", x, w)

        model = BareExperts()
        _, base, lora = setup(model, x)
        wrapped = ql.linen.wrap(model, scanned=".*")
        with pytest.raises(ValueError, match="run under nn.scan.*'kernel', of which 2"):
            wrapped.apply({"params": base, "lora": lora}, x)

    def test_wrapping_again_takes_the_new_options(self):
        wrapped = ql.linen.wrap(Stack())
        again = ql.linen.wrap(wrapped, scanned="layers", backend="tiled")
        assert (again.scanned, again.backend) == (("layers",), "tiled")
        assert again.module is wrapped.module
        assert ql.linen.wrap(again) is again


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [(), "layers"])
def test_a_back_end_can_be_chosen(scanned, x):
    model = Stack()
    _, base, lora = setup(model, x)
    variables = {"params": base, "lora": randomized(lora)}
    want = ql.linen.wrap(model).apply(variables, x)

    def run(backend):
        wrapped = ql.linen.wrap(model, scanned=scanned, backend=backend)
        return wrapped.apply(variables, x)

    close(run("reference"), want)
    with pytest.raises(ValueError, match="`backend` must be one of.*Got 'nothing'"):
        run("nothing")
    with pytest.raises(NotImplementedError, match="`pallas_tpu_v5e` does not support"):
        run("pallas_tpu_v5e")  # blocks of 16


class Lifted(nn.Module):
    """Calls the layer that owns the kernel in a function under a lifted transform."""

    how: str

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(64, name="layer")
        call = lambda layer, x: layer(x)
        if self.is_initializing():
            return layer(x)
        if self.how == "vjp":
            y, backward = nn.vjp(call, layer, x)
            return y, backward(jnp.sin(y))[1]
        if self.how == "custom_vjp":
            forward = lambda layer, x: nn.vjp(call, layer, x)

            def backward(residuals, g):
                params, *inputs = residuals(g)
                return params, *(2 * g for g in inputs)

            return nn.custom_vjp(call, forward, backward)(layer, x)
        if self.how == "jvp":
            return nn.jvp(call, layer, (x,), (x,), variable_tangents={})
        cond = lambda layer, carry: carry[0] < 2
        body = lambda layer, carry: (carry[0] + 1, jnp.tanh(layer(carry[1])))
        return nn.while_loop(cond, body, layer, (0, x))[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["vjp", "custom_vjp", "while_loop"])
def test_functions_of_a_layer_may_be_lifted(how, x):
    model = Lifted(how)
    _, base, lora = setup(model, x)
    lora = randomized(lora)
    packed = lambda x: ql.linen.wrap(model).apply({"params": base, "lora": lora}, x)
    merged = lambda x: model.apply({"params": ql.merge(base, lora)}, x)
    close(jax.jit(packed)(x), jax.jit(merged)(x))
    if how == "custom_vjp":
        grad = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(x)
        close(grad(packed), grad(merged), 1e-4)


@pytest.mark.slow
class Two(nn.Module):
    @nn.compact
    def __call__(self, x):
        return MLP(name="mlp")(x) + nn.DenseGeneral(64, name="skip")(x)


def test_a_wrong_input_names_the_layer():
    x = jnp.ones((2, 64))
    params = Two().init(jax.random.key(0), x)["params"]
    base, lora = ql.linen.init(jax.random.key(1), Two(), params, CONFIG, x)
    apply = lambda x: ql.linen.wrap(Two()).apply({"params": base, "lora": lora}, x)
    match = r"mlp/gate/kernel: `x` must have shape \(2, 64\) .* Got \(2, 33\)"
    with pytest.raises(ValueError, match=match):
        apply(jnp.ones((2, 33)))


MODULES = {
    "dense": nn.Dense(64),
    "general": nn.DenseGeneral((4, 16)),
    "einsum": nn.Einsum((64, 8), "bk,kn->bn"),
    "embed": nn.Embed(64, 8),
}


@pytest.mark.parametrize("fmt", ["nf4", "int8"])
@pytest.mark.parametrize("name", MODULES)
def test_a_plain_model_refuses_packed_kernels(name, fmt):
    """Codes of int8 have the shape of the kernel."""
    x = jnp.ones((2, 64), jnp.int32 if name == "embed" else jnp.float32)
    model = MODULES[name]
    params = model.init(jax.random.key(0), x)["params"]
    pack = lambda w: ql.quantize(w, fmt, contract=-w.ndim)
    base = {k: w if k == "bias" else pack(w) for k, w in params.items()}
    # What Flax says of a shape, or what a QTensor says of its use as an array.
    match = 'For parameter "(kernel|embedding)"|QTensor is not an array'
    with pytest.raises((TypeError, ScopeParamShapeError), match=match):
        model.apply({"params": base}, x)


def test_forward_mode_is_refused_by_name(x):
    params = Lifted("jvp").init(jax.random.key(0), x)["params"]
    match = "layer/kernel: nn.jvp differentiates its product"
    with pytest.raises(ValueError, match=match):
        ql.linen.init(jax.random.key(1), Lifted("jvp"), params, CONFIG, x)
    base = ql.quantize(params, CONFIG)
    with pytest.raises(ValueError, match=match):
        ql.linen.wrap(Lifted("jvp")).apply({"params": base}, x)


class Mapped(nn.Module):
    """Maps its layer's variables, perhaps in a scan."""

    collection: str = "params"
    in_scan: bool = False

    @nn.compact
    def __call__(self, x):
        double = lambda variables: jax.tree.map(lambda w: 2 * w, variables)
        layer = nn.Dense(64, name="layer")
        call = lambda layer, x: layer(x)
        if self.in_scan:
            body = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            call = lambda layer, x: body(layer, x, None)[0]
        return nn.map_variables(call, self.collection, double, init=True)(layer, x)


@pytest.mark.slow
@pytest.mark.parametrize("in_scan", [False, True])
def test_kernels_that_map_variables_transforms_are_refused_by_name(in_scan, x):
    """Codes are not weights: twice the codes are not twice the weights."""
    model = Mapped(in_scan=in_scan)
    params = model.init(jax.random.key(0), x)["params"]
    match = "layer/kernel: nn.map_variables transforms it"
    with pytest.raises(ValueError, match=match):
        ql.linen.init(jax.random.key(1), model, params, CONFIG, x)
    with pytest.raises(ValueError, match=match):
        ql.linen.wrap(model).apply({"params": ql.quantize(params, CONFIG)}, x)


@pytest.mark.slow
def test_map_variables_may_transform_other_collections(x):
    model = Mapped("batch_stats")
    _, base, lora = setup(model, x)
    lora = randomized(lora)
    got = ql.linen.wrap(model).apply({"params": base, "lora": lora}, x)
    close(got, model.apply({"params": ql.merge(base, lora)}, x))


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
    variables = model.init(jax.random.key(0), x)
    params = variables.pop("params")
    base, lora = ql.linen.init(
        jax.random.key(1),
        model,
        params,
        CONFIG,
        x,
        other_variables=variables,
        mutable="batch_stats",
    )
    assert isinstance(base["layer"]["kernel"], ql.QTensor)

    def loss(apply, variables):
        y, state = apply({**variables}, x, mutable="batch_stats")
        return jnp.sum(jnp.sin(y)), (y, state)

    wrapped = ql.linen.wrap(model)
    packed = lambda lora: loss(
        wrapped.apply, {"params": base, "lora": lora, **variables}
    )
    merged = lambda lora: loss(
        model.apply, {"params": ql.merge(base, lora), **variables}
    )
    grad = lambda f: jax.jit(jax.grad(f, has_aux=True))(randomized(lora))
    close(grad(packed), grad(merged), 1e-4)


class Projections(nnx.Module):
    """Kernels in a list, and one that is no matrix."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(64, rngs=rngs, use_running_average=True)
        self.heads = nnx.LinearGeneral(64, (2, 16), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.heads(self.norm(x))


class Bridged(nn.Module):
    """A linen model around an nnx module."""

    @nn.compact
    def __call__(self, x, _=None):
        heads = nnx.bridge.to_linen(Projections, name="inside")(x)
        return nn.Dense(64)(heads.reshape(*x.shape[:-1], 32)), None


class BridgedStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Bridged),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=2,
        )
        return layers(name="layers")(x, None)[0]


class OwnToLinen(nn.Module):
    """A copy of `nnx.bridge.ToLinen`, as MaxText has one, for a single nnx.Linear."""

    nnx_class: Any
    args: tuple = ()

    @nn.compact
    def __call__(self, x):
        inside = self.nnx_class(*self.args, rngs=nnx.Rngs(0))
        if self.is_initializing():
            self.put_variable("params", "inside", {"kernel": inside.kernel.get_value()})
        inside.kernel.set_value(nn.unbox(self.variables)["params"]["inside"]["kernel"])
        return inside(x)


class TestBridge:
    """nnx modules in linen models: `nnx.bridge.ToLinen`."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "model",
        [
            BridgedStack(),
            nnx.bridge.to_linen(nnx.Linear, 64, 8),
            OwnToLinen(nnx.Linear, (64, 8)),
        ],
        ids=["stack", "linear", "copy"],
    )
    def test_values_and_gradients_are_those_of_the_merged_model(self, model, x):
        others = model.init(jax.random.key(0), x)
        params = others.pop("params")
        base, lora = ql.linen.init(
            jax.random.key(1), model, params, CONFIG, x, other_variables=others
        )
        if isinstance(model, BridgedStack):
            inside = base["layers"]["inside"]["layers"]
            assert isinstance(inside[1]["kernel"], ql.QTensor)
        wrapped = ql.linen.wrap(model)

        def packed(lora, x):
            y = wrapped.apply({"params": base, "lora": lora, **others}, x)
            return jnp.sum(jnp.sin(y)), y

        def merged(lora, x):
            y = model.apply({"params": ql.merge(base, lora), **others}, x)
            return jnp.sum(jnp.sin(y)), y

        grad = lambda f: jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))
        arguments = randomized(lora), x
        close(grad(packed)(*arguments), grad(merged)(*arguments), 1e-4)

    @pytest.mark.slow
    def test_mutable_params_come_back_packed(self, x):
        model = nnx.bridge.to_linen(nnx.Linear, 64, 8)
        _, base, lora = setup(model, x)
        variables = {"params": base, "lora": lora}
        _, got = ql.linen.wrap(model).apply(variables, x, mutable="params")
        close(got["params"], base)

    def test_dropout_is_refused_by_name(self, x):
        model = nnx.bridge.to_linen(nnx.Linear, 64, 8)
        with pytest.raises(ValueError, match="kernel: its module reads it itself"):
            setup(model, x, ql.QLoRAConfig(rank=4, dropout=0.5))


@pytest.mark.slow
def test_a_wrapped_model_may_call_another(x):
    """Both read kernels at the path "kernel"."""
    _, inner_base, inner_lora = setup(Bare(), x)
    inner_lora = randomized(inner_lora)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x, inner, params):
            w = self.param("kernel", nn.initializers.lecun_normal(), (32, 16))
            return jnp.einsum("btd,df->btf", inner.apply(params, x), w)

    merged = Bare(), {"params": ql.merge(inner_base, inner_lora)}
    packed = ql.linen.wrap(Bare()), {"params": inner_base, "lora": inner_lora}
    params = Outer().init(jax.random.key(0), x, *merged)["params"]
    base, lora = ql.linen.init(jax.random.key(1), Outer(), params, CONFIG, x, *merged)
    lora = randomized(lora)
    got = ql.linen.wrap(Outer()).apply({"params": base, "lora": lora}, x, *packed)
    close(got, Outer().apply({"params": ql.merge(base, lora)}, x, *merged))
