"""Adapters of parameters that hold all experts: PEFT's `target_parameters`.

For E experts of rank r, A is `[E r, K]` in PEFT, expert by expert, and B `[N, r E]`,
rank by rank. Gate and up have one parameter, `[A, B]` each of half its N: if their
adapters differ, it has the columns of both A, and a B that is zero outside two blocks.
If only one of them is adapted, B is zero in the half of the other.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from ...adapters.base import Adapter, scaling_at
from ...adapters.lora import LoRA
from ...quant.geometry import Geometry
from .adapter_file import NamedBase, Position
from .stacked import unstack


def parameter_shapes(
    name: str, model: NamedBase, rank: int
) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of PEFT's A and B."""
    parts = model.parameters[name]
    experts = len(next(iter(parts.values())))
    sizes = [model.named[path].tensor_shape for path in parts]
    n = sum(size for size, *_ in sizes)
    return {"a": (rank * experts, sizes[0][1]), "b": (n, rank * experts)}


def split_parameter(
    name: str, model: NamedBase, a: np.ndarray, b: np.ndarray, scaling: float, rank: int
) -> dict[Position, LoRA]:
    """Returns the adapters of all experts: of each kernel that the parameter holds."""
    parts = model.parameters[name]
    widths = [model.named[path].tensor_shape[0] for path in parts]
    a = a.reshape(-1, rank, a.shape[1]).swapaxes(1, 2)  # [E, K, r]
    b = b.reshape(len(b), rank, -1).transpose(2, 1, 0)  # [E, r, N]
    each = np.split(b, np.cumsum(widths)[:-1], axis=2)
    ranks = np.arange(rank) * len(parts) // rank  # the block of each
    is_block = rank % len(parts) == 0 and b.any()
    if is_block and not any(x[:, ranks != i].any() for i, x in enumerate(each)):
        own = [(a[..., ranks == i], x[:, ranks == i]) for i, x in enumerate(each)]
    else:
        own = [(a, x) for x in each]
    settings = {"scaling": scaling, "dropout": 0.0, "geometry": Geometry()}
    return {
        Position(path, index): LoRA(x[i], y[i], **settings)
        for (path, indices), (x, y) in zip(parts.items(), own, strict=True)
        for i, index in enumerate(indices)
    }


def join_parameter(
    name: str,
    model: NamedBase,
    adapters: Mapping[str, Adapter],
    scaling: float,
    rank: int,
) -> dict[str, np.ndarray]:
    """Inverts `split_parameter`, for this rank; refuses what has no such form."""
    parts = model.parameters[name]
    adapted = {path: indices for path, indices in parts.items() if path in adapters}
    each = [(adapters[path], index) for path, own in adapted.items() for index in own]
    for one, index in each:
        if not isinstance(one, LoRA):
            raise ValueError(f"its type must be LoRA. Got {type(one).__name__}.")
        if np.float32(own := scaling_at(one, index)) != np.float32(scaling):
            raise ValueError(f"its scalings must be {scaling}. Got {own}.")
    if len(adapted) == 1 or min(one.rank for one, _ in each) >= rank:
        a, b = _factors(adapted, adapters, rank)
        if all(np.array_equal(x, a[0]) for x in a):
            return _stored(a[0], _side_by_side(name, model, adapted, b))
    if rank % len(adapted):
        raise ValueError(f"its kernels must have one A, as the rank is {rank}.")
    try:
        a, b = _factors(adapted, adapters, rank // len(adapted))
    except ValueError as error:
        raise ValueError(f"its kernels have several A. {error}") from error
    blocks = [np.zeros((*x.shape[:1], rank, x.shape[2]), x.dtype) for x in b]
    for block, own, x in zip(blocks, np.split(np.arange(rank), len(b)), b, strict=True):
        block[:, own] = x
    return _stored(
        np.concatenate(a, axis=2), _side_by_side(name, model, adapted, blocks)
    )


def _side_by_side(
    name: str, model: NamedBase, adapted: Iterable[str], factors: list[np.ndarray]
) -> np.ndarray:
    """Returns B `[E, r, N]` of a parameter; zero where a kernel has no adapter."""
    by_path = dict(zip(adapted, factors, strict=True))
    experts, rank, _ = factors[0].shape
    widths = {p: model.named[p].tensor_shape[0] for p in model.parameters[name]}
    zeros = lambda path: np.zeros((experts, rank, widths[path]), factors[0].dtype)
    return np.concatenate([by_path.get(p, zeros(p)) for p in widths], axis=2)


def _factors(
    parts: Mapping[str, list[tuple[int, ...]]],
    adapters: Mapping[str, Adapter],
    rank: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns A `[E, K, r]` and B `[E, r, N]` of each kernel, cut to a rank."""
    cut = lambda path: [unstack(adapters[path], index, rank) for index in parts[path]]
    kernels = [cut(path) for path in parts]
    of = lambda name: [np.stack([x.arrays[name] for x in own]) for own in kernels]
    return of("a"), of("b")


def _stored(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    a, b = a.swapaxes(1, 2), b.transpose(2, 1, 0)
    parts = {"a": a.reshape(-1, a.shape[2]), "b": b.reshape(len(b), -1)}
    return {name: np.ascontiguousarray(x) for name, x in parts.items()}
