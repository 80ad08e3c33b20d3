"""linen.wrap: dtypes, geometries, lifted transforms, caches, other collections."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, randomized
from linen_helpers import CONFIG, make_x, setup

import qlora_jax as ql


@pytest.fixture
def x():
    return make_x()


@pytest.mark.slow
def test_sums_are_kept_in_the_element_type_that_is_preferred(x):
    """float32 out of bfloat16 operands, without a rounding in between."""
    model = nn.Einsum(
        (4, 64, 8),
        "BTD,NDH->BTNH",
        dtype=jnp.bfloat16,
        preferred_element_type=jnp.float32,
    )
    _, base, lora = setup(model, x)
    assert lora["kernel"].a.shape == (64, 4)
    lora = randomized(lora)
    got = ql.linen.wrap(model).apply({"params": base, "lora": lora}, x)
    close(got, model.apply({"params": ql.merge(base, lora)}, x), 1e-5)
    config = ql.QLoRAConfig(rank=4, dropout=0.5)
    with pytest.raises(ValueError, match="kernel: .*no dropout can act"):
        setup(model, x, config)


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            nn.Dense,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return heads(16, name="heads")(x)


class MappedSelfRead(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(
            GateUp, variable_axes={"params": 0}, split_rngs={"params": True}
        )
        return heads(name="heads")(x)


class GateUp(nn.Module):
    """Two kernels of one shape in one module, which reads them itself."""

    @nn.compact
    def __call__(self, x):
        init, shape = nn.initializers.lecun_normal(), (64, 32)
        gate = self.param("gate", init, shape)
        up = self.param("up", init, shape)
        return nn.silu(x @ gate) * (x @ up)


class MappedConvolution(nn.Module):
    @nn.compact
    def __call__(self, x):
        convolutions = nn.vmap(
            nn.Conv,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=None,
            axis_size=3,
        )
        return convolutions(16, (3,), name="convolutions")(x)


GEOMETRIES = {
    "vmap": Mapped(),
    "vmap of a self-read kernel": MappedSelfRead(),
    "vmap of a convolution": MappedConvolution(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries_against_the_merged_model(name, x):
    model = GEOMETRIES[name]
    config = ql.QLoRAConfig(
        rank=4, block_size=16, targets="(.*/)?(kernel|gate|up)", double_quant=False
    )
    _, base, lora = setup(model, x, config)
    lora = randomized(lora)
    wrapped = ql.linen.wrap(model)

    def packed(lora, x):
        y = wrapped.apply({"params": base, "lora": lora}, x)
        return jnp.sum(jnp.sin(y)), y

    def merged(lora, x):
        y = model.apply({"params": ql.merge(base, lora)}, x)
        return jnp.sum(jnp.sin(y)), y

    grad = lambda f: jax.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(lora, x)
    close(grad(packed), grad(merged), 1e-4)


class Stateful(nn.Module):
    """Reads its kernel, counts its calls, draws from its stream, calls itself."""

    def setup(self):
        self.kernel = self.param("kernel", nn.initializers.lecun_normal(), (64, 32))
        self.count = self.variable("counts", "calls", lambda: jnp.array(0))
        self.dropout = nn.Dropout(0.5)

    def width(self):
        return 32

    def project(self, x, name="plain"):
        return x @ self.kernel, name

    def __call__(self, x, head, *, deterministic):
        self.count.value += 1
        y, name = self.project(x)
        assert name == "plain"
        return head(self.dropout(y, deterministic=deterministic) @ self.kernel.T)


class Outside(nn.Module):
    """Needs Python values from what it calls, and passes it a module."""

    def setup(self):
        self.inside = Stateful()
        self.head = nn.Einsum((64, 8), "...k,kn->...n")

    def __call__(self, x, deterministic):
        y, name = self.inside.project(x, name="other")
        assert name == "other" and self.inside.width() == 32
        return y, self.inside(x, self.head, deterministic=deterministic)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_materialized_methods_keep_state_flags_and_what_is_no_array(deterministic, x):
    model, rngs = Outside(), {"dropout": jax.random.key(3)}
    variables = model.init(jax.random.key(0), x, True)
    params, counts = variables["params"], {"inside": {"calls": jnp.array(5)}}
    others = {"other_variables": variables, "mutable": "counts"}
    base, lora = ql.linen.init(
        jax.random.key(1), model, params, CONFIG, x, True, **others
    )
    lora = randomized(lora)
    run = jax.jit(
        lambda apply, params, **more: apply(
            {"params": params, "counts": counts, **more},
            x,
            deterministic,
            rngs=rngs,
            mutable="counts",
        ),
        static_argnums=0,
    )
    got = run(ql.linen.wrap(model).apply, base, lora=lora)
    want = run(model.apply, ql.merge(base, lora))
    close(got, want)
    assert int(got[1]["counts"]["inside"]["calls"]) == 6


@pytest.mark.slow
def test_methods_of_unbound_modules_and_lifted_models_are_no_reads(x):
    """Flax runs the latter's setup without parameters first."""

    class Doubled(nn.Module):
        def double(self, x):
            return 2 * x

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(Doubled(parent=None).double(x))

    axes, rngs = {"params": 0}, {"params": True}
    heads = nn.vmap(nn.Dense, variable_axes=axes, split_rngs=rngs, axis_size=2)
    for model in (Model(), heads(8)):
        _, base, lora = setup(model, x, ql.QLoRAConfig(rank=4, dropout=0.5))
        variables = {"params": base, "lora": randomized(lora)}
        apply = ql.linen.wrap(model).apply
        dropped = apply(variables, x, rngs={"dropout": jax.random.key(0)})
        assert not np.allclose(dropped, apply(variables, x))


