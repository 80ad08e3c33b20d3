"""`wrap` for linen models."""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax
from flax.core.scope import CollectionFilter, in_filter
from flax.typing import PRNGKey, RNGSequences

from .._jax.pytree import is_box, is_tree_leaf, unbox
from ..adapters.base import AdaptedKernel, dropout_keys, is_adapter, parts_of
from ..adapters.config import Pattern, as_patterns
from ..product.choose import as_backends
from ..quant.kernel import as_kernel
from ..trees.adapters import combine
from ..trees.paths import (
    KeyPath,
    Leaf,
    Tree,
    boxed_by_path,
    leaves_by_path,
    map_by_path,
    path_string,
)
from .boxes import Backend, KernelBox, Stacks, check_scanned, is_inside
from .calls import RULES
from .interceptor import Interceptor


@dataclass(frozen=True)
class WrappedModel:
    """A linen model that takes packed kernels and adapters; made by `wrap`.

    All other attributes are those of the model, except `bind`, which raises an
    AttributeError.

    Attributes:
        module: The model.
        scanned: Patterns for the modules that run under `nn.scan`, as in `wrap`.
        backend: Back end of all products, as in `wrap`; None for the default of the
            platform.

    Example:
        >>> import flax.linen as nn, qlora_jax as ql
        >>> model = ql.linen.wrap(nn.Dense(8))
        >>> type(model).__name__, model.features, model.clone(features=4).features
        ('WrappedModel', 8, 4)
    """

    module: nn.Module
    scanned: tuple[Pattern, ...] = ()
    backend: Backend = None

    def __getattr__(self, name: str) -> Any:
        if name == "bind":
            raise AttributeError(
                "a wrapped model has no `bind`: it accepts packed kernels only during "
                "`apply`. Use apply(..., method=...)."
            )
        # Unpickling asks for attributes before `module` exists; `self.module` would
        # then recurse.
        return getattr(object.__getattribute__(self, "module"), name)

    def clone(self, **updates: Any) -> "WrappedModel":
        """Returns a copy with other fields of the model; also called `copy`.

        Args:
            **updates: As in `nn.Module.clone`.
        """
        return replace(self, module=self.module.clone(**updates))

    copy = clone

    def apply(
        self,
        variables: Mapping,
        *args: object,
        rngs: PRNGKey | RNGSequences | None = None,
        mutable: CollectionFilter = False,
        **kwargs: Any,
    ) -> Tree:
        """Returns the output on packed kernels, like `nn.Module.apply` on float ones.

        Args:
            variables: A dict of collections: `"params"` is the base tree or a combined
                tree; `"lora"` is the lora tree, if it is separate; others are those of
                the model.
            *args: Passed to the model.
            rngs: As for the model. The adapters' dropout is active only with a key: the
                `"dropout"` key or, as in Flax, otherwise the `"params"` key. A single
                key counts as the `"params"` key.
            mutable: As for the model: if it is not False, a pair of the output and the
                mutable collections is returned. Kernels and adapters do not change.
            **kwargs: Passed to `nn.Module.apply`.

        Raises:
            TypeError: If `"params"` is a combined tree and there is a `"lora"` too.
            ValueError: If an adapter does not fit its kernel, or the back end is
                unknown; if `"params"` is missing, or a collection other than `"lora"`
                contains adapters; if a pattern in `scanned` matches no module with
                parameters, or a module that runs outside of a scan; if packed kernels
                are stacked along an axis other than 0, transformed by
                `nn.map_variables`, or differentiated by `nn.jvp`; or if an adapter has
                dropout and its module computes on float weights.
            NotImplementedError: If the requested back end does not support a product.

        Example:
            >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
            >>> model, x = ql.linen.wrap(nn.Dense(8)), jnp.ones((2, 64))
            >>> params = model.init(jax.random.key(0), x)["params"]
            >>> config = ql.QLoRAConfig(rank=4, dropout=0.1)
            >>> base, lora = ql.linen.init(
            ...     jax.random.key(1), model, params, config, x)
            >>> rngs = {"dropout": jax.random.key(2)}
            >>> model.apply({"params": base, "lora": lora}, x, rngs=rngs).shape
            (2, 8)
        """
        # 1. Combine both trees, so that Flax slices an adapter with its kernel.
        collections = dict(variables)
        lora = collections.pop("lora", None)
        _check_collections(collections)
        params = collections["params"]
        if lora:
            params = combine(params, lora)
        params = _prepare_adapters(params, rngs)
        check_scanned(self.scanned, params)
        # 2. Put each kernel into a box, and run the model under the interceptor.
        version = (RULES.version, self.backend)
        interceptor = Interceptor(self.backend)
        with closing(Stacks()) as stacks, nn.intercept_methods(interceptor):

            def box_kernel(path: str, leaf: Leaf) -> Leaf:
                if not is_tree_leaf(leaf):
                    return leaf
                if is_inside(self.scanned, path):
                    leaf = stacks.add(path, leaf)
                interceptor.kernels[path] = leaf
                return KernelBox(leaf, version, path)

            collections["params"] = map_by_path(box_kernel, params)
            if intermediates := kwargs.get("capture_intermediates"):
                capture = functools.partial(interceptor.capture, intermediates)
                kwargs["capture_intermediates"] = capture
            result = self.module.apply(
                collections, *args, rngs=rngs, mutable=mutable, **kwargs
            )
        # 3. Return mutable collections without the boxes.
        if mutable is False:
            return result
        output, updates = result
        return output, _without_boxes(updates, variables, mutable)


