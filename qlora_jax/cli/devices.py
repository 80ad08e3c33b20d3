"""The devices of a run, and how the model is split over them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.sharding import AxisType, Mesh

import qlora_jax as ql

from ..models.config import DecoderConfig
from ..models.sharding import ROW_AXES, place_arguments
from ..train.mesh_arrays import put_rows


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh | None:
    """Returns a mesh of all devices; None where no sizes are given.

    Raises:
        ValueError: If there are more or fewer devices.
    """
    if not sizes:
        return None
    count = len(devices)
    if math.prod(sizes.values()) != count:
        shown = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"`mesh` must have as many devices as there are, {count}. Got "
            f"{math.prod(sizes.values())}: {shown}."
        )
    kinds = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(
        (*sizes.values(),), (*sizes,), axis_types=kinds, devices=devices
    )


def make_place(
    config: DecoderConfig,
    mesh: Mesh | None,
    memory: Literal["device", "host"],
    devices: Sequence[Any] | None = None,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Returns what puts the base and the lora tree on the mesh, or leaves them.

    Args:
        config: The decoder's config.
        mesh: The mesh; None for one device.
        memory: As in `ql.sharding.place`.
        devices: That device, where there is no mesh; by default the process's first.
    """
    if mesh is None and memory == "device":
        return lambda base, lora: (base, lora)
    if mesh is None:  # one device
        kinds = (AxisType.Auto,)
        mesh = jax.make_mesh((1,), ROW_AXES[:1], axis_types=kinds, devices=devices)
    found = mesh

    def place(base: Any, lora: Any) -> tuple[Any, Any]:
        arguments = place_arguments(config, base, found)
        return ql.sharding.place(base, lora, found, memory=memory, **arguments)

    return place


def make_put(mesh: Mesh | None) -> Callable[[Any], Any]:
    """Returns what puts a batch on the mesh, its rows split over `data` and `fsdp`.

    Every process has the whole batch, so that it does not depend on their number.
    """
    if mesh is None:
        return lambda batch: batch
    return lambda batch: put_rows(batch, mesh, row_axes(mesh))


def row_axes(mesh: Mesh) -> list[str]:
    """Returns the mesh axes that split the rows of a batch."""
    return [name for name in ROW_AXES if name in mesh.axis_names]
