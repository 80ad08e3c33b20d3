"""Language models of transformers that keep keys, values and states in a pytree."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from .language_model import LanguageModel
from .layers import unstack
from .weights import as_array, as_tensor


class LayerCache(NamedTuple):
    """The arrays that a layer keeps of earlier tokens. Their first axis is the batch.

    Attributes:
        keys: `[B, heads, S, Dh]`, for S positions; None for a layer without attention.
        values: Like `keys`.
        convolutions: The last inputs of the layer's convolutions.
        states: The layer's recurrent states.
    """

    keys: Any
    values: Any
    convolutions: tuple[Any, ...] = ()
    states: tuple[Any, ...] = ()

    @property
    def length(self) -> int:
        """The number of positions; 0 for a layer without attention."""
        return 0 if self.keys is None else self.keys.shape[-2]

    def grow(self, length: int) -> "LayerCache":
        """Returns a cache with room for `length` positions."""
        if self.keys is None:
            return self
        padding = [(0, 0)] * self.keys.ndim
        padding[-2] = (0, length - self.length)
        keys, values = (jnp.pad(x, padding) for x in (self.keys, self.values))
        return self._replace(keys=keys, values=values)


Cache = dict[str, LayerCache]  # by the number of the layer


class _Row(NamedTuple):
    """The tokens that are added to the cache of one row. Arrays have no batch axis."""

    tokens: Int[Array, " T"]  # padded on the right
    cache: Cache
    start: Int[Array, ""]  # the number of tokens that the cache has
    num_tokens: Int[Array, ""]  # without the padding


@dataclass(frozen=True, eq=False)
class CachedModel:
    """A language model as a pure function that continues sequences.

    The model's own code runs with a `StaticCache` of transformers, which only exists
    during a call: its arrays come from a pytree, and its new arrays are returned as a
    pytree. Layers with a sliding window keep all positions, like other layers, and
    apply the window as a mask.

    Attributes:
        language_model: The model, as `open_language_model` returns it.
        dtype: The dtype of the weights, which is also that of keys and values.

    Example:
        >>> import jax, jax.numpy as jnp, qlora_jax as ql, tempfile, transformers
        >>> config = transformers.GPTNeoXConfig(
        ...     vocab_size=128, hidden_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4)
        >>> folder = tempfile.mkdtemp()
        >>> config.save_pretrained(folder)
        >>> language_model = ql.torch.open_language_model(folder)
        >>> model = ql.torch.CachedModel(language_model)
        >>> variables = {"params": {
        ...     name: jnp.ones(x.shape)
        ...     for name, x in language_model.shapes(stacked=False).items()}}
        >>> cache = model.init_cache(num_rows=1, length=8)
        >>> logits, cache = model.apply(
        ...     variables, jnp.array([[5, 6, 7]]), cache, starts=jnp.array([0]))
        >>> logits.shape, cache["0"].keys.shape
        ((1, 128), (1, 4, 8, 16))
    """

    language_model: LanguageModel
    dtype: DTypeLike = jnp.float32

    @functools.cached_property
    def has_states(self) -> bool:
        """Whether layers have convolutions or recurrent states."""
        from transformers.cache_utils import LinearAttentionCacheLayerMixin

        layers = _make_static_cache(self.language_model.module, 1).layers
        return any(isinstance(x, LinearAttentionCacheLayerMixin) for x in layers)

    def init_cache(self, num_rows: int, length: int) -> Cache:
        """Returns an empty cache, which is zero everywhere.

        Args:
            num_rows: B, the number of sequences.
            length: S, the number of positions of each sequence.

        Raises:
            ValueError: If transformers has no static cache for the model; if the model
                does not use the cache for all layers; or if `length` is not positive.
        """
        if length < 1:
            raise ValueError(f"`length` must be at least 1. Got {length}.")
        cache = jax.tree.map(
            lambda x: jnp.zeros((num_rows, *x.shape), x.dtype), self._entry_shapes
        )
        return {name: entry.grow(length) for name, entry in cache.items()}

    def problem(self) -> str | None:
        """Returns why the model cannot continue sequences; None if it can.

        The code of some models computes with the number of cached tokens in Python,
        which is not possible while JAX traces it.
        """
        two_tokens, starts = jnp.zeros((1, 2), jnp.int32), jnp.zeros(1, jnp.int32)
        try:
            cache = jax.eval_shape(lambda: self.init_cache(1, 4))
            variables = {"params": self._param_shapes}
            jax.eval_shape(self.apply, variables, two_tokens, cache, starts)
        except Exception as error:  # the model's own code may raise errors of any type
            return str(error).partition("\n")[0]
        return None

    @property
    def _param_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = self.language_model.shapes(stacked=False)
        return {n: jax.ShapeDtypeStruct(x.shape, self.dtype) for n, x in shapes.items()}

    @functools.cached_property
    def _entry_shapes(self) -> Cache:
        """The shapes of a cache for one position, without the batch axis."""
        row = _Row(jnp.zeros(1, jnp.int32), {}, jnp.int32(0), jnp.int32(1))
        _, shapes = jax.eval_shape(
            lambda params: self._run_row({"params": params}, row, length=1),
            self._param_shapes,
        )
        unused = [name for name, x in shapes.items() if not jax.tree.leaves(x)]
        if unused or not shapes:
            module = self.language_model.module
            raise _unsupported(module, f"it does not use the cache of layers {unused}")
        return shapes

    def apply(
        self,
        variables: Mapping[str, PyTree],
        tokens: Int[Array, "B T"],
        cache: Cache,
        starts: Int[Array, " B"],
        num_tokens: Int[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Adds tokens to a cache; returns the logits after the last one of each row.

        Args:
            variables: As in `WrappedModule.apply`, with or without the buffers of the
                language model.
            tokens: Token ids, padded on the right.
            cache: What `init_cache` or an earlier call returned.
            starts: The number of tokens that the cache already has of each row. The
                cache must have room for these and the new tokens.
            num_tokens: The number of tokens in each row, without the padding. None if
                no row is padded.

        Returns:
            The logits, and the new cache.

        Raises:
            ValueError: As `LanguageModel.hidden_states`; or, outside jit, if `starts`
                is negative or the cache has no room for the tokens.
        """
        variables = {name: unstack(tree) for name, tree in variables.items()}
        if num_tokens is None:
            num_tokens = jnp.full_like(starts, tokens.shape[1])
        _check_room(cache, starts, num_tokens)
        # Recurrent states have no axis of positions, so padding would change them. Rows
        # with several tokens are therefore processed token by token.
        by_token = self.has_states and tokens.shape[1] > 1
        extend_row = self._extend_by_token if by_token else self._extend_row
        # All rows of a StaticCache have the same number of tokens. `vmap` gives each
        # row a StaticCache of its own.
        extend_rows = jax.vmap(extend_row, in_axes=(None, 0))
        return extend_rows(variables, _Row(tokens, cache, starts, num_tokens))

    def _extend_row(
        self, variables: Mapping[str, PyTree], row: _Row
    ) -> tuple[Float[Array, " V"], Cache]:
        length = max(x.length for x in row.cache.values())
        logits, new_cache = self._run_row(variables, row, length)
        if row.tokens.shape[0] == 1:  # without padding
            return logits, new_cache
        # The cache does not change at the positions of the padding. Otherwise, the keys
        # and values of positions beyond a table of learned positions would become NaN.
        is_valid = (jnp.arange(length) < row.start + row.num_tokens)[:, None]  # [S, 1]

        def restore_padding(new: LayerCache, old: LayerCache) -> LayerCache:
            if new.keys is None:
                return new
            keys = jnp.where(is_valid, new.keys, old.keys)
            values = jnp.where(is_valid, new.values, old.values)
            return new._replace(keys=keys, values=values)

        return logits, {
            name: restore_padding(x, row.cache[name]) for name, x in new_cache.items()
        }

    def _extend_by_token(
        self, variables: Mapping[str, PyTree], row: _Row
    ) -> tuple[Float[Array, " V"], Cache]:
        def extend(cache: Cache, index: Array) -> tuple[Array, Cache]:
            token = _Row(
                row.tokens[index][None], cache, row.start + index, jnp.int32(1)
            )
            return self._extend_row(variables, token)

        def add_token(result: tuple[Array, Cache], index: Array) -> tuple:
            _, cache = result
            is_token = index < row.num_tokens
            new_result = extend(cache, index)
            return jax.tree.map(
                lambda new, old: jnp.where(is_token, new, old), new_result, result
            ), None

        logits, _ = jax.eval_shape(extend, row.cache, jnp.int32(0))
        initial = jnp.zeros(logits.shape, logits.dtype), row.cache
        result, _ = jax.lax.scan(add_token, initial, jnp.arange(row.tokens.shape[0]))
        return result

    def _run_row(
        self, variables: Mapping[str, PyTree], row: _Row, length: int
    ) -> tuple[Float[Array, " V"], Cache]:
        """Runs the model; returns the logits of the last token, and the new cache.

        If the row's cache is an empty dict, the model makes a cache for `length`
        positions.
        """
        module: Any = self.language_model.module

        def run(
            run_model: Any, cache: Cache, start: torch.Tensor, **kwargs: Any
        ) -> Any:
            static_cache = _make_static_cache(module, length)
            _fill(static_cache, cache, start)
            # `cache` is the name that transformers 5.24 gave to `past_key_values`.
            output = run_model(cache=static_cache, use_cache=True, **kwargs)
            return output["logits"], _read(static_cache)

        cache = jax.tree.map(lambda x: x[None], row.cache)  # a batch of one row
        last = row.num_tokens - 1
        logits, new_cache = self.language_model.run_selected(
            variables, row.tokens[None], last, run, cache, row.start
        )
        return logits[0, 0], jax.tree.map(lambda x: x[0], new_cache)