def _check_collections(collections: Mapping) -> None:
    if "params" not in collections:
        raise ValueError(
            "`variables` must have a collection 'params', the base tree. Got "
            f"{sorted(collections)}."
        )
    # Adapters elsewhere would be passed to the model, which ignores them.
    names = sorted({*collections} - {"params"})
    leaves = {name: leaves_by_path(collections[name]).values() for name in names}
    with_adapters = [name for name in names if any(map(is_adapter, leaves[name]))]
    if with_adapters:
        raise ValueError(
            "`variables` must have its adapters in the collection 'lora'. Got adapters "
            f"in {with_adapters}."
        )


def _prepare_adapters(params: Tree, rngs: PRNGKey | RNGSequences | None) -> Tree:
    by_name: Mapping = rngs if isinstance(rngs, Mapping) else {"params": rngs}
    key = by_name.get("dropout", by_name.get("params"))  # as Flax's `make_rng`
    counter = itertools.count(1)

    def prepare(_: str, leaf: Leaf) -> Leaf:
        base, adapter, keys = parts_of(leaf)
        if adapter is None:
            return leaf
        # The model reads a leaf that is trained in full in place of the frozen one.
        if adapter.replacement is not None:
            return adapter.merged(as_kernel(base))
        if key is not None and adapter.dropout:
            leaf_key = jax.random.fold_in(key, next(counter))
            keys = dropout_keys(adapter, leaf_key)  # [*batch]
        return AdaptedKernel(base, adapter, keys)

    return map_by_path(prepare, params)


def _without_boxes(
    updates: Mapping, variables: Mapping, mutable: CollectionFilter
) -> dict:
    # Kernels and adapters do not change in a call, so callers get theirs back.
    updates = dict(updates)
    if "params" in updates:
        originals = boxed_by_path(variables["params"])
        adapted = leaves_by_path(variables.get("lora", {}))

        def restore_kernel(keys: KeyPath, leaf: Leaf) -> Leaf:
            path = path_string(keys)
            is_kernel = path in adapted or is_tree_leaf(unbox(originals.get(path)))
            return originals[path] if is_kernel else leaf

        # Not `map_by_path`, which would open the boxes and so decode the kernels.
        updates["params"] = jax.tree_util.tree_map_with_path(
            restore_kernel, updates["params"], is_leaf=is_box
        )
    if "lora" in variables and in_filter(mutable, "lora"):
        updates["lora"] = variables["lora"]
    return updates


def wrap(
    model: nn.Module | WrappedModel,
    *,
    scanned: Pattern | Sequence[Pattern] = (),
    backend: str | Sequence[str] | None = None,
) -> WrappedModel:
    """Returns the model with an `apply` that takes packed kernels and adapters.

    Dense, DenseGeneral, Einsum and registered classes multiply by packed weights. Other
    modules, including `nnx.bridge.ToLinen`, the layers inside `nn.WeightNorm` and
    `nn.SpectralNorm`, layers with their own `dot_general`, and subclasses that override
    methods such as `param`, get float weights during their call, which the backward
    pass decodes again. In these modules, `jax.lax.ragged_dot` multiplies by packed
    experts directly (`ql.ragged_dot`).

    Args:
        model: A linen model, which may use `nn.scan` and `nn.remat`. A wrapped model is
            returned unchanged, unless this call has options, which then replace all of
            its options.
        scanned: One or more patterns for the full paths of modules under `nn.scan` with
            `variable_axes={"params": 0}`: "layers", "decoder/blocks". The scan passes
            the index of the layer, and products read the layer in the packed stack.
            Results are the same, and a TPU does not copy each layer's codes.
        backend: The back end or back ends of all products, as in `qlora_jax.matmul`.

    Raises:
        TypeError: If `model` is not a linen module, or `scanned` is not a pattern or a
            list of patterns.
        ValueError: If a pattern is not a regular expression, or a back end is unknown.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp, qlora_jax as ql
        >>> model, x = nn.Dense(8), jnp.ones((2, 64))
        >>> params = model.init(jax.random.key(0), x)["params"]
        >>> base, lora = ql.linen.init(
        ...     jax.random.key(1), model, params, ql.QLoRAConfig(rank=4), x)
        >>> model = ql.linen.wrap(model)
        >>> model.apply({"params": base, "lora": lora}, x).shape
        (2, 8)
    """
    scanned = as_patterns("scanned", scanned)
    if isinstance(model, WrappedModel) and not scanned and backend is None:
        return model
    return WrappedModel(linen_module(model), scanned, as_backends(backend))


def linen_module(model: object) -> nn.Module:
    """Returns the linen module of a model, wrapped or not; else raises TypeError."""
    if isinstance(model, WrappedModel):
        return model.module
    if isinstance(model, nn.Module):
        return model
    # Look up `nnx` without importing it, which takes long.
    got, nnx = type(model).__name__, sys.modules.get("flax.nnx")
    if isinstance(model, type):
        got = f"the class {model.__name__}. Pass an instance"
    elif nnx is not None and isinstance(model, nnx.Module):
        got += ", an nnx module. Use ql.nnx.wrap"
    raise TypeError(f"`model` must be a linen module. Got {got}.")
