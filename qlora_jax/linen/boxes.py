"""Boxes in `params` that hold packed kernels where modules expect float arrays."""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Self, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import meta
from flax.core.lift import pack
from jaxtyping import Array, Float, Int32

from .._jax.pytree import Note, TreeLeaf, is_array, on_arrays, register, split_arrays
from ..adapters.base import AdaptedKernel, Adapter, parts_of
from ..adapters.config import Pattern, matches
from ..adapters.packed_calls import call_with_experts, is_experts
from ..memory.by_tiles import fetch, needs_fetch
from ..quant.kernel import as_kernel, is_packed
from ..quant.qtensor import QTensor
from ..quant.views import LayerOfStack
from ..trees.paths import Leaf, Tree, leaves_by_path, path_string
from .calls import no_dropout

# `KernelBox`, or the box by which the trace in `init_model` recognizes targets.
B = TypeVar("B", bound=meta.AxisMetadata)
Backend = tuple[str, ...] | None

# Modules that transform the parameters of the module inside them.
NORMS = (nn.WeightNorm, nn.SpectralNorm)

WRONG_AXIS = (
    "packed kernels must be stacked along axis 0 (nn.scan or nn.vmap with "
    "variable_axes={{'params': 0}}). Got axis {}."
)


class Stacks:
    """The packed stacks of one `apply`, by path. Scans do not slice them."""

    # Slicing a stack in a scan would copy the codes of each layer in the HBM of a TPU.
    # So the body of the scan closes over the whole stack, and the scan slices only the
    # indices of the layers.

    def __init__(self):
        self.by_path: dict[str, QTensor] = {}

    def close(self) -> None:
        """Drops the kernels: `nn.jit` caches traces, which refer to this object."""
        self.by_path.clear()

    def add(self, path: str, leaf: Leaf) -> Leaf:
        """Stores a packed stack and returns its `StackIndex`, or else the leaf."""
        kernel, lora, key = parts_of(leaf)
        # The arrays of adapters are small, so scans slice them.
        if lora is not None:
            return AdaptedKernel(self.add(path, kernel), lora, key)
        # Kernels without a layer axis, or with two (nested scans), stay parameters.
        if not is_packed(kernel) or kernel.ndim != 1 + len(kernel.geometry.kinds):
            return kernel
        self.by_path[path] = kernel
        return StackIndex(jnp.arange(kernel.shape[0], dtype=jnp.int32), self, path)


@dataclass(frozen=True, eq=False)
class StackIndex(TreeLeaf):
    """Stands for a packed stack: the indices of its layers, which a scan slices."""

    index: Int32[Array, "..."]  # [L], or [] in the body of a scan
    stacks: Stacks
    path: str

    def layer(self) -> LayerOfStack:
        """Returns the kernel; raises ValueError if no scan sliced `index`."""
        if jnp.ndim(self.index):
            raise ValueError(
                "`scanned` must name modules that run under nn.scan. Got one around "
                f"{self.path!r}, of which {jnp.shape(self.index)[0]} run at once."
            )
        return LayerOfStack(self.stacks.by_path[self.path], self.index)


register(StackIndex, ("index",), ("stacks", "path"))


def is_inside(patterns: Sequence[Pattern], path: str) -> bool:
    """Whether a pattern matches the path of a module that contains the leaf `path`."""
    names = path.split("/")
    # From the root, "", to the module that owns the leaf.
    modules = ["/".join(names[:i]) for i in range(len(names))]
    return any(matches(patterns, module) for module in modules)


def check_scanned(patterns: Sequence[Pattern], params: Tree) -> None:
    """Raises ValueError for patterns that match no module with parameters."""
    paths = list(leaves_by_path(params))
    unmatched = [p for p in patterns if not any(is_inside([p], path) for path in paths)]
    if unmatched:
        raise ValueError(
            "`scanned` must match paths of modules that have parameters. Got "
            f"{unmatched}, which match none."
        )


class ReadableBox(meta.AxisMetadata):
    """A box that also works as its float array, which `read` returns.

    Flax opens the boxes that `self.param` returns, but not those in `variables` and of
    `get_variable`, as in `embed.variables["params"]["embedding"].T` for a tied head.
    """

    read: Callable[[], Array]

    def __jax_array__(self) -> Array:
        return self.read()

    def __getattr__(self, name: str) -> object:
        if name.startswith("_"):  # such as those that `copy` looks for
            raise AttributeError(name)
        return getattr(self.read(), name)


def _forward(name: str) -> Callable:
    return lambda box, *args: getattr(box.read(), name)(*args)


# Python looks operators up in the class.
for _operator in "getitem matmul neg add radd sub mul rmul truediv".split():
    setattr(ReadableBox, f"__{_operator}__", _forward(f"__{_operator}__"))


