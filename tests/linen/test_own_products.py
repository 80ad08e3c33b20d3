"""Modules that compute more than the product of the class that they resemble."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from helpers import fast_and_slow, randomized
from integration_models import INIT
from linen_helpers import assert_as_merged, merged, variables_of
from tolerances import assert_close

import qlora_jax as ql

KEY = jax.random.key(0)
TABLE = ql.QLoRAConfig(targets=(), trainable_rows={"embedding": [1, 7]})


def standardize(w):
    return (w - w.mean(0, keepdims=True)) / w.std(0, keepdims=True)


def mask(w):
    return jnp.where(w > 0, w, 0)


def with_param(base, change):
    class OwnParam(base):
        def param(self, name, *args, **kwargs):
            w = super().param(name, *args, **kwargs)
            return w if name == "bias" else change(w)

    return OwnParam


class OwnTable(nn.Embed):
    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = 2 * self.param("embedding", INIT, shape)


class Mixin(nn.Module):
    """Comes after `nn.Dense` in the order of bases, and before `nn.Module`."""

    def param(self, name, *args, **kwargs):
        w = super().param(name, *args, **kwargs)
        return w if name == "bias" else 2 * w


class Mixed(nn.Dense, Mixin):
    pass


def doubled_product(*args, **kwargs):
    return 2 * jax.lax.dot_general(*args, **kwargs)


def doubling_promotion(*arrays, dtype=None, inexact=True):
    arrays = nn.dtypes.promote_dtype(*arrays, dtype=dtype, inexact=inexact)
    return [arrays[0], 2 * arrays[1], *arrays[2:]]


OWN = {
    "standardized dense": with_param(nn.Dense, standardize)(8),
    "masked dense": with_param(nn.Dense, mask)(8),
    "masked general": with_param(nn.DenseGeneral, mask)((4, 16)),
    "standardized einsum": with_param(nn.Einsum, standardize)((64, 8), "btd,df->btf"),
    "mixed": Mixed(8),
    "dot_general": nn.Dense(8, dot_general=doubled_product),
    "dot_general_cls": nn.Dense(8, dot_general_cls=lambda: doubled_product),
    "general dot_general": nn.DenseGeneral((4, 16), dot_general=doubled_product),
    "promote_dtype": nn.Dense(8, promote_dtype=doubling_promotion),
}


@pytest.mark.parametrize("name", fast_and_slow([*OWN][4:6], [*OWN][:4] + [*OWN][6:]))
def test_layers_with_products_of_their_own_compute_as_on_merged_weights(name, x):
    assert_as_merged(OWN[name], x, variables_of(OWN[name], x))


@pytest.mark.slow
def test_a_dot_general_is_called_on_float_weights_with_a_plain_lora(x):
    model = OWN["dot_general"]
    assert_as_merged(model, x, variables_of(model, x, ql.QLoRAConfig(fmt=None)))


@pytest.mark.parametrize("name", ["masked general", "general dot_general"])
def test_the_rule_of_the_base_class_still_finds_the_contracted_axes(name, x):
    lora = variables_of(OWN[name], x)["lora"]["kernel"]
    assert (lora.a.shape, lora.b.shape) == ((64, 4), (4, 64))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [with_param(nn.Embed, standardize), OwnTable])
def test_tables_that_change_their_rows_are_read_as_on_merged_weights(cls):
    ids = jnp.array([[1, 5, 3]])
    variables = variables_of(cls(64, 32), ids, TABLE)
    got = ql.linen.wrap(cls(64, 32)).apply(variables, ids)
    assert_close(got, cls(64, 32).apply(merged(variables), ids))


class OwnHelpers(nn.Dense):
    """Overrides nothing on which the product depends."""

    features: int = 8
    scale: float = 2.0

    def describe(self):
        return f"{self.features} features"


class OwnHead(nn.Embed):
    def attend(self, query):
        return 2 * super().attend(query)


@pytest.mark.slow
def test_subclasses_that_leave_the_product_alone_stay_packed(x):
    config = ql.QLoRAConfig(rank=4, dropout=0.5)  # which packed products alone have
    variables = variables_of(OwnHelpers(), x, config)
    assert_as_merged(OwnHelpers(), x, variables, gradients=False)
    table, ids = OwnHead(64, 32), jnp.array([[1, 5, 3]])
    variables = variables_of(table, ids, TABLE)

    def apply(variables):
        return ql.linen.wrap(table).apply(variables, ids)

    # A module that reads its table in float runs under `nn.remat`.
    assert "remat" not in (jaxpr := str(jax.make_jaxpr(apply)(variables)))
    assert "checkpoint" not in jaxpr


class Base(nn.Module):
    features: int = 8

    def weights(self, *others):
        return [self.param(n, nn.initializers.normal(1), s) for n, s in others]


class OtherBias(Base):
    @nn.compact
    def __call__(self, x):
        w, b = self.weights(("w", (64, 8)), ("b", (8,)))
        return x @ w + b[None, None]


class Activation(Base):
    @nn.compact
    def __call__(self, x):
        (w,) = self.weights(("w", (64, 8)))
        return nn.relu(x @ w)


class Scaled(Base):
    @nn.compact
    def __call__(self, x):
        (w,) = self.weights(("w", (64, 8)))
        return 2 * x @ w


class Residual(Base):
    @nn.compact
    def __call__(self, x):
        (w,) = self.weights(("w", (64, 64)))
        return x + x @ w


class IgnoresBias(Base):
    @nn.compact
    def __call__(self, x):
        w, _ = self.weights(("w", (64, 8)), ("bias", (8,)))
        return x @ w


class Dropped(Base):
    @nn.compact
    def __call__(self, x):
        (w,) = self.weights(("w", (64, 8)))
        return nn.Dropout(0.5, deterministic=False)(x @ w)


class Plain(Base):
    """Computes the product in another way than einsum, and adds its bias."""

    @nn.compact
    def __call__(self, x):
        w, bias = self.weights(("w", (64, 8)), ("bias", (8,)))
        rows = x.reshape(-1, 64).astype(jnp.float32) @ w
        return rows.reshape(*x.shape[:-1], 8) + bias[None, None]


class PlainWithoutBias(Base):
    @nn.compact
    def __call__(self, x):
        (w,) = self.weights(("w", (64, 8)))
        return jnp.dot(x, w)


OWN_TARGET = ql.QLoRAConfig(rank=4, targets="w")


@pytest.mark.parametrize(
    "cls", [OtherBias, Activation, Scaled, Residual, IgnoresBias, Dropped]
)
def test_a_registered_class_that_computes_more_is_refused(cls, x):
    ql.linen.register(cls, kernel="w", einsum="btd,df->btf")
    params = cls().init({"params": KEY, "dropout": KEY}, x)["params"]
    match = f"`cls` must compute only 'btd,df->btf'.*'w'.*Got {cls.__name__}"
    rngs = {"dropout": KEY}
    with pytest.raises(ValueError, match=match):
        ql.linen.init(KEY, cls(), params, OWN_TARGET, x, rngs=rngs)
    base, lora = ql.init(KEY, params, OWN_TARGET)  # does not run the model
    with pytest.raises(ValueError, match=match):
        ql.linen.wrap(cls()).apply({"params": base, "lora": lora}, x, rngs=rngs)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [Plain, PlainWithoutBias])
def test_a_registered_class_may_write_its_product_in_any_way(cls, x):
    ql.linen.register(cls, kernel="w", einsum="btd,df->btf")
    params = randomized(cls().init(KEY, x)["params"])
    base, lora = ql.linen.init(KEY, cls(), params, OWN_TARGET, x)
    variables = {"params": base, "lora": randomized(lora)}
    assert_as_merged(cls(), x, variables)


class Halved(PlainWithoutBias):
    def param(self, name, init_fn, *args, **kwargs):
        return super().param(name, init_fn, *args, **kwargs) / 2


@pytest.mark.slow
def test_a_subclass_of_a_registered_class_may_override_what_it_computes(x):
    ql.linen.register(PlainWithoutBias, kernel="w", einsum="btd,df->btf")
    assert_as_merged(Halved(), x, variables_of(Halved(), x, OWN_TARGET))


class TwoInputs(nn.Module):
    def __call__(self, x, scale):
        return x


class AnyInputs(nn.Module):
    def __call__(self, *inputs):
        return inputs[0]


@pytest.mark.parametrize("cls", [TwoInputs, AnyInputs])
def test_register_refuses_a_call_with_further_arguments(cls):
    with pytest.raises(TypeError, match=f"one input.* Got {cls.__name__} with"):
        ql.linen.register(cls, kernel="w", einsum="btd,df->btf")