class Jitted(nn.Module):
    """Counts its traces."""

    @nn.compact
    def __call__(self, x):
        TRACES.append(self.path)
        w = self.param("w", nn.initializers.lecun_normal(), (64, 64))
        return nn.Dense(64, name="dense")(jnp.einsum("btd,df->btf", x, w))


class JittedMethod(nn.Module):
    @nn.jit
    @nn.compact
    def __call__(self, x):
        return Jitted(name="inside")(x)


class JittedTwice(nn.Module):
    """Two modules that differ only in their names share one trace."""

    @nn.compact
    def __call__(self, x):
        layer = nn.jit(Jitted)
        return layer(name="second")(layer(name="first")(x))


TRACES: list = []


@pytest.mark.slow
def test_modules_under_nn_jit_are_all_seen_and_share_one_trace(x):
    model, config = JittedTwice(), ql.QLoRAConfig(rank=4, targets=".*/(kernel|w)")
    _, base, lora = setup(model, x, config)
    assert set(lora) == {"first", "second"}
    lora = randomized(lora)
    TRACES.clear()
    got = ql.linen.wrap(model).apply({"params": base, "lora": lora}, x)
    assert TRACES == [("first",)]
    close(got, model.apply({"params": ql.merge(base, lora)}, x))


@pytest.mark.slow
def test_nn_jit_takes_no_trace_of_another_back_end_or_registration(x):
    model, config = JittedMethod(), ql.QLoRAConfig(rank=4, targets=".*/kernel")
    _, base, lora = setup(model, x, config)

    def traces(**options):
        TRACES.clear()
        ql.linen.wrap(model, **options).apply({"params": base, "lora": lora}, x)
        return len(TRACES)

    traces()
    assert traces() == 0
    assert traces(backend="reference") == 1
    assert traces(backend="reference") == 0
    with pytest.raises(ValueError, match="Got 'nothing'"):
        traces(backend="nothing")

    class Other(nn.Module):
        pass

    for _ in range(2):  # again too: it may have another equation
        ql.linen.register(Other, kernel="w", einsum="ab,bc->ac")
        assert traces() == 1