def _check_room(cache: Cache, starts: Array, num_tokens: Array) -> None:
    """Raises ValueError if it is known that tokens have no positions in the cache."""
    for count in (starts, num_tokens):
        is_array = isinstance(count, jax.Array)
        if is_array and (isinstance(count, Tracer) or not count.is_fully_addressable):
            return
    if np.min(np.asarray(starts), initial=0) < 0:
        raise ValueError(f"`starts` must not be negative. Got {np.min(starts)}.")
    length = max(x.length for x in cache.values())
    num_needed = np.max(np.asarray(starts) + np.asarray(num_tokens), initial=0)
    if length and num_needed > length:  # without attention, there are no positions
        raise ValueError(
            f"`cache` must have a position for each token. Got {length} positions for "
            f"{num_needed} tokens."
        )


def _make_static_cache(module: Any, length: int) -> Any:
    """Returns an empty cache of transformers whose layers all keep every position."""
    from transformers import cache_utils

    # A StaticSlidingWindowLayer drops positions that the window has passed. It counts
    # tokens in Python for this, which is not possible in a compiled loop.
    full_layers: dict[type, type] = {
        cache_utils.StaticSlidingWindowLayer: cache_utils.StaticLayer,
        cache_utils.LinearAttentionAndStaticSlidingWindowAttentionLayer: (
            cache_utils.LinearAttentionAndStaticFullAttentionLayer
        ),
    }
    supported = {*full_layers.values()}
    supported |= {cache_utils.LinearAttentionLayer, cache_utils.DummyLayer}
    try:
        static_cache = cache_utils.StaticCache(module.config, length)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unsupported(module, f"{type(error).__name__}: {error}") from error
    for index, layer in enumerate(static_cache.layers):
        options = {"max_cache_len": length}
        if isinstance(layer, cache_utils.LinearAttentionCacheLayerMixin):
            options["number_of_states"] = layer.number_of_states
        if (full_layer := full_layers.get(type(layer))) is not None:
            static_cache.layers[index] = full_layer(**options)
        elif type(layer) not in supported:
            raise _unsupported(module, type(layer).__name__)
    return static_cache


