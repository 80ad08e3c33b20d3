"""Language models that `qlora_jax.torch` runs in the PyTorch code of transformers.

They take the place of `Decoder` for model types that it does not support. Leaves have
PyTorch's names. In the name of a stack of layers, such as
`model.layers.0:4:1.mlp.up_proj.weight`, a range replaces the number: layers 0 to 3.
"""

import contextlib
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

import qlora_jax as ql
from qlora_jax.io.tensors import Tensors

from .folder import ModelFolder, check_tied
from .sharding import Contract, place_torch_arguments

TOKENS_PER_CHUNK = 1024  # number of tokens whose logits are in memory at the same time


@dataclasses.dataclass(frozen=True, eq=False)
class TorchEngine:
    """Everything that the application needs to know about a model in PyTorch.

    `JaxEngine` has the same attributes and methods, except for `model_type`,
    `class_name`, `scan_problem`, `packing_problem`, `language_model` and `ropes`.

    Attributes:
        path: The folder of the model.
        model_type: transformers' name of the architecture.
        class_name: The name of the PyTorch class.
        vocab_size: The size of the vocabulary.
        scan_problem: Why equal layers are not stacked and scanned; None if they are.
        shapes: The shapes of the leaves that are read from files, by path.
        names: The names of the leaves in files, and the roles of their axes.
        head_module: The name of the module that computes the logits.
        language_model: The model without the settings of `make_model`.
        name: The value of the option `engine`.
        experts: None, because there is no loss that balances the load of experts.
        head_key: None, because the loss of a model in PyTorch supports an adapter of
            the head, which needs no special treatment.
        has_vision: False, because a vision part is read with the language model.
        can_pack_rows: False, because not every model supports rows with several
            sequences. `packing_problem` tells whether this one does.
        ropes: Empty, because the keys in a cache do not depend on the size of the
            cache. `Stream` reads this attribute, as it does that of `DecoderConfig`.
    """

    path: pathlib.Path
    model_type: str
    class_name: str
    vocab_size: int
    scan_problem: str | None
    shapes: dict[str, jax.ShapeDtypeStruct]
    names: ql.io.Names
    head_module: str
    language_model: "ql.torch.LanguageModel"
    name: ClassVar[Literal["torch"]] = "torch"
    experts: ClassVar[None] = None
    head_key: ClassVar[None] = None
    has_vision: ClassVar[bool] = False
    can_pack_rows: ClassVar[bool] = False
    ropes: ClassVar[tuple[()]] = ()

    @functools.cached_property
    def contract(self) -> Contract:
        """The roles of the axes of all kernels but the head, as in `QLoRAConfig`."""
        contract: Contract = {}
        for path in self.shapes:
            roles = self.names.roles(path)
            # Only a kernel with all experts of a layer has a `parameter`.
            has_experts = self.names.entries[path].parameter is not None
            if roles and path != f"{self.head_module}.weight":
                contract[re.escape(path)] = f"b{roles}" if has_experts else roles
        return contract

    def language_params(self, params: dict[str, Any]) -> dict[str, Any]:
        """Returns the parameters of the language model, without a vision tower."""
        if self.language_model.image_token_id is None:
            return params
        prefix = f"{self.language_model.decoder_name}."
        return {path: x for path, x in params.items() if path.startswith(prefix)}

    @property
    def layers(self) -> tuple[str | re.Pattern[str], ...]:
        """The patterns of the kernels to pack. Vision towers stay in float."""
        paths = {*map(re.escape, self.language_params(self.shapes))}
        return tuple(pattern for pattern in self.contract if pattern in paths)

    @property
    def exported_names(self) -> ql.io.Names:
        """The names in an exported model, which has all parts of this model."""
        return self.names

    @functools.cached_property
    def files(self) -> "TorchFolder":
        """The files of the model."""
        return TorchFolder(self.path, self)

    def load(
        self, dtype: DTypeLike, qlora: ql.QLoRAConfig | None, **options: Any
    ) -> PyTree:
        """Returns the parameters. The arguments are those of `ql.io.load`."""
        tensors = self.files.open_tensors()
        arguments = tensors, self.names, self.shapes, qlora
        return ql.io.load(*arguments, dtype=dtype, **options)

    def make_model(
        self,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: bool = True,
        has_dropout: bool = False,
        has_packed_rows: bool = False,
        backend: str | Sequence[str] | None = None,
        attention: str = "xla",
        stream_dtype: DTypeLike = jnp.float32,
        mlp_tile: int | None = None,
    ) -> "TorchDecoder":
        """Returns the model.

        `dtype` is the dtype of the weights that are not packed, which is also that of
        the keys and values in caches. With `remat`, stacked layers are computed again
        in the backward pass; otherwise, all of their values are kept. `has_dropout`
        must be true if adapters have dropout, and `has_packed_rows` if rows have
        several sequences. `backend` is as in `ql.matmul`. The last three are options of
        `Decoder` that have no effect here; `train` accepts only their default values.
        """
        del attention, stream_dtype, mlp_tile
        policy = None if remat else jax.checkpoint_policies.everything_saveable
        language_model = ql.torch.open_language_model(
            self.path, has_dropout=has_dropout, policy=policy, backend=backend
        )
        cached_model = ql.torch.CachedModel(language_model, dtype)
        return TorchDecoder(
            self, language_model, cached_model, has_dropout, has_packed_rows
        )

    def place_arguments(
        self, base: PyTree, mesh: Mesh | AbstractMesh
    ) -> dict[str, Any]:
        """Returns the arguments `rules` and `rows` of `ql.sharding.place`."""
        return place_torch_arguments(self.contract, base, mesh)

    @property
    def generation_problem(self) -> str | None:
        """Why the model cannot generate tokens in JAX; None if it can."""
        return self.make_model().cached_model.problem()

    @property
    def packing_problem(self) -> str | None:
        """Why rows cannot have several sequences; None if they can."""
        return ql.torch.packing_problem(ql.torch.open_language_model(self.path))


