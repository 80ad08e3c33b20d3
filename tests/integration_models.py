"""Pairs of models, one in linen and one in NNX, with the same names and shapes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

DIM, HIDDEN, HEADS, LAYERS = 64, 96, 4, 3
INIT = nn.initializers.lecun_normal()


class LinenOwn(nn.Module):
    """Reads its kernel itself."""

    shape: tuple[int, ...]
    equation: str

    def setup(self):
        self.w = self.param("w", INIT, self.shape)

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w)


class NNXOwn(nnx.Module):
    def __init__(self, shape, equation, *, rngs):
        self.equation = equation
        self.w = nnx.Param(INIT(rngs.params(), shape))

    def __call__(self, x):
        return jnp.einsum(self.equation, x, self.w[...])


class LinenTwoKernels(nn.Module):
    """Two kernels of one shape in one module, which reads them itself."""

    @nn.compact
    def __call__(self, x):
        gate, up = (self.param(name, INIT, (DIM, HIDDEN)) for name in ("gate", "up"))
        return nn.silu(x @ gate) * (x @ up)


class NNXTwoKernels(nnx.Module):
    def __init__(self, *, rngs):
        def make_param():
            return nnx.Param(INIT(rngs.params(), (DIM, HIDDEN)))

        self.gate, self.up = make_param(), make_param()

    def __call__(self, x):
        return nnx.silu(x @ self.gate[...]) * (x @ self.up[...])


class LinenMLP(nn.Module):
    """gate and up have one shape, as in SwiGLU."""

    dtype: Any = None
    hidden: int = HIDDEN

    @nn.compact
    def __call__(self, x):
        gate = nn.Dense(self.hidden, dtype=self.dtype, name="gate")(x)
        up = nn.Dense(self.hidden, dtype=self.dtype, name="up")(x)
        down = nn.Dense(x.shape[-1], dtype=self.dtype, name="down")
        return down(nn.silu(gate) * up)


class NNXMLP(nnx.Module):
    def __init__(self, dtype=None, dim=DIM, hidden=HIDDEN, *, rngs):
        def make_linear(*sizes):
            return nnx.Linear(*sizes, dtype=dtype, rngs=rngs)

        self.gate, self.up = make_linear(dim, hidden), make_linear(dim, hidden)
        self.down = make_linear(hidden, dim)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class LinenEmbed(nn.Module):
    """One table, looked up and multiplied by."""

    def setup(self):
        self.embed = nn.Embed(48, 32)

    def __call__(self, x):
        tokens = jnp.argmax(x, -1) % 48
        return self.embed.attend(jnp.sin(self.embed(tokens)))


class NNXEmbed(nnx.Module):
    def __init__(self, *, rngs):
        self.embed = nnx.Embed(48, 32, rngs=rngs)

    def __call__(self, x):
        tokens = jnp.argmax(x, -1) % 48
        return self.embed.attend(jnp.sin(self.embed(tokens)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        attend = nn.MultiHeadDotProductAttention(HEADS, name="attention")
        x = x + attend(nn.LayerNorm(name="norm")(x))
        return x + LinenMLP(name="mlp")(x)


class NNXBlock(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.LayerNorm(DIM, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, DIM, decode=False, rngs=rngs)
        self.mlp = NNXMLP(rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class LinenLayer(nn.Module):
    """The body of a scan: any module, and a nonlinearity."""

    make: Callable[..., Any]

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(self.make(name="layer")(x)), None


class LinenStack(nn.Module):
    make: Callable[..., Any]
    length: int = LAYERS
    remat: bool = False
    scanned: Any = ()  # of `ql.linen.wrap`, in the contract

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(LinenLayer, prevent_cse=False) if self.remat else LinenLayer
        axes, rngs = {"params": 0, "lora": 0}, {"params": True}
        scan = nn.scan(layer, variable_axes=axes, split_rngs=rngs, length=self.length)
        return scan(self.make, name="layers")(x, None)[0]


class LinenMapped(nn.Module):
    """Layers with weights of their own, on one input."""

    make: Callable[..., Any]

    @nn.compact
    def __call__(self, x):
        axes, rngs = {"params": 0}, {"params": True}
        options = {"variable_axes": axes, "split_rngs": rngs, "axis_size": LAYERS}
        run = nn.vmap(lambda layer, x: layer(x), in_axes=None, **options)
        return run(self.make(name="heads"), x)


class NNXMapped(nnx.Module):
    def __init__(self, make, *, rngs):
        create = nnx.vmap(lambda rngs: make(rngs=rngs))
        self.heads = nnx.split_rngs(splits=LAYERS)(create)(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.heads, x)


class NNXLayer(nnx.Module):
    def __init__(self, make, *, rngs):
        self.layer = make(rngs=rngs)

    def __call__(self, x):
        return jnp.tanh(self.layer(x))


class NNXStack(nnx.Module):
    def __init__(self, make, length=LAYERS, remat=False, *, rngs):
        create = nnx.vmap(lambda rngs: NNXLayer(make, rngs=rngs))
        self.layers = nnx.split_rngs(splits=length)(create)(rngs)
        self.remat = remat

    def __call__(self, x):
        def body(layer, x):
            return layer(x)

        body = nnx.remat(body) if self.remat else body
        scan = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return scan(self.layers, x)
