"""The table of model pairs that the contract of both integrations runs on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
from flax import nnx
from integration_models import (
    DIM,
    HEADS,
    HIDDEN,
    LAYERS,
    NNXMLP,
    LinenBlock,
    LinenEmbed,
    LinenMapped,
    LinenMLP,
    LinenOwn,
    LinenStack,
    LinenTwoKernels,
    NNXBlock,
    NNXEmbed,
    NNXMapped,
    NNXOwn,
    NNXStack,
    NNXTwoKernels,
)


class Pair(NamedTuple):
    """One model in both, the shape of its input, and its kernels `[..., K, N]`.

    Attributes:
        linen: Makes the linen module.
        nnx: Makes the NNX module; takes `rngs`.
        shape: Shape of the input.
        matrices: The matrix form of each kernel by path, blocks running along K.
    """

    linen: Callable[..., Any]
    nnx: Callable[..., Any]
    shape: tuple[int, ...]
    matrices: dict[str, tuple[int, ...]]


def general(features, axis=-1, batch=()):
    """Both general linear layers on an input `[2, 5, 4, 16]` or `[2, 5, 64]`."""
    shape = (2, 5, DIM) if axis == -1 else (2, 5, HEADS, 16)
    axes = (axis,) if isinstance(axis, int) else axis
    sizes = tuple(shape[a] for a in sorted(axes))  # as Flax orders the kernel's axes
    return (
        lambda **how: nn.DenseGeneral(features, axis, batch_dims=batch, **how),
        lambda **how: nnx.LinearGeneral(
            sizes, features, axis=axis, batch_axis={a: shape[a] for a in batch}, **how
        ),
        shape,
    )


def einsum(equation, shape, bias=None):
    """Both Einsum layers; NNX needs the shape of the bias."""
    return (
        lambda **how: nn.Einsum(shape, equation, use_bias=bias is not None, **how),
        lambda **how: nnx.Einsum(equation, shape, bias, **how),
    )


def own(equation, shape):
    return (
        lambda **how: LinenOwn(shape, equation, **how),
        lambda **how: NNXOwn(shape, equation, **how),
    )


def stack(linen, flax_nnx, **options):
    return (
        lambda: LinenStack(linen, **options),
        lambda **how: NNXStack(flax_nnx, **options, **how),
    )


def mapped(linen, flax_nnx):
    return lambda: LinenMapped(linen), lambda **how: NNXMapped(flax_nnx, **how)


SEQUENCE = (2, 5, DIM)
SQUARE = own("btd,df->btf", (DIM, DIM))
CONVOLUTION = (
    lambda **how: nn.Conv(24, (3,), **how),
    lambda **how: nnx.Conv(DIM, 24, (3,), **how),
)
MLP = {
    "layer/gate": (DIM, HIDDEN),
    "layer/up": (DIM, HIDDEN),
    "layer/down": (HIDDEN, DIM),
}
BLOCK = {
    **{f"layer/attention/{n}": (DIM, DIM) for n in ("query", "key", "value", "out")},
    "layer/mlp/gate": (DIM, HIDDEN),
    "layer/mlp/up": (DIM, HIDDEN),
    "layer/mlp/down": (HIDDEN, DIM),
}
OWN_STACKED = {"layers/layer/w": (LAYERS, DIM, DIM)}

PAIRS = {
    "dense": Pair(
        lambda **how: nn.Dense(24, **how),
        lambda **how: nnx.Linear(DIM, 24, **how),
        SEQUENCE, {"kernel": (DIM, 24)},
    ),
    "dense on a vector": Pair(
        lambda **how: nn.Dense(24, use_bias=False, **how),
        lambda **how: nnx.Linear(DIM, 24, use_bias=False, **how),
        (DIM,), {"kernel": (DIM, 24)},
    ),
    "square": Pair(
        lambda **how: nn.Dense(DIM, use_bias=False, **how),
        lambda **how: nnx.Linear(DIM, DIM, use_bias=False, **how),
        SEQUENCE, {"kernel": (DIM, DIM)},
    ),
    "general": Pair(*general((HEADS, 8)), {"kernel": (DIM, 32)}),
    "general out": Pair(*general(24, (-2, -1)), {"kernel": (DIM, 24)}),
    "general first": Pair(*general((3, 4), (0, 1)), {"kernel": (10, 12)}),
    "general backwards": Pair(*general(24, (-1, -2)), {"kernel": (DIM, 24)}),
    "general batch": Pair(*general((3, 8), -1, (0,)), {"kernel": (2, DIM, 24)}),
    "einsum": Pair(*einsum("BTD,NDH->BTNH", (HEADS, DIM, 8), (HEADS, 8)), SEQUENCE,
                   {"kernel": (DIM, 32)}),
    "einsum ellipsis": Pair(*einsum("...D,NHD->...NH", (2, 12, DIM)), SEQUENCE,
                            {"kernel": (DIM, 24)}),
    "einsum out": Pair(*einsum("BTNH,NHD->BTD", (HEADS, 16, 24)), (2, 5, HEADS, 16),
                       {"kernel": (DIM, 24)}),
    "einsum fused": Pair(*einsum("BTD,SNDH->SBTNH", (2, HEADS, DIM, 8)), SEQUENCE,
                         {"kernel": (DIM, 64)}),
    "einsum experts": Pair(*einsum("EBD,EDF->EBF", (2, DIM, 24)), (2, 5, DIM),
                           {"kernel": (2, DIM, 24)}),
    "attention": Pair(
        lambda **how: nn.MultiHeadDotProductAttention(HEADS, **how),
        lambda **how: nnx.MultiHeadAttention(HEADS, DIM, decode=False, **how),
        SEQUENCE, {f"{n}/kernel": (DIM, DIM) for n in ("query", "key", "value", "out")},
    ),
    "normalized attention": Pair(
        lambda: nn.MultiHeadDotProductAttention(HEADS, normalize_qk=True),
        lambda **how: nnx.MultiHeadAttention(
            HEADS, DIM, decode=False, normalize_qk=True, **how),
        SEQUENCE, {f"{n}/kernel": (DIM, DIM) for n in ("query", "key", "value", "out")},
    ),
    "convolution": Pair(*CONVOLUTION, SEQUENCE, {"kernel": (3 * DIM, 24)}),
    "mapped": Pair(
        *mapped(
            lambda **how: nn.Dense(24, **how),
            lambda **how: nnx.Linear(DIM, 24, **how),
        ),
        SEQUENCE, {"heads/kernel": (LAYERS, DIM, 24)},
    ),
    "mapped own": Pair(*mapped(*SQUARE), SEQUENCE, {"heads/w": (LAYERS, DIM, DIM)}),
    "mapped convolution": Pair(
        *mapped(*CONVOLUTION), SEQUENCE, {"heads/kernel": (LAYERS, 3 * DIM, 24)}
    ),
    "embedding": Pair(LinenEmbed, NNXEmbed, SEQUENCE, {"embed/embedding": (48, 32)}),
    "own": Pair(*SQUARE, SEQUENCE, {"w": (DIM, DIM)}),
    "two kernels": Pair(LinenTwoKernels, NNXTwoKernels, SEQUENCE,
                        {"gate": (DIM, HIDDEN), "up": (DIM, HIDDEN)}),
    "mlp": Pair(LinenMLP, NNXMLP, SEQUENCE, {
        "gate/kernel": (DIM, HIDDEN), "up/kernel": (DIM, HIDDEN),
        "down/kernel": (HIDDEN, DIM),
    }),
    "attention stack": Pair(*stack(LinenBlock, NNXBlock, remat=True), SEQUENCE, {
        f"layers/{path}/kernel": (LAYERS, *matrix) for path, matrix in BLOCK.items()
    }),
    "mlp stack": Pair(*stack(LinenMLP, NNXMLP), SEQUENCE, {
        f"layers/{path}/kernel": (LAYERS, *matrix) for path, matrix in MLP.items()
    }),
    "own stack": Pair(*stack(*SQUARE), SEQUENCE, OWN_STACKED),
    "own stack remat": Pair(*stack(*SQUARE, remat=True), SEQUENCE, OWN_STACKED),
}  # fmt: skip
# Sixteen layers and nothing else, to measure the memory of a compiled gradient.
DEEP = {
    "dense": Pair(
        *stack(
            lambda **how: nn.Dense(256, use_bias=False, **how),
            lambda **how: nnx.Linear(256, 256, use_bias=False, **how),
            length=16,
        ),
        (8, 256), {"layers/layer/kernel": (16, 256, 256)},
    ),
    "own": Pair(*stack(*own("bd,df->bf", (512, 512)), length=16), (4, 512),
                     {"layers/layer/w": (16, 512, 512)}),
}  # fmt: skip
