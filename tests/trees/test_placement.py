"""`ql.sharding.place`: both trees on a mesh, in Auto and Explicit mode."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import make_mesh, normal, refusal, spread, trees_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import assert_close

import qlora_jax as ql

CONFIG = ql.QLoRAConfig(rank=4, block_size=16)
RULES = {
    "up/kernel": P("a", "b"),
    "down/kernel": P("b", "a"),
    "stack/.*": P(None, "a", "b"),
    "embedding": P("b"),
}


def trees():
    def draw_array(*shape):
        return normal(len(shape), shape, scale=1 / 8)

    params = {
        "up": {"kernel": draw_array(64, 128), "bias": draw_array(128)},
        "down": {"kernel": draw_array(128, 64)},
        "stack": {"kernel": draw_array(3, 64, 64)},
        "embedding": draw_array(10, 64),
    }
    return trees_of(params, rank=4, block_size=16, trainable="up/bias")


def input_of(*lead):
    return np.asarray(normal(7, (*lead, 8, 64)))


def leaf_specs(tree):
    flat = jax.tree_util.tree_leaves_with_path(tree)

    def path_text(path):
        return jax.tree_util.keystr(path, simple=True, separator="/")

    def spec(a):
        return tuple(a.sharding.spec) + (None,) * (a.ndim - len(a.sharding.spec))

    return {path_text(path): spec(leaf) for path, leaf in flat}


@pytest.mark.slow
def test_where_the_leaves_are(mesh):
    base, lora = ql.sharding.place(*trees(), mesh, RULES, rows=["a"])
    specs = leaf_specs(base) | {f"lora/{k}": v for k, v in leaf_specs(lora).items()}
    assert specs["up/kernel/codes"] == ("a", "b")
    assert specs["up/kernel/scales"] == ("a", "b")
    assert specs["up/kernel/scale_scales"] == (None,)
    assert specs["stack/kernel/codes"] == (None, "a", "b")
    assert specs["up/bias"] == (None,)
    assert specs["embedding"] == ("b", None)
    # A is split along K and B along N, over all mesh axes of the kernel. Mesh axes that
    # split this axis of the kernel come first.
    assert specs["lora/up/kernel/a"] == (("a", "b"), None)
    assert specs["lora/up/kernel/b"] == (None, ("b", "a"))
    assert specs["lora/down/kernel/a"] == (("b", "a"), None)
    assert specs["lora/stack/kernel/b"] == (None, None, ("b", "a"))
    assert base["up"]["kernel"].placement.kernel == (("a",), ("b",))


def test_keys_with_slashes_stay_whole(mesh):
    """As in the trees of Haiku."""
    params = {"mlp/~/linear_0": {"w": normal(0, (64, 32))}}
    trees = trees_of(params, rank=2, block_size=16, targets=".*/w")
    placed = ql.sharding.place(*trees, mesh, {".*/w": P(None, "b")})
    assert [*map(list, placed)] == [[*params], [*params]]


def test_inside_jit_and_on_shapes(mesh):
    base, lora = trees()

    def place(base, lora):
        return ql.sharding.place(base, lora, mesh, RULES)

    want = place(base, lora)
    with jax.set_mesh(mesh):
        got = jax.jit(place)(base, lora)
    chex.assert_trees_all_equal(got, want)
    assert leaf_specs(got) == leaf_specs(want)
    shapes = place(*jax.eval_shape(lambda: (base, lora)))
    assert jax.tree.structure(shapes) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(shapes), jax.tree.leaves(want), strict=True):
        assert isinstance(a, jax.ShapeDtypeStruct)
        assert (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, b.sharding)


def test_specs_from_boxes_and_trees(mesh):
    """tests/integrations/test_boxes.py has models in boxes."""
    base, lora = ({k: tree[k] for k in ("up", "down")} for tree in trees())

    def make_box(cls, *names):
        return cls(jnp.zeros(1), names)

    up = {"kernel": make_box(nn.Partitioned, "a", "b")}
    up["bias"] = make_box(nn.Partitioned, "b")
    boxed = {
        "up": up,
        "down": {"kernel": make_box(nn.LogicallyPartitioned, "mlp", "embed")},
    }
    specs = {
        "up": {"kernel": P("a", "b"), "bias": P("b")},
        "down": {"kernel": P("b", "a")},
    }

    def place(specs, **names):
        return ql.sharding.place(base, lora, mesh, specs=specs, rows=["a"], **names)

    by_boxes = place(boxed, logical_axes={"mlp": "b", "embed": "a"})
    assert leaf_specs(by_boxes) == leaf_specs(place(specs))


@pytest.mark.slow
def test_inside_a_shard_map_over_other_axes():
    mesh = make_mesh("Auto")
    base, lora = trees()
    x = input_of()
    want = ql.apply(base["up"], lora["up"], x)
    rules = {"up/kernel": P(None, "b")}
    base, lora = ql.sharding.place(base, lora, mesh, rules, rows=["a"])
    specs = {"in_specs": (P(), P(), P("a")), "out_specs": P("a")}
    run = jax.shard_map(ql.apply, mesh=mesh, **specs, axis_names={"a"})
    with jax.set_mesh(mesh):
        got = jax.jit(run)(base["up"], lora["up"], x)
    assert_close(got, want)


def test_auto_axes_and_inputs_without_a_sharding():
    mesh = make_mesh("Auto")
    base, lora = trees()
    x = input_of()

    def run(x):
        return jnp.sum(ql.apply(base["up"], lora["up"], x) ** 2)

    want = jax.grad(run)(x)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(run))(x)
    assert_close(got, want)


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"nothing": P("a")}, "every rule must match a leaf. Got ..nothing"),
        ({"up/kernel": P("model")}, r"up/kernel: the mesh has axes .*Got \['model'\]"),
        ({"up/kernel": P("a", "a")}, "each mesh axis must split one axis"),
        ({"up/bias": P(None, "a")}, "must have at most 1 entries"),
        ({"embedding": P("a")}, "embedding: axis 0 of .* would fit: 1, 2, 5"),
        ({"embedding": P("c", 1)}, r"the mesh has axes .*Got \['c', 1\]"),
        ({"embedding": (("b", ["a"]),)}, r"the mesh has axes .*Got \[\['a'\]\]"),
        ({"up/(": P("a")}, r"`rules` must be a regular expression. Got 'up/\('"),
    ],
)
def test_what_does_not_fit_is_refused(mesh, rules, match):
    with pytest.raises(ValueError, match=match):
        ql.sharding.place(*trees(), mesh, rules)


def test_options_that_do_not_fit_are_refused(mesh):
    model = nnx.Linear(64, 8, rngs=nnx.Rngs(0))
    model = ql.nnx.wrap(model, ql.QLoRAConfig(), rngs=nnx.Rngs(1))
    for place in (ql.sharding.place, lambda *_: ql.nnx.place(model, None)):
        with pytest.raises(TypeError, match="`mesh` must be .*Mesh. Got NoneType"):
            place(*trees(), None)
    with pytest.raises(ValueError, match="`rows` must name axes of the mesh"):
        ql.sharding.place({}, {}, mesh, {}, rows=["batch"])
    with pytest.raises(ValueError, match="must not both be given"):
        ql.sharding.place({}, {}, mesh, {}, specs={})
    names, rules = {"embed": "a"}, {"kernel": P("a")}
    with pytest.raises(ValueError, match="`logical_axes` must not be given with `rule"):
        ql.sharding.place(*trees(), mesh, rules, logical_axes=names)
    with pytest.raises(ValueError, match="`logical_axes` must not be given with `rule"):
        ql.nnx.place(model, mesh, rules, logical_axes=names)
    base = {"kernel": jnp.ones((64, 8))}
    for spec in (NamedSharding(mesh, P("a")), "a"):
        with pytest.raises(TypeError, match="be PartitionSpecs.* Got .* at 'kernel'"):
            ql.sharding.place(base, {}, mesh, specs={"kernel": spec})


def test_specs_are_not_read_letter_by_letter(mesh):
    """The mesh has the axes "a" and "b"."""
    base, lora = trees()

    def place(rules=None, **options):
        return ql.sharding.place(base, lora, mesh, rules, **options)

    for rules in ({"up/kernel": "ab"}, {"up/kernel": None}):
        with pytest.raises(TypeError, match="to PartitionSpecs. Got ('ab'|None)"):
            place(rules)
    with pytest.raises(TypeError, match="`rules` must be a dict of patterns. Got "):
        place([".*"])
    for rows in ("ab", None):
        with pytest.raises(TypeError, match="`rows` must be a sequence.*('ab'|None)"):
            place(RULES, rows=rows)
    boxes = {"up": {"kernel": nn.Partitioned(jnp.ones(1), "ab")}}
    with pytest.raises(TypeError, match="names of axes must .* Got 'ab' at 'up/kerne"):
        place(specs=boxes)
    layer = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    layer.kernel.set_metadata(out_sharding="ab")
    layer = ql.nnx.wrap(layer, CONFIG, rngs=nnx.Rngs(1))
    with pytest.raises(TypeError, match="names of axes must .* Got 'ab' at 'kernel'"):
        ql.nnx.place(layer, mesh)


def test_every_leaf_that_does_not_fit_is_named(mesh):
    params = {
        "a": {"kernel": np.ones((96, 8), np.float32)},  # 3 blocks of 32
        "c": {"kernel": np.ones((4, 8, 64), np.float32)},
    }
    contract = {"a/kernel": -2, "c/kernel": (-3, -2)}
    trees = trees_of(params, rank=4, block_size=32, contract=contract)
    rules = {"a/kernel": P("a"), "c/kernel": P(None, "b")}
    trees[0]["eps"] = 1e-5
    refusal(
        lambda: ql.sharding.place(*trees, mesh, rules),
        "eps: it must be an array. Got float",
        "cannot be split as asked",
        "a/kernel: the 3 blocks of 32 along K = 96 must divide among 4",
        "c/kernel: axes [0, 1] are stored as one",
    )


@pytest.mark.slow
def test_an_nnx_model(mesh):
    """Placed by the metadata of its variables. llm/models/test_mesh.py has rules."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            # Without a mesh set, the metadata has no effect.
            self.up = nnx.Linear(64, 128, use_bias=False, rngs=rngs)
            self.up.kernel.set_metadata(out_sharding=("embed", "mlp"))
            self.down = nnx.Linear(128, 64, rngs=rngs)

        def __call__(self, x):
            return self.down(nnx.tanh(self.up(x)))

    model = ql.nnx.wrap(Model(nnx.Rngs(0)), CONFIG, rngs=nnx.Rngs(1))
    x = input_of()

    def loss(model, x):
        return jnp.mean(model(x) ** 2)

    grad = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    want = model(x), grad(model, x)
    names = {"embed": "a", "mlp": "b"}
    placed = ql.nnx.place(model, mesh, logical_axes=names, rows=["a"])
    up = placed.up.kernel.get_value()
    assert up.codes.sharding.spec == P("a", "b")
    assert placed.up.kernel_lora.a.get_value().sharding.spec[0] == ("a", "b")
    assert placed.down.bias.get_value().sharding.is_fully_replicated
    assert model.up.kernel.get_value().placement is None  # left alone
    with jax.set_mesh(mesh):
        x = spread(x, mesh, "a")
        got = nnx.jit(lambda model, x: model(x))(placed, x), grad(placed, x)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(want))
