"""Random programs on adapters that are split over a mesh at random.

A program has layers of matrices or of experts, float or packed. Their arrays are split
by hand (perhaps not as their kernel says) or by `place` with random rules, on meshes of
Explicit axes, Auto axes or both. It computes gradients under jit, `vmap` and `scan`,
optimizer steps of two layers, or `merge`, and must equal NumPy's result in float64.
`test_random_layouts.py` runs some draws; another QLORA_JAX_SEED gives other draws.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from helpers import dequantize
from jax.sharding import AxisType, NamedSharding, PartitionSpec, reshard

import qlora_jax as ql
from qlora_jax.quant.kernel import Placement

P = PartitionSpec
FORMS = ["gradient", "vmap", "scan", "steps", "merge"]
MODES = ["Explicit", "mixed", "Auto"]
MESHES = [(2, 2, 2), (2, 4), (4, 2)]
RATE = 0.01


@dataclasses.dataclass
class Draw:
    form: str
    mode: str
    mesh: jax.sharding.Mesh
    has_experts: bool
    rows: tuple
    fmt: str | None
    is_placed: bool
    specs: list = dataclasses.field(default_factory=list)


def draw_program(rng, seed):
    def pick(options):
        return options[rng.integers(len(options))]

    form, mode = FORMS[seed % len(FORMS)], MODES[seed // len(FORMS) % len(MODES)]
    sizes = pick(MESHES)
    explicit, auto = AxisType.Explicit, AxisType.Auto
    types = {"Explicit": [explicit] * 3, "Auto": [auto] * 3}
    types["mixed"] = [explicit, auto, pick([explicit, auto])]
    kinds = rng.permutation(np.array(types[mode][: len(sizes)], object))
    mesh = jax.make_mesh(sizes, tuple("abc"[: len(sizes)]), axis_types=tuple(kinds))
    has_experts, rows = bool(rng.integers(3) == 0), pick([(8,), (4, 6), (8, 4)])
    fmt, is_placed = pick([None, "nf4", "nvfp4"]), bool(rng.integers(2))
    return Draw(form, mode, mesh, has_experts, rows, fmt, is_placed)


def draw_axes(rng, names, count):
    """Draws mesh axes for some axes of an array, whether or not the sizes divide."""
    axes = [()] * count
    for name in rng.permutation([*names]):
        if (axis := rng.integers(-1, count)) >= 0:
            axes[axis] += (str(name),)
    return tuple(axes)


def draw_spec(rng, mesh, shape):
    """Assigns each mesh axis to an array axis that it divides, or to none."""
    entries = [() for _ in shape]
    for name in rng.permutation(mesh.axis_names):
        axis = rng.integers(-1, len(shape)) if shape else -1
        if axis < 0:
            continue
        ways = math.prod(mesh.shape[n] for n in (*entries[axis], name))
        if shape[axis] % ways == 0:
            entries[axis] += (str(name),)
    return P(*(entry if len(entry) != 1 else entry[0] for entry in entries))


def split(rng, mesh, tree, num_unsplit=0):
    """Splits all arrays of a tree at random, except along `num_unsplit` first axes."""

    def put(a):
        spec = P(
            *[None] * num_unsplit, *draw_spec(rng, mesh, np.shape(a)[num_unsplit:])
        )
        return jax.device_put(a, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


def draw_layers(rng, draw):
    """Draws both trees and an input, on one device. Layers are stacked for a scan."""
    batch = (4,) * draw.has_experts
    k = int(rng.choice([64, 96]))
    shapes = {"only": (*batch, k, int(rng.choice([8, 32])))}
    if draw.form == "scan":
        shapes = {"stack": (2, *batch, k, k)}
    elif draw.form == "steps":
        shapes = {"first": (*batch, k, 64), "second": (*batch, 64, 16)}

    def draw_normal(shape):
        return rng.normal(size=shape).astype(np.float32)

    params = {n: {"kernel": draw_normal(s) / np.sqrt(s[-2])} for n, s in shapes.items()}
    config = ql.QLoRAConfig(
        rank=int(rng.choice([4, 8])),
        block_size=16,
        fmt=draw.fmt,
        contract="bkn" if draw.has_experts else -2,
        double_quant=bool(rng.integers(2)) and draw.fmt == "nf4",
    )
    base, lora = ql.init(jax.random.key(0), params, config)
    lora = jax.tree.map(lambda a: a + draw_normal(a.shape) / 8, lora)
    return base, lora, draw_normal((*batch, *draw.rows, k))


def declare(rng, mesh, tree):
    """Gives every packed kernel of a tree a random placement, or none."""

    def declare_leaf(q):
        if not isinstance(q, ql.QTensor) or rng.integers(2):
            return q
        axes = (draw_axes(rng, mesh.shape, n) for n in (q.codes.ndim, 2))
        placement = Placement((*mesh.shape.items(),), *axes)
        return dataclasses.replace(q, placement=placement)

    return jax.tree.map(declare_leaf, tree, is_leaf=lambda x: isinstance(x, ql.QTensor))


def on_mesh(rng, draw, base, lora):
    num_unsplit = draw.form == "scan"  # JAX does not scan over a split axis.
    if not draw.is_placed:
        base, lora = (split(rng, draw.mesh, tree, num_unsplit) for tree in (base, lora))
        return (declare(rng, draw.mesh, base) if draw.mode == "Auto" else base), lora
    rules = {}
    for name, layer in base.items():
        *batch, k, n = layer["kernel"].shape[num_unsplit:]
        units = (*batch, k // 16 if draw.fmt else k, n)  # whole blocks
        spec = draw_spec(rng, draw.mesh, units)
        rules[f"{name}/kernel"] = P(*[None] * num_unsplit, *spec)
    rows = tuple(draw_spec(rng, draw.mesh, draw.rows))
    return ql.sharding.place(base, lora, draw.mesh, rules, rows=rows)


def like(x, y):
    """Returns x with the sharding of y, if the types have one (Explicit axes)."""
    sharding = jax.typeof(y).sharding
    is_typed = AxisType.Explicit in sharding.mesh.axis_types
    return reshard(x, sharding) if is_typed else x


def model(draw, base, lora, x):
    if draw.form == "scan":

        def step(x, layer):
            base, lora = layer
            return like(jnp.tanh(ql.apply(base, lora, x)), x), None

        return jax.lax.scan(step, x, (base["stack"], lora["stack"]))[0]
    if draw.form == "vmap":

        def run(x):
            return ql.apply(base["only"], lora["only"], x)

        return jax.vmap(run, int(draw.has_experts), int(draw.has_experts))(x)
    for name in base:
        x = ql.apply(base[name], lora[name], x)
        x = jnp.tanh(x) if name == "first" else x
    return x


def compute(draw, base, lora, x):
    """Returns gradients of A, B and x, their values after two steps, or kernels."""
    if draw.form == "merge":
        return ql.merge(base, lora)

    def loss(lora, x):
        return jnp.sum(jnp.sin(model(draw, base, lora, x)))

    if draw.form != "steps":
        return jax.grad(loss, (0, 1))(lora, x)
    for _ in range(2):
        grads = jax.grad(loss, (0, 1))(lora, x)

        def update(param, g):
            return param - RATE * like(g, param)

        lora, x = jax.tree.map(update, (lora, x), grads)
    return lora, x


def in_numpy(draw, base, lora, x):
    """Returns the leaves that `compute` should return, computed in float64."""

    def to_float64(a):
        return np.asarray(a, np.float64)

    layers = []
    for name in base:
        kernel, adapter = base[name]["kernel"], lora[name]["kernel"]
        w = dequantize(kernel) if draw.fmt else kernel
        parts = [to_float64(w), to_float64(adapter.a), to_float64(adapter.b)]
        of_scan = draw.form == "scan"
        layers += (
            [list(part) for part in zip(*parts, strict=True)] if of_scan else [parts]
        )
    if draw.form == "merge":
        return [w + a @ b for w, a, b in layers]
    shape, batch = x.shape, x.shape[: draw.has_experts]
    x = to_float64(x).reshape(*batch, -1, shape[-1])
    has_tanh = [draw.form == "scan" or i < len(layers) - 1 for i in range(len(layers))]
    for _ in range(1 + (draw.form == "steps")):
        grads, dx = gradients(layers, has_tanh, x)
        if draw.form == "steps":
            for layer, grad in zip(layers, grads, strict=True):
                layer[1:] = [
                    param - RATE * g for param, g in zip(layer[1:], grad, strict=True)
                ]
            x = x - RATE * dx
    if draw.form == "steps":
        return [*(param for layer in layers for param in layer[1:]), x.reshape(shape)]
    if draw.form == "scan":
        grads = [[np.stack(g) for g in zip(*grads, strict=True)]]
    return [*(g for grad in grads for g in grad), dx.reshape(shape)]


def gradients(layers, has_tanh, x):
    """Returns the gradients of sum(sin y) in A and B of each layer, and in x."""

    def transposed(a):
        return np.swapaxes(a, -1, -2)

    inputs, outputs = [], []
    for (w, a, b), applies_tanh in zip(layers, has_tanh, strict=True):
        inputs.append(x)
        y = x @ w + x @ a @ b
        x = np.tanh(y) if applies_tanh else y
        outputs.append(x)
    dx, lora_grads = np.cos(x), []
    for (w, a, b), applies_tanh, x, y in reversed(
        [*zip(layers, has_tanh, inputs, outputs, strict=True)]
    ):
        dy = dx * (1 - y**2) if applies_tanh else dx
        dh = dy @ transposed(b)
        lora_grads.append([transposed(x) @ dh, transposed(x @ a) @ dy])
        dx = dy @ transposed(w) + dh @ transposed(a)
    return lora_grads[::-1], dx


def merged_and_decoded(seed):
    """Merges and decodes placed trees; returns both results, and the draw."""
    rng = np.random.default_rng(seed)
    draw = draw_program(rng, seed)
    draw = dataclasses.replace(draw, is_placed=True, fmt=draw.fmt or "int8")
    base, lora, _ = draw_layers(rng, draw)
    base, lora = on_mesh(rng, draw, base, lora)
    with jax.set_mesh(draw.mesh):
        return jax.jit(ql.merge)(base, lora), jax.jit(ql.dequantize)(base), draw


def run(seed):
    """Returns the computed and the expected results of a draw, and the draw."""
    rng = np.random.default_rng(seed)
    draw = draw_program(rng, seed)
    base, lora, x = draw_layers(rng, draw)
    want = in_numpy(draw, base, lora, x)
    base, lora = on_mesh(rng, draw, base, lora)
    x = split(rng, draw.mesh, x)

    def specs(tree):
        return jax.tree.map(lambda a: a.sharding, tree)

    draw.specs = [s.spec for s in jax.tree.leaves(specs((x, base, lora)))]
    out = specs((lora, x)) if draw.form == "steps" else None
    with jax.set_mesh(draw.mesh):
        program = jax.jit(lambda *args: compute(draw, *args), out_shardings=out)
        got = program(base, lora, x)
    return got, want, draw
