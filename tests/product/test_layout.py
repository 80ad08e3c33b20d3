"""`lay_out` on thousands of random meshes: NumPy runs each layout, device by device.

Numbers are small integers in float64, so that every sum is exact.
"""

import itertools

import numpy as np
import pytest
from fuzz_layouts import draw_axes
from helpers import SEED

from qlora_jax.product.layout import lay_out
from qlora_jax.product.spec import ProductSpec

MESHES = [(8,), (2, 4), (4, 2), (2, 2, 2), (3, 2), (2, 3, 2)]
ROWS = [(8,), (4, 6), (6, 2, 2)]
BLOCK_SIZE = 16


def names_of(entry):
    return (entry,) if isinstance(entry, str) else entry or ()


def part(array, spec, sizes, device):
    """Returns a view of the part of an array that a device of the mesh has."""
    for axis, entry in enumerate(spec):
        for name in names_of(entry):
            length, remainder = divmod(array.shape[axis], sizes[name])
            assert remainder == 0, (array.shape, spec, sizes)
            index = [slice(None)] * array.ndim
            index[axis] = slice(device[name] * length, (device[name] + 1) * length)
            array = array[tuple(index)]
    return array


def peers(device, axes, sizes):
    """Yields the devices that differ from `device` in these mesh axes, in order."""
    for indices in itertools.product(*(range(sizes[name]) for name in axes)):
        yield device | dict(zip(axes, indices, strict=True))


def decode(codes, scales, fmt):
    """Decodes weights `[..., K, N]` from integer codes, two to a byte in 4 bits."""
    if fmt == "int4":
        pairs = np.stack([codes >> 4, codes & 15], axis=-2)
        codes = pairs.reshape(*codes.shape[:-2], -1, codes.shape[-1])
    rows = np.repeat(scales, BLOCK_SIZE, axis=-2)
    return (codes - (8.0 if fmt == "int4" else 128.0)) * rows


def multiply(spec, x, codes, scales):
    w = decode(codes, scales, spec.fmt)
    assert w.shape[-2] == spec.k
    w = np.swapaxes(w, -1, -2) if spec.transpose else w
    lead = x.shape[:-1]
    y = x.reshape(*lead[: spec.batch], -1, x.shape[-1]) @ w
    return y.reshape(*lead, -1)


def run(layout, sizes, x, codes, scales, shape):
    """Computes in NumPy what the devices of a mesh compute by a layout."""
    devices = [
        dict(zip(sizes, indices, strict=True))
        for indices in np.ndindex(*sizes.values())
    ]

    def gather_part(a, device):
        def stored_part(device):
            return part(a, layout.weights, sizes, device)

        def gather_columns(device):
            return np.concatenate(
                [stored_part(peer) for peer in peers(device, layout.n.gathered, sizes)],
                -1,
            )

        rows = peers(device, layout.k.gathered, sizes)
        return np.concatenate([gather_columns(peer) for peer in rows], -2)

    def product(device):
        args = (
            part(x, layout.x, sizes, device),
            gather_part(codes, device),
            gather_part(scales, device),
        )
        return multiply(layout.local, *args)

    products = {(*device.values(),): product(device) for device in devices}
    result, parts = np.full(shape, np.nan), []
    for device in devices:
        summed = peers(device, layout.contracted, sizes)
        parts.append(sum(products[(*peer.values(),)] for peer in summed))
        part(result, layout.result, sizes, device)[...] = parts[-1]
    for device, computed in zip(
        devices, parts, strict=True
    ):  # equal on all devices that have this part
        np.testing.assert_array_equal(
            part(result, layout.result, sizes, device), computed
        )
    return result


def draw(rng):
    """Draws a product, a mesh, and how x and the weights are split over it."""
    sizes = dict(zip("abc", MESHES[rng.integers(len(MESHES))], strict=False))
    fmt = str(rng.choice(["int4", "int8"]))
    batch = (4,) * int(rng.integers(2))
    rows = ROWS[rng.integers(len(ROWS))]
    k, n = int(rng.choice([32, 64, 96, 128])), int(rng.choice([4, 6, 8, 24]))
    transpose = bool(rng.integers(2))
    dtype = np.dtype("float32")
    settings = fmt, BLOCK_SIZE, dtype, k, len(batch), dtype
    spec = ProductSpec(*settings, transpose=transpose)
    code_rows = k if fmt == "int8" else k // 2
    codes = rng.integers(0, 256, (*batch, code_rows, n), np.uint8)
    scales = 2.0 ** rng.integers(-2, 3, (*batch, k // BLOCK_SIZE, n))
    x = rng.integers(-4, 5, (*batch, *rows, n if transpose else k)).astype(float)
    axes = draw_axes(rng, sizes, x.ndim), draw_axes(rng, sizes, codes.ndim)
    return spec, sizes, axes, (x, codes, scales)


def divides(sizes, axes, lengths):
    return all(
        length % np.prod([sizes[name] for name in names], dtype=int) == 0
        for names, length in zip(axes, lengths, strict=True)
    )


@pytest.mark.newest
@pytest.mark.parametrize("seed", range(4))
def test_every_layout_computes_the_product(seed):
    rng = np.random.default_rng([SEED, seed])
    kinds = set()
    for _ in range(500):
        spec, sizes, (x_axes, weight_axes), arrays = case = draw(rng)
        x, codes, scales = arrays
        layout = lay_out(spec, sizes, x_axes, weight_axes, x.shape, scales.shape)
        want = multiply(spec, *arrays)
        np.testing.assert_array_equal(
            run(layout, sizes, *arrays, want.shape), want, err_msg=f"{layout} {case}"
        )
        # Parts that are whole blocks stay on their devices. They are gathered only if
        # rows of x are split over the same mesh axes.
        lead = {name for axes in layout.lead for name in axes}
        blocks = scales.shape[-2] if spec.k % BLOCK_SIZE == 0 else 1
        stays = not spec.batch and divides(
            sizes, weight_axes, (blocks, codes.shape[-1])
        )
        for split, expected in zip((layout.k, layout.n), weight_axes[-2:], strict=True):
            assert not (stays and expected) or split.stored == expected, case
            assert not split.gathered or split.gathered[0] in lead, case
        kinds.add((spec.transpose, layout.is_gathered, bool(layout.contracted)))
    assert len(kinds) == 8  # each way, with and without a gather and a sum
