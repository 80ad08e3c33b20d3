"""The table of model pairs that the contract of both integrations runs on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import integration_models as models
from flax import nnx
from integration_models import DIM, HEADS, HIDDEN, LAYERS


class Pair(NamedTuple):
    """A model in linen and NNX, its input's shape, and its kernels `[..., K, N]`."""

    linen: Callable[..., Any]
    nnx: Callable[..., Any]  # takes `rngs`
    shape: tuple[int, ...]
    matrices: dict[str, tuple[int, ...]]  # by path; blocks run along K


def dense(features, inputs=DIM, **options):
    linen = partial(nn.Dense, features, **options)
    return linen, partial(nnx.Linear, inputs, features, **options)


def general(features, axis=-1, batch=()):
    """Both general linear layers on an input `[2, 8, 4, 16]` or `[2, 5, 64]`."""
    shape = (2, 5, DIM) if axis == -1 else (2, 8, HEADS, 16)
    axes = (axis,) if isinstance(axis, int) else axis
    sizes = tuple(shape[a] for a in sorted(axes))  # as Flax orders the kernel's axes
    options = {"axis": axis, "batch_axis": {a: shape[a] for a in batch}}
    linen = partial(nn.DenseGeneral, features, axis, batch_dims=batch)
    return linen, partial(nnx.LinearGeneral, sizes, features, **options), shape


def einsum(equation, shape, bias=None):
    """Both Einsum layers; NNX needs the shape of the bias."""
    linen = partial(nn.Einsum, shape, equation, use_bias=bias is not None)
    return linen, partial(nnx.Einsum, equation, shape, bias)


def attention(**options):
    linen = partial(nn.MultiHeadDotProductAttention, HEADS, **options)
    return linen, partial(nnx.MultiHeadAttention, HEADS, DIM, decode=False, **options)


def own_layer(equation, shape):
    return partial(models.LinenOwn, shape, equation), partial(
        models.NNXOwn, shape, equation
    )


def stack(linen, flax_nnx, scanned=(), **options):
    linen = partial(models.LinenStack, linen, scanned=scanned, **options)
    return linen, partial(models.NNXStack, flax_nnx, **options)


def mapped(linen, flax_nnx):
    return partial(models.LinenMapped, linen), partial(models.NNXMapped, flax_nnx)


SEQUENCE = (2, 5, DIM)
SQUARE = own_layer("btd,df->btf", (DIM, DIM))
CONVOLUTION = partial(nn.Conv, 24, (3,)), partial(nnx.Conv, DIM, 24, (3,))
ATTENTION = {f"{n}/kernel": (DIM, DIM) for n in ("query", "key", "value", "out")}
MLP = {"gate/kernel": (DIM, HIDDEN), "up/kernel": (DIM, HIDDEN)}
MLP |= {"down/kernel": (HIDDEN, DIM)}
BLOCK = {f"attention/{path}": shape for path, shape in ATTENTION.items()}
BLOCK |= {f"mlp/{path}": shape for path, shape in MLP.items()}


def stacked(layer):
    return {f"layers/layer/{path}": (LAYERS, *matrix) for path, matrix in layer.items()}


OWN_STACKED = {"layers/layer/w": (LAYERS, DIM, DIM)}

PAIRS = {
    "dense": Pair(*dense(24), SEQUENCE, {"kernel": (DIM, 24)}),
    "dense on a vector": Pair(*dense(24, use_bias=False), (DIM,),
                              {"kernel": (DIM, 24)}),
    "square": Pair(*dense(DIM, use_bias=False), SEQUENCE, {"kernel": (DIM, DIM)}),
    "general": Pair(*general((HEADS, 8)), {"kernel": (DIM, 32)}),
    "general out": Pair(*general(24, (-2, -1)), {"kernel": (DIM, 24)}),
    "general first": Pair(*general((3, 4), (0, 1)), {"kernel": (16, 12)}),
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
    "attention": Pair(*attention(), SEQUENCE, ATTENTION),
    "normalized attention": Pair(*attention(normalize_qk=True), SEQUENCE, ATTENTION),
    "convolution": Pair(*CONVOLUTION, SEQUENCE, {"kernel": (3 * DIM, 24)}),
    "mapped": Pair(*mapped(*dense(24)), SEQUENCE, {"heads/kernel": (LAYERS, DIM, 24)}),
    "mapped own": Pair(*mapped(*SQUARE), SEQUENCE, {"heads/w": (LAYERS, DIM, DIM)}),
    "mapped convolution": Pair(
        *mapped(*CONVOLUTION), SEQUENCE, {"heads/kernel": (LAYERS, 3 * DIM, 24)}
    ),
    "own": Pair(*SQUARE, SEQUENCE, {"w": (DIM, DIM)}),
    "two kernels": Pair(models.LinenTwoKernels, models.NNXTwoKernels, SEQUENCE,
                        {"gate": (DIM, HIDDEN), "up": (DIM, HIDDEN)}),
    "mlp": Pair(models.LinenMLP, models.NNXMLP, SEQUENCE, MLP),
    "attention stack": Pair(*stack(models.LinenBlock, models.NNXBlock, remat=True),
                            SEQUENCE, stacked(BLOCK)),
    "mlp stack": Pair(*stack(models.LinenMLP, models.NNXMLP, "layers"), SEQUENCE,
                      stacked(MLP)),
    "own stack": Pair(*stack(*SQUARE, "layers"), SEQUENCE, OWN_STACKED),
    "own stack remat": Pair(*stack(*SQUARE, remat=True), SEQUENCE, OWN_STACKED),
}  # fmt: skip
# A table, whose rows can be trained.
TABLES = {
    "embedding": Pair(models.LinenEmbed, models.NNXEmbed, SEQUENCE,
                      {"embed/embedding": (48, 32)}),
}  # fmt: skip
# Sixteen layers and nothing else, to measure the memory of a compiled gradient.
DEEP = {
    "dense": Pair(*stack(*dense(256, 256, use_bias=False), length=16), (8, 256),
                  {"layers/layer/kernel": (16, 256, 256)}),
    "own": Pair(*stack(*own_layer("bd,df->bf", (512, 512)), length=16), (4, 512),
                     {"layers/layer/w": (16, 512, 512)}),
}  # fmt: skip