def _fill(static_cache: Any, cache: Cache, start: torch.Tensor) -> None:
    """Puts the arrays of a cache with `start` tokens into a cache of transformers."""
    for name, entry in cache.items():
        layer = static_cache.layers[int(name)]
        if entry.keys is not None:
            layer.keys, layer.values = entry.keys, entry.values
            # Each layer needs a tensor of its own, because it adds to it in place.
            layer.cumulative_length = as_tensor(as_array(start))
            layer.device, layer.is_initialized = start.device, True
        if entry.convolutions or entry.states:  # transformers 5.25 counts these apart
            layer.cumulative_length_linear = as_tensor(as_array(start))
        for index, state in enumerate(entry.convolutions):
            if state is not None:
                layer.conv_states[index] = state
                layer.conv_kernel_size[index] = state.shape[-1]
                layer.is_conv_states_initialized[index] = True
                layer.has_previous_state[index] = True
                layer.dtype, layer.device = state.dtype, state.device
        for index, state in enumerate(entry.states):
            if state is not None:
                layer.recurrent_states[index] = state
                layer.is_recurrent_states_initialized[index] = True


def _read(static_cache: Any) -> Cache:
    """Returns the tensors of a cache of transformers.

    Dummy layers are left out. They have no arrays, because they do not use a cache or
    use that of another layer.
    """
    from transformers.cache_utils import DummyLayer

    return {
        str(index): LayerCache(
            getattr(layer, "keys", None),
            getattr(layer, "values", None),
            tuple(getattr(layer, "conv_states", {}).values()),
            tuple(getattr(layer, "recurrent_states", {}).values()),
        )
        for index, layer in enumerate(static_cache.layers)
        if not isinstance(layer, DummyLayer)
    }


def _unsupported(module: torch.nn.Module, reason: str) -> ValueError:
    return ValueError(
        "the model must use a StaticCache of transformers to generate tokens. Got "
        f"{type(module).__name__} ({reason})."
    )