class Refused(nn.Module):
    """Contracted in two ways, in none, along a wrong axis; and one that is unused."""

    @nn.compact
    def __call__(self, x):
        tied = nn.Einsum((64, 64), use_bias=False, name="tied")
        x = tied(tied(x, "btd,df->btf"), "btd,fd->btf")
        x = nn.Einsum((5, 64), "btd,td->btd", use_bias=False, name="gate")(x)
        layers = nn.vmap(
            nn.Dense,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            axis_size=2,
        )
        return layers(64, name="mapped")(x)


def test_leaves_that_cannot_be_targets_are_all_named_in_one_error(x):
    params = dict(Refused().init(jax.random.key(0), x)["params"])
    params["unused"] = {"kernel": jnp.ones((64, 8))}
    params["ints"] = {"kernel": jnp.ones((64, 8), jnp.int32)}
    config = ql.QLoRAConfig(rank=4, targets=".*")
    with pytest.raises(ValueError, match="these leaves cannot be targets") as error:
        ql.linen.init(jax.random.key(1), Refused(), params, config, x)
    reasons = dict(
        line.strip().split(": ", 1) for line in str(error.value).splitlines()[1:]
    )
    wanted = {
        "tied/kernel": r"must be contracted in one way. Got several: \['kn', 'nk'\]",
        "gate/kernel": "must contract the kernel.*Got 'btd,td->btd'",
        "mapped/kernel": "must be stacked along axis 0.*Got axis 1",
        "mapped/bias": "must be stacked along axis 0.*Got axis 1",
        "unused/kernel": "no module that ran owns it",
        "ints/kernel": "no module that ran owns it",
    }
    assert set(reasons) == set(wanted)
    for path, reason in wanted.items():
        assert re.search(reason, reasons[path]), reasons[path]