def open_torch_engine(path: pathlib.Path) -> TorchEngine:
    """Returns the model that a folder's `config.json` describes.

    Raises ImportError if the extra `torch` is not installed. Raises ValueError if
    transformers has no such model, or if the config asks for a loss that balances
    experts.
    """
    try:
        torch_package = ql.torch  # is imported here, because it needs the extra
    except ImportError as error:
        raise ImportError(
            "`model` must be of a type that the JAX decoder supports, or else run in "
            "PyTorch's code, which needs: pip install 'qlora-jax[torch]'. Got "
            f"{str(path)!r}. {error}"
        ) from error
    language_model = torch_package.open_language_model(path)
    module: Any = language_model.module
    if getattr(module.config, "output_router_logits", False):
        raise ValueError(
            "`output_router_logits` in config.json must be false with the PyTorch "
            "engine, which has no loss that balances experts. Got true."
        )
    head = language_model.head
    modules = {inner: name for name, inner in module.named_modules()}
    problem = language_model.scan_problem(language_model.shapes(stacked=True))
    is_stacked = problem is None
    return TorchEngine(
        path=path,
        model_type=module.config.model_type,
        class_name=type(module).__name__,
        vocab_size=module.config.get_text_config().vocab_size,
        scan_problem=problem,
        shapes=language_model.shapes(stacked=is_stacked),
        names=language_model.names(stacked=is_stacked),
        head_module="" if head is None else modules[head],
        language_model=language_model,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TorchFolder(ModelFolder):
    """The files of a model that runs in PyTorch's code."""

    engine: TorchEngine

    def open_tensors(self) -> Tensors:
        """Returns the tensors by their names in the module.

        Raises ValueError if a tied weight has different values under its names. Linear
        weights that files store as `[in, out]` are returned as `[out, in]`, as `ql.io`
        expects them. Matrices that files store in several tensors are joined while they
        are read.
        """
        stored, model = self.stored_tensors, self.engine.language_model
        views: Any = {}
        for name, sources in model.find_sources(stored).items():
            parts = [stored[source] for source in sources]
            views[name] = parts[0] if len(parts) == 1 else _Joined(tuple(parts))
        tensors = stored.with_tensors(views)
        for name, leaf_name in model.tied_names.items():
            check_tied(tensors, name, leaf_name)
        transposed = model.conv1d_names & {*tensors}
        views = {name: _Transposed(tensors[name]) for name in transposed}
        return tensors.with_tensors({**tensors, **views})

    @contextlib.contextmanager
    def open_description(self) -> Iterator[pathlib.Path]:
        """Yields a folder with the config and the tokenizer."""
        yield self.path


@dataclasses.dataclass(frozen=True, eq=False)
class _Transposed:
    """A matrix `[in, out]` of a file as `[out, in]`, of which slices are read."""

    tensor: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[::-1])

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        return np.asarray(self.tensor[index[::-1]]).T