class KernelBox(ReadableBox):
    """A kernel, or an `AdaptedKernel`, where a model expects a float array."""

    # Flax unboxes the parameters that a module reads. A module that no rule describes
    # therefore gets the float weights, with the adapter merged in.

    def __init__(self, kernel: Leaf, version: Hashable, path: str):
        self.kernel = kernel
        self.version = version  # `nn.jit` traces again if it changes
        self.path = Note(path)  # for errors; all notes are equal, so `jit` ignores it

    def unbox(self) -> Float[Array, "..."]:
        """Returns the float weights."""
        kernel, lora, _ = self.parts()
        if lora is None:
            return as_kernel(kernel).dequantize()
        # A float array does not know its geometry; its adapter does.
        return lora.merged(as_kernel(kernel, lora.geometry))

    def read(self) -> Float[Array, "..."]:
        """Returns the float weights; raises ValueError if the adapter has dropout."""
        if self.dropout:
            raise ValueError(f"{self.path}: {no_dropout(self.path, self.dropout)}")
        return self.unbox()

    def replace_boxed(self, val: Leaf) -> Leaf:
        """Returns `val`: a plain array replaces the packed kernel."""
        return val

    def add_axis(self, index: int, params: dict) -> Self:
        """Returns the box unchanged: only axis 0 of its arrays may be stacked."""
        if index != 0:
            raise ValueError(f"{self.path}: {WRONG_AXIS.format(index)}")
        return self

    remove_axis = add_axis  # scans and vmaps call both

    def parts(self) -> tuple[Leaf, Adapter | None, Array | None]:
        """Returns the kernel, its adapter or None, and its dropout key or None."""
        kernel, lora, key = parts_of(self.kernel)
        if isinstance(kernel, StackIndex):
            kernel = kernel.layer()
        return kernel, lora, key

    def needs_fetch(self, x: Array) -> bool:
        """Whether a product with `x` gathers the kernel or moves it from the host."""
        return needs_fetch(self.parts()[0], x)

    def fetch(self, x: Array) -> None:
        """Replaces the kernel in this box by a moved and gathered one, if needed."""
        if self.needs_fetch(x):
            kernel, lora, key = self.parts()
            node = kernel if lora is None else AdaptedKernel(kernel, lora, key)
            self.kernel = fetch(node, x)

    @property
    def dropout(self) -> float:
        """The dropout rate of the adapter, or 0 if this call has no dropout."""
        _, lora, key = parts_of(self.kernel)
        return 0.0 if lora is None or key is None else lora.dropout


register(KernelBox, ("kernel",), ("version", "path"))


def has_dropout_stream(module: nn.Module) -> bool:
    """Whether `make_rng("dropout")` can draw keys in a module."""
    return module.has_rng("dropout") or module.has_rng("params")


def boxes_inside(module: nn.Module, cls: type[B]) -> dict[str, B]:
    """Returns the boxes of type `cls` of a module and its submodules, by path."""
    flat = jax.tree_util.tree_leaves_with_path(
        module.variables.get("params", {}), is_leaf=lambda node: isinstance(node, cls)
    )
    return {path_string(keys): leaf for keys, leaf in flat if isinstance(leaf, cls)}


def boxes_of(module: nn.Module, cls: type[B]) -> dict[str, B]:
    """Returns the boxes of type `cls` that a module reads, by name or path."""
    # `nnx.bridge.ToLinen`, or a copy of it, as in MaxText, reads all the parameters of
    # its nnx module, which are nested.
    if any(field.name == "nnx_class" for field in fields(module)):
        return boxes_inside(module, cls)
    params = module.variables.get("params", {})
    boxes = {name: leaf for name, leaf in params.items() if isinstance(leaf, cls)}
    # A norm reads the kernel of the layer inside it.
    if isinstance(module, NORMS):
        boxes |= boxes_inside(module.layer_instance, cls)
    return boxes


def _open_boxes(variables: Tree, cls: type[B], unbox: Callable[[B], Leaf]) -> Tree:
    return jax.tree.map(
        lambda node: unbox(node) if isinstance(node, cls) else node,
        variables,
        is_leaf=lambda node: isinstance(node, cls),
    )


def _with_experts(
    fn: Callable, boxes: Sequence[KernelBox], backend: Backend
) -> Callable:
    kernels = [box.parts()[:2] for box in boxes]

    # `pack` takes the variables and rngs out of the module's scope, so that
    # `call_with_experts` can trace the call as a function of the float weights.
    def lift(run_in_scope: Callable) -> Callable:
        def run_packed(make_scope: Callable, repack: Callable, *inputs: Tree) -> Tree:
            variables, rngs, *args = inputs

            def call_on_weights(weights: list[Array]) -> tuple:
                pairs = zip(boxes, weights, strict=True)
                by_path = {str(box.path): w for box, w in pairs}
                opened = _open_boxes(
                    variables, KernelBox, lambda box: by_path.get(str(box.path), box)
                )
                scope = make_scope(opened, rngs)
                return run_in_scope(scope, *args), repack(scope)

            return call_with_experts(call_on_weights, kernels, backend)

        # The filters select all variables before and after the call, and all rngs.
        return pack(run_packed, (True,), (True,), (True,), name="experts")

    return nn.transforms.lift_transform(lift, fn)


def run_in_float(
    module: nn.Module,
    method: str,
    args: tuple,
    kwargs: dict,
    cls: type[meta.AxisMetadata],  # the type of boxes; used only if `module` is a norm
    backend: Backend = None,
) -> Tree:
    """Runs a method on float arrays, which exist only during the call."""

    def run(module: nn.Module, inputs: tuple) -> Tree:
        args, kwargs = inputs
        return getattr(module, method)(*args, **kwargs)

    # `nn.remat` makes the backward pass decode the kernels again. Methods with packed
    # experts run their ragged products on the packed weights instead.
    def remat(fn: Callable) -> Callable:
        if isinstance(module, NORMS):
            # Flax unboxes a module's own parameters, but not those of the layer inside.
            unbox = functools.partial(_open_boxes, cls=cls, unbox=cls.unbox)
            return nn.remat(nn.map_variables(fn, "params", unbox))
        boxes = [*boxes_of(module, KernelBox).values()]
        if any(is_experts(*box.parts()[:2]) for box in boxes):
            return _with_experts(fn, boxes, backend)
        return nn.remat(fn)

    def is_traced(leaf: object) -> bool:
        # Bound modules count too, since Flax lifts the scopes of those in arguments.
        is_bound = isinstance(leaf, nn.Module) and leaf.scope is not None
        return is_array(leaf) or is_bound

    split = functools.partial(split_arrays, is_traced=is_traced)
    return on_arrays(remat, run, (args, kwargs), module, split=split)