@pytest.mark.slow
def test_a_tree_that_is_packed_in_part_can_be_packed_further(x):
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(64, name="b")(nn.Dense(64, name="a")(x))

    _, base, _ = setup(Two(), x, ql.QLoRAConfig(rank=4, targets="a/kernel"))
    init = lambda targets, **settings: ql.linen.init(
        jax.random.key(1), Two(), base, ql.QLoRAConfig(targets=targets, **settings), x
    )
    base_of_both, lora = init("b/kernel")
    assert isinstance(base_of_both["b"]["kernel"], ql.QTensor) and set(lora) == {"b"}
    base_of_both, lora = init(".*/kernel")
    assert base_of_both["a"]["kernel"] is base["a"]["kernel"]
    assert set(lora) == {"a", "b"}
    with pytest.raises(ValueError, match=r"  a/kernel: it is packed in Packing\(fmt="):
        init(".*/kernel", fmt="int4")


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [(), "layers"])
def test_new_values_of_adapters_cause_no_new_trace(scanned, x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(64)(x), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return layers(name="layers")(x, None)[0]

    _, base, lora = setup(Deep(), x)
    wrapped, traces = ql.linen.wrap(Deep(), scanned=scanned), []

    @jax.jit
    def run(lora, base):
        traces.append(1)
        return wrapped.apply({"params": base, "lora": lora}, x)

    first, second = run(lora, base), run(randomized(lora), base)
    assert len(traces) == 1 and not np.allclose(first, second)


@pytest.mark.slow
def test_other_collections_mutable_and_method_pass_through(x):
    class Model(nn.Module):
        def setup(self):
            self.dense = nn.Dense(32)
            self.norm = nn.BatchNorm()

        def __call__(self, x, train=False):
            x = self.norm(self.project(x), use_running_average=not train)
            self.sow("intermediates", "normed", x)
            return x

        def project(self, x):
            return self.dense(x)

    model = Model()
    variables = model.init(jax.random.key(0), x)
    params, stats = variables["params"], variables["batch_stats"]
    base, lora = ql.linen.init(
        jax.random.key(1),
        model,
        params,
        CONFIG,
        x,
        other_variables={"batch_stats": stats},
    )
    lora = randomized(lora)
    packed = {"params": base, "lora": lora, "batch_stats": stats}
    merged = {"params": ql.merge(base, lora), "batch_stats": stats}
    wrapped = ql.linen.wrap(model)
    for options in (
        {"train": True, "mutable": ["batch_stats", "intermediates"]},
        {"mutable": "intermediates"},
        {"method": "project"},
        {"method": Model.project},
    ):
        close(wrapped.apply(packed, x, **options), model.apply(merged, x, **options))


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [(), "layers"])
def test_mutable_params_come_back_as_they_were_given(scanned, x):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(64)(GateUp(name="self_read")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": 0, "intermediates": 0}
            layers = nn.scan(
                Layer, variable_axes=axes, split_rngs={"params": True}, length=2
            )
            x = layers(name="layers")(x, None)[0]
            self.sow("intermediates", "last", x)
            return x

    config = ql.QLoRAConfig(rank=4, targets=".*(kernel|gate|up)")
    _, base, lora = setup(Model(), x, config)
    wrapped = ql.linen.wrap(Model(), scanned=scanned)
    variables = {"params": base, "lora": randomized(lora)}
    y, got = wrapped.apply(variables, x, mutable=True)
    assert set(got) == {"params", "lora", "intermediates"}
    close({name: got[name] for name in variables}, variables)
    close(wrapped.apply(got, x), y)
    combined = {"params": ql.combine(base, lora)}
    close(wrapped.apply(combined, x, mutable="params")[1], combined)


def test_clones_are_wrapped_and_binding_is_refused(x):
    _, base, lora = setup(nn.Dense(8, name="old"), x)
    wrapped = ql.linen.wrap(nn.Dense(4), backend="reference")
    for clone in (wrapped.clone(features=8), wrapped.copy(features=8, name="new")):
        assert isinstance(clone, ql.linen.WrappedModel)
        assert (clone.features, clone.backend) == (8, "reference")
    lora = randomized(lora)
    want = nn.Dense(8).apply({"params": ql.merge(base, lora)}, x)
    close(clone.apply({"params": base, "lora": lora}, x), want)
    with pytest.raises(AttributeError, match="no `bind`.*Use apply"):
        wrapped.bind({"params": base, "lora": lora})


@pytest.mark.slow
def test_attention_with_a_cache_decodes_as_the_merged_model(x):
    model = nn.MultiHeadDotProductAttention(4, qkv_features=64, decode=True)
    variables = model.init(jax.random.key(0), x)
    cache, tokens = variables["cache"], jnp.split(x, x.shape[1], axis=1)
    others = {"other_variables": {"cache": cache}, "mutable": "cache"}
    base, lora = ql.linen.init(
        jax.random.key(1), model, variables["params"], CONFIG, tokens[0], **others
    )
    lora = randomized(lora)

    def decode(apply, variables):
        step = jax.jit(lambda *args: apply(*args, mutable="cache"))
        outputs, state = [], {"cache": cache}
        for token in tokens:
            y, state = step({**variables, **state}, token)
            outputs.append(y)
        return outputs, state

    got = decode(ql.linen.wrap(model).apply, {"params": base, "lora": lora})
    want = decode(model.apply, {"params": ql.merge(base, lora)})
    close(got, want)
    assert int(got[1]["cache"]["cache_index"]) == len(tokens)


@pytest.mark.parametrize("fmt", ["nf4", None])
def test_a_dot_general_of_a_modules_own_is_not_called_where_there_is_an_adapter(fmt, x):
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(args)
        return jax.lax.dot_general(*args, **kwargs)

    model = nn.Dense(8, dot_general=dot_general)
    _, base, lora = setup(model, x, ql.QLoRAConfig(rank=4, fmt=fmt))
    lora = randomized(lora)
    calls.clear()
    got = ql.linen.wrap(model).apply({"params": base, "lora": lora}, x)
    assert not calls
    close(got, nn.Dense(8).apply({"params": ql.merge(base, lora)}, x))


def test_wrapping_twice_is_wrapping_once(x):
    _, base, lora = setup(nn.Dense(8), x)
    once = ql.linen.wrap(nn.Dense(8))
    assert ql.linen.wrap(once) is once
    again, _ = ql.linen.init(jax.random.key(1), once, ql.dequantize(base), CONFIG, x)
    assert again["kernel"].shape == (64, 8)


class DeepLayer(nn.Module):
    cls: type

    @nn.compact
    def __call__(self, x, _):
        x = jnp.tanh(nn.Dense(64, name="plain")(x))
        return jnp.tanh(self.cls(64, name="own")(x)), None


class Deep(nn.Module):
    """Three scanned layers, each with a layer of flax's and one of another class."""

    cls: type = ql.linen.QLoRADense

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            DeepLayer,
            variable_axes={"params": 0, "lora": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(self.cls, name="layers")(x, None)[0]


class TestQLoRADense:
    @pytest.mark.slow
    @pytest.mark.parametrize("fmt", ["fp4", "int4", "int8"])
    def test_formats_and_dtypes(self, fmt, x):
        layer = ql.linen.QLoRADense(
            32,
            rank=4,
            fmt=fmt,
            double_quant=False,
            dtype=jnp.bfloat16,
            param_dtype=jnp.bfloat16,
            precision="highest",
            bias_init=nn.initializers.normal(),
        )
        variables = layer.init(jax.random.key(0), x)
        kernel = variables["params"]["kernel"]
        assert (kernel.fmt, kernel.double_quant) == (fmt, False)
        assert kernel.dtype == variables["params"]["bias"].dtype == jnp.bfloat16
        plain = nn.Dense(32, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        want = plain.apply({"params": ql.dequantize(variables["params"])}, x)
        close(layer.apply(variables, x), want, 5e-3)
        jaxpr = str(jax.make_jaxpr(layer.apply)(variables, x))
        assert jaxpr.count("Precision.HIGHEST") >= 3

    def test_rank_stabilized_and_the_dtype_of_the_adapter(self, x):
        layer = ql.linen.QLoRADense(
            32, rank=4, alpha=8, rank_stabilized=True, lora_dtype="bfloat16"
        )
        variables = layer.init(jax.random.key(0), x)
        lora = variables["lora"]["kernel"]
        assert lora.scaling == 8 / 4**0.5
        assert lora.a.dtype == lora.b.dtype == jnp.bfloat16
        with pytest.raises(TypeError, match="`lora_dtype` must be a floating dtype"):
            ql.linen.QLoRADense(8, lora_dtype="int8").init(jax.random.key(0), x)

    @pytest.mark.slow
    def test_in_a_scan_under_jit_grad_and_vmap(self, x):
        variables = Deep().init(jax.random.key(0), x)
        base, lora = variables["params"], randomized(variables["lora"])
        kernel = base["layers"]["own"]["kernel"]
        assert kernel.shape == (3, 64, 64)
        assert len(np.unique(kernel.codes, axis=0)) == 3
        model = Deep(nn.Dense)

        def packed(lora, x):
            y = Deep().apply({"params": base, "lora": lora}, x)
            return jnp.sum(jnp.sin(y))

        def merged(lora, x):
            y = model.apply({"params": ql.merge(base, lora)}, x)
            return jnp.sum(jnp.sin(y))

        grads = lambda f: jax.jit(
            jax.vmap(jax.value_and_grad(f, argnums=(0, 1)), (None, 0))
        )(lora, x)
        close(grads(packed), grads(merged), 1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("scanned", [(), "layers"])
    def test_in_a_wrapped_model(self, scanned, x):
        variables = Deep().init(jax.random.key(0), x)
        config = ql.QLoRAConfig(rank=4, targets=".*/plain/kernel")
        base, lora = ql.init(jax.random.key(1), variables["params"], config)
        lora["layers"] |= variables["lora"]["layers"]
        lora = randomized(lora)
        got = ql.linen.wrap(Deep(), scanned=scanned).apply(
            {"params": base, "lora": lora}, x
        )
        want = Deep(nn.Dense).apply({"params": ql.merge(base, lora)}, x)
        close(got, want)
        params = variables["params"]
        with pytest.raises(
            ValueError, match="not hold a QLoRADense.*Got one at 'layers/own'"
        ):
            ql.linen.init(jax.random.key(1), Deep(), params, config, x)