@dataclasses.dataclass(frozen=True, eq=False)
class _Joined:
    """An array that has the rows of several arrays, of which slices are read."""

    matrices: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return sum(x.shape[0] for x in self.matrices), *self.matrices[0].shape[1:]

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(x.dtype for x in self.matrices))

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        rows_index, *columns = index or (slice(None),)
        start, stop, step = rows_index.indices(self.shape[0])
        if step != 1:
            raise ValueError(f"slices must have step 1. Got {index}.")
        pieces, first = [], 0  # `first` is the index of the first row of each matrix
        for matrix in self.matrices:
            num_rows = matrix.shape[0]
            rows = slice(max(start - first, 0), min(max(stop - first, 0), num_rows))
            # If this is empty, nothing is read. `concatenate` needs at least one array.
            pieces.append(np.asarray(matrix[rows, *columns]))
            first += num_rows
        return np.concatenate(pieces)


@dataclasses.dataclass(frozen=True, eq=False)
class TorchDecoder:
    """A model in PyTorch, with those methods of a wrapped `Decoder` that are needed."""

    config: TorchEngine  # `Stream` reads its `ropes`, as those of a `DecoderConfig`
    language_model: "ql.torch.LanguageModel"  # for hidden states and for logits
    cached_model: "ql.torch.CachedModel"  # continues sequences
    has_dropout: bool  # whether adapters have dropout; if not, its keys are ignored
    has_packed_rows: bool  # whether rows may have several sequences
    mlp_tile: ClassVar[None] = None  # the MLPs process all tokens at once

    @property
    def has_states(self) -> bool:
        """Whether layers have states, which cannot go back to an earlier token."""
        return self.cached_model.has_states

    @property
    def max_positions(self) -> int | None:
        """The largest length of a sequence; None if positions are not learned."""
        return self.language_model.max_positions

    def init_cache(self, num_rows: int, length: int) -> PyTree:
        """Returns an empty cache for rows of up to `length` tokens."""
        return self.cached_model.init_cache(num_rows, length)

    def apply(
        self,
        variables: Mapping[str, PyTree],
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: object = None,
        cache: PyTree = None,
        select: Int[Array, "B P"] | None = None,
        num_tokens: Int[Array, " B"] | None = None,
        return_hidden: bool = False,
        rngs: Mapping[str, Array] | None = None,
        mutable: bool = False,
    ) -> Any:
        """Returns the hidden states `[B, P, D]` from which targets are predicted.

        `select` has their indices in the row. Without packed rows, each row is a single
        sequence with padding on the right. `positions` can then be ignored: they are 0,
        1, 2 and so on, and no token sees the padding. In packed rows, positions start
        again at 0 with each sequence. transformers recognizes the sequences by this, so
        `segment_ids` are not needed.

        With a `cache`, returns the logits `[B, 1, V]` after the last of the
        `num_tokens` tokens of each row, and the new cache.
        """
        if cache is not None:
            assert positions is not None and segment_ids is None
            logits, cache = self.cached_model.apply(
                variables, tokens, cache, positions[:, 0], num_tokens
            )
            return logits[:, None].astype(jnp.float32), cache
        assert return_hidden and select is not None and not mutable
        key = rngs["dropout"] if rngs and self.has_dropout else None
        options: dict[str, Any] = {}
        if self.has_packed_rows:
            options["position_ids"] = positions
        hidden = self.language_model.hidden_states(
            variables, tokens, dropout_key=key, **options
        )
        return jnp.take_along_axis(hidden, jnp.asarray(select)[..., None], axis=1)

    def target_losses(
        self,
        variables: Mapping[str, PyTree],
        hidden: Float[Array, "B P D"],
        targets: Int[Array, "B P"],
        dropout_key: Array | None,
    ) -> Float[Array, "B P"]:
        """Returns the cross entropy of each target.

        The model's own code computes the logits for one chunk of targets at a time. The
        backward pass computes them again.
        """
        key = dropout_key if self.has_dropout else None
        num_rows, num_targets, _ = hidden.shape
        size = min(num_targets, max(1, TOKENS_PER_CHUNK // num_rows))
        count = -(-num_targets // size)

        def split_targets(x: Array) -> Array:  # [B, P, ...] -> [count, B, size, ...]
            padding = [(0, 0)] * x.ndim
            padding[1] = (0, count * size - num_targets)
            x = jnp.pad(x, padding).reshape(num_rows, count, size, *x.shape[2:])
            return jnp.moveaxis(x, 1, 0)

        @jax.checkpoint
        def chunk_losses(chunk: tuple[Array, Array]) -> Array:
            hidden, labels = chunk
            logits = self.language_model.logits(variables, hidden, dropout_key=key)
            log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
            return -jnp.take_along_axis(log_probs, labels[..., None], axis=-1)[..., 0]

        chunks = split_targets(hidden), split_targets(jnp.asarray(targets))
        losses = jnp.moveaxis(jax.lax.map(chunk_losses, chunks), 0, 1)
        return losses.reshape(num_rows, -1)[:, :num_targets]
