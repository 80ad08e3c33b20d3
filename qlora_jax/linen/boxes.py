"""Boxes around packed kernels in `params`, which modules read as float arrays."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any, Self, TypeVar

import flax.linen as nn
import jax
from flax.core import meta
from flax.core.lift import pack

from .._jax.pytree import Note, is_array, on_arrays, register, split_arrays
from ..adapters.base import AdaptedKernel, Adapter, parts_of
from ..adapters.packed_calls import call_with_experts, is_experts
from ..memory.by_tiles import fetch, needs_fetch
from ..quant.kernel import as_kernel
from ..trees.paths import path_string
from .layer_index import StackIndex
from .lifted import NORMS, WRONG_AXIS

B = TypeVar("B", bound=meta.AxisMetadata)


class KernelBox(meta.AxisMetadata):
    """A kernel, or an `AdaptedKernel`, where a model expects a float array.

    Flax unboxes what `self.param` reads: a module that reads its kernel itself gets the
    float weights, adapter included. `nn.jit` compares `version` and `path`.
    """

    def __init__(self, kernel: Any, version: Any, path: str):
        self.kernel = kernel
        self.version = version
        self.path = Note(path)

    def unbox(self) -> Any:
        """Returns the float weights."""
        kernel, lora, _ = self.parts()
        if lora is None:
            return as_kernel(kernel).dequantize()
        return lora.merged(as_kernel(kernel, lora.geometry))

    def replace_boxed(self, val: Any) -> Any:
        """Returns `val`: a plain array replaces the packed kernel."""
        return val

    def add_axis(self, index: int, params: dict) -> Self:
        """Keeps the box: stacked axes are read from the arrays."""
        if index != 0:
            raise ValueError(f"{self.path}: {WRONG_AXIS.format(index)}")
        return self

    remove_axis = add_axis

    def parts(self) -> tuple[Any, Adapter | None, Any]:
        """Returns the kernel, its adapter or None, and its dropout key or None."""
        kernel, lora, key = parts_of(self.kernel)
        if isinstance(kernel, StackIndex):
            kernel = kernel.layer()
        return kernel, lora, key

    def needs_fetch(self, x: Any) -> bool:
        """Whether `fetch` changes the kernel."""
        return needs_fetch(self.parts()[0], x)

    def fetch(self, x: Any) -> None:
        """Moves and gathers the kernel, once for all tiles."""
        if self.needs_fetch(x):
            kernel, lora, key = self.parts()
            node = kernel if lora is None else AdaptedKernel(kernel, lora, key)
            self.kernel = fetch(node, x)

    @property
    def dropout(self) -> float:
        """The dropout rate of the adapter where dropout is on, else 0."""
        _, lora, key = parts_of(self.kernel)
        return 0.0 if lora is None or key is None else lora.dropout


register(KernelBox, ("kernel",), ("version", "path"))


def runs_nnx(module: nn.Module) -> bool:
    """Whether a module is an `nnx.bridge.ToLinen`, or a copy, as MaxText has."""
    return any(field.name == "nnx_class" for field in fields(module))


def boxes_of(module: nn.Module, cls: type[B]) -> dict[str, B]:
    """Returns the boxes of a class that a module reads, by parameter name or path."""
    # Norms read the kernel of the layer inside; `ToLinen` reads those of an nnx module.
    is_box = lambda node: isinstance(node, cls)

    def flat(params: Any) -> dict[str, Any]:
        found = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
        return {path_string(path): leaf for path, leaf in found}

    params = module.variables.get("params", {})
    if runs_nnx(module):
        params = flat(params)
    if isinstance(module, NORMS):
        inner = module.layer_instance.variables.get("params", {})
        params = {**params, **flat(inner)}
    return {name: leaf for name, leaf in params.items() if is_box(leaf)}


def _with_experts(fn: Callable, boxes: list[KernelBox], backend: Any) -> Callable:
    """Returns a function of a module that is run with the packed experts in boxes."""
    paths = [str(box.path) for box in boxes]
    parts = [box.parts()[:2] for box in boxes]

    def lift(fn: Callable) -> Callable:
        def inner(
            scopes: Callable, repack: Callable, variables: Any, rngs: Any, *args: Any
        ) -> Any:
            def call(weights: list[jax.Array]) -> tuple:
                values = dict(zip(paths, weights, strict=True))

                def open_box(node: Any) -> Any:
                    is_box = isinstance(node, KernelBox)
                    return values.get(str(node.path), node) if is_box else node

                is_box = lambda node: isinstance(node, KernelBox)
                opened = jax.tree.map(open_box, variables, is_leaf=is_box)
                scope = scopes(opened, rngs)
                return fn(scope, *args), repack(scope)

            return call_with_experts(call, parts, backend)

        return pack(inner, (True,), (True,), (True,), name="experts")

    return nn.transforms.lift_transform(lift, fn)


def run_in_float(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: dict,
    cls: type,
    backend: str | tuple[str, ...] | None = None,
) -> Any:
    """Runs a method under `jax.checkpoint`, on the float arrays in the boxes.

    If it multiplies by packed experts in ragged products, it runs with those.
    """

    def run(module: nn.Module, inputs: tuple) -> Any:
        args, kwargs = inputs
        return getattr(module, method)(*args, **kwargs)

    def unbox(variables: Any) -> Any:
        is_box = lambda node: isinstance(node, cls)
        open_box = lambda node: node.unbox() if is_box(node) else node
        return jax.tree.map(open_box, variables, is_leaf=is_box)

    # Flax unboxes a module's own parameters, but not those of the layer in a norm.
    def remat(fn: Callable) -> Callable:
        is_norm = isinstance(module, NORMS)
        boxes = [*boxes_of(module, KernelBox).values()]
        if not is_norm and any(is_experts(*box.parts()[:2]) for box in boxes):
            return _with_experts(fn, boxes, backend)
        return nn.remat(nn.map_variables(fn, "params", unbox) if is_norm else fn)

    # Flax lifts the scopes of modules among the arguments.
    is_bound = lambda x: isinstance(x, nn.Module) and x.scope is not None
    split = lambda tree: split_arrays(tree, lambda x: is_array(x) or is_bound(x))
    return on_arrays(remat, run, (args, kwargs), module, split=split)
