"""Causal language models of transformers, without weights."""

import contextlib
import dataclasses
import inspect
import itertools
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch

import qlora_jax as ql

from ..io.model_folder import read_config_json
from .arrays import named_tensors, to_jax
from .attention import ATTENTION_NAME, register_attention
from .init import is_conv1d, names
from .layers import ScanError, stack
from .weights import Backend
from .wrap import Policy, WrappedModule, wrap

PyTree = Any
# The arguments in which models receive the types of tokens: 1 for images, 0 for text.
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model of transformers as two pure functions.

    `hidden_states` runs the layers. `logits` runs the part of the model after the
    layers: the head, and for example a scaling and a soft-cap. A loss can therefore
    compute the logits of a few tokens at a time.

    Attributes:
        model: The wrapped model.
        buffers: The values of the buffers that are not in checkpoints, by name, such as
            the frequencies of rotary positions.

    Example:
        >>> import qlora_jax as ql, tempfile, transformers
        >>> config = transformers.GPTNeoXConfig(
        ...     vocab_size=128, hidden_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4)
        >>> folder = tempfile.mkdtemp()
        >>> config.save_pretrained(folder)
        >>> language_model = ql.torch.open_language_model(folder)
        >>> sorted(language_model.buffers)[0]
        'gpt_neox.rotary_emb.inv_freq'
    """

    model: WrappedModule
    buffers: Mapping[str, jax.Array]

    @property
    def module(self) -> torch.nn.Module:
        """The PyTorch module, whose parameters are on the meta device."""
        return self.model.module

    @property
    def head(self) -> torch.nn.Module | None:
        """The module that computes the logits; None if the model does not name it."""
        module: Any = self.module
        return module.get_output_embeddings()

    @property
    def conv1d_names(self) -> set[str]:
        """The names of weights whose tensors are `[in, out]` in files, as in GPT-2."""
        return {
            f"{name}.weight"
            for name, inner in self.module.named_modules()
            if is_conv1d(inner)
        }

    @property
    def max_positions(self) -> int | None:
        """The size of the table of learned positions; None if there is no table."""
        module: Any = self.module
        size = getattr(module.config.get_text_config(), "max_position_embeddings", None)
        if size is None:
            return None
        table_sizes = {
            inner.num_embeddings
            for inner in module.modules()
            if isinstance(inner, torch.nn.Embedding)
            and inner is not module.get_input_embeddings()
        }
        # Some tables have up to two further rows for padding, as in OPT.
        return size if table_sizes & {size, size + 1, size + 2} else None

    def shapes(self, *, stacked: bool) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the leaves that are read from files.

        These are all leaves except `buffers`.

        Args:
            stacked: Whether equal layers are stacked, as by `ql.torch.stack`.
        """
        shapes = {
            name: jax.ShapeDtypeStruct(tuple(x.shape), jnp.float32)
            for name, x in named_tensors(self.module).items()
            if name not in self.buffers
        }
        if not stacked:
            return shapes
        return jax.eval_shape(lambda tree: stack(self.module, tree), shapes)

    def names(self, *, stacked: bool) -> ql.io.Names:
        """Returns the names of the leaves in files, for `ql.io`.

        Embeddings have no roles, so that they do not become targets.

        Args:
            stacked: As in `shapes`.
        """
        module: Any = self.module
        embeddings = {
            f"{name}.weight"
            for name, inner in module.named_modules()
            if isinstance(inner, torch.nn.Embedding)
        }
        table = names(module, stacked=stacked)
        entries = {
            name: dataclasses.replace(entry, roles="") if name in embeddings else entry
            for name, entry in table.entries.items()
            if name not in self.buffers
        }
        # Older files contain buffers that are now computed, and tied weights under each
        # of their names. These tensors are ignored.
        patterns = module._keys_to_ignore_on_load_unexpected or ()
        ignored = [f".*({pattern}).*" for pattern in patterns]
        ignored += [re.escape(name) for name in (*self.buffers, *self.tied_names)]
        return ql.io.Names(entries, ignored=(*ignored, r".*rotary_emb\.inv_freq"))

    @property
    def tied_names(self) -> dict[str, str]:
        """Maps the other names of a tied weight to its first one, that of its leaf."""
        leaf_names = {w: name for name, w in self.module.named_parameters()}
        all_weights = self.module.named_parameters(remove_duplicate=False)
        return {n: leaf_names[w] for n, w in all_weights if n != leaf_names[w]}

    @property
    def decoder_name(self) -> str:
        """The name of the module that contains all layers of the language model."""
        decoder = _decoder_of(self.module)
        return next(name for name, x in self.module.named_modules() if x is decoder)

    @property
    def image_token_id(self) -> int | None:
        """The token for a part of an image, or None if the model reads only text."""
        module: Any = self.module
        reads_images = "pixel_values" in inspect.signature(module.forward).parameters
        return getattr(module.config, "image_token_id", None) if reads_images else None

    def find_sources(self, file_names: Iterable[str]) -> dict[str, list[str]]:
        """Returns which tensors of a file form each tensor of the module, by name.

        If several tensors form one, it has the rows of all of them, one after another.
        If the file has a separate tensor for each expert of a parameter, each expert
        has the name of the parameter with ".0", ".1" and so on at its end.

        A table of transformers describes these conversions. It also has the names that
        changed since the file was written. Tensors that transformers converts in other
        ways are only renamed. If some of the tensors that form one are missing, the
        others keep their names in the file.

        Args:
            file_names: The names of all tensors in the file.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        module: Any = self.module
        transforms = get_model_conversion_mapping(module)
        renamings = [x for x in transforms if isinstance(x, WeightRenaming)]
        converters: list[Any] = [x for x in transforms if _joins_rows(x)]
        prefix, state = module.base_model_prefix, module.state_dict()
        sources: dict[str, list[str]] = {}
        # The tensors that transformers joins, by the name of the joined tensor in the
        # module, and then by the pattern that matches their names in the file.
        parts: dict[str, dict[str, list[str]]] = {}
        for name in sorted(file_names, key=_natural_order):
            target, pattern = rename_source_key(
                name, renamings, converters, prefix, state
            )
            if pattern is None or target not in state:
                target, _ = rename_source_key(name, renamings, [], prefix, state)
                sources[target] = [name]
            else:
                parts.setdefault(target, {}).setdefault(pattern, []).append(name)
        for target, names_by_pattern in parts.items():
            # The converter has the patterns of all parts, such as gate and up, in the
            # order in which it joins them.
            patterns = next(
                x.source_patterns
                for x in converters
                if names_by_pattern.keys() <= {*x.source_patterns}
            )
            # A list of names for each part. For experts, it has one name per expert.
            names = [names_by_pattern.get(pattern, []) for pattern in patterns]
            if len({*map(len, names)}) > 1:  # some tensors are missing
                sources |= {name: [name] for name in itertools.chain(*names)}
            elif len(state[target].shape) == 3:
                for index, expert_names in enumerate(zip(*names, strict=True)):
                    sources[f"{target}.{index}"] = [*expert_names]
            else:
                sources[target] = [*itertools.chain(*names)]
        return sources

    def scan_problem(self, shapes: Mapping[str, PyTree]) -> str | None:
        """Returns why stacked layers cannot be scanned; None if they can.

        Args:
            shapes: What `shapes(stacked=True)` returned.
        """
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        try:
            jax.eval_shape(self.hidden_states, {"params": shapes}, ids)
        except ScanError as error:
            return str(error)
        return None

    def hidden_states(
        self,
        variables: Mapping[str, PyTree],
        input_ids: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        **kwargs: PyTree,
    ) -> jax.Array:
        """Returns the output of the layers `[B, T, D]`, which `logits` takes.

        Args:
            variables: As in `WrappedModule.apply`, with or without `buffers`.
            input_ids: Token ids `[B, T]`, padded on the right.
            dropout_key: PRNG key of the adapters' dropout.
            **kwargs: Passed to the model, such as `position_ids`, or `pixel_values` of
                images. With `pixel_values`, the types of tokens are added, by which
                some models find the tokens of images.

        Raises:
            ValueError: As in `WrappedModule.apply`; or if the model does not call the
                module that its method `get_decoder` returns.
        """
        if "pixel_values" in kwargs:
            names = inspect.signature(self.module.forward).parameters
            is_image = (input_ids == self.image_token_id).astype(jnp.int32)
            kwargs |= {name: is_image for name in _TOKEN_TYPES if name in names}
        # An exception ends the call of the model as soon as its layers have run, so
        # that the head does not run.
        decoder = _decoder_of(self.module)
        run_layers, run_model = decoder.forward, self.module.forward

        def stop_after_layers(*args: Any, **kwargs: Any) -> Any:
            output = run_layers(*args, **kwargs)
            raise _AfterLayers(output if torch.is_tensor(output) else output[0])

        def run_until_head(*args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                run_model(*args, **kwargs)
            except _AfterLayers as stop:
                return stop.hidden
            raise _unsupported(self.module, decoder)

        with self._replace_forwards(stop_after_layers, run_until_head):
            return self.model.apply(
                self._with_buffers(variables),
                input_ids=input_ids,
                use_cache=False,
                dropout_key=dropout_key,
                **kwargs,
            )

    def logits(
        self,
        variables: Mapping[str, PyTree],
        hidden: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits `[B, T, V]` of hidden states.

        Args:
            variables: As in `hidden_states`.
            hidden: What `hidden_states` returned, or some of its tokens.
            dropout_key: As in `hidden_states`, for an adapter of the head.

        Raises:
            ValueError: As `hidden_states`.
        """
        # The model's own `forward` runs, but its decoder returns `hidden` instead of
        # running the layers. Only the head and the code around it compute anything.
        decoder, run_model = _decoder_of(self.module), self.module.forward
        # `apply` passes `hidden` to `run_head` as a tensor, to be kept here.
        decoder_output: Any = None
        is_decoder_called = False

        def run_head(hidden: torch.Tensor, **kwargs: Any) -> Any:
            nonlocal decoder_output
            decoder_output = _DecoderOutput(hidden)
            return run_model(**kwargs)

        def return_hidden(*args: Any, **kwargs: Any) -> _DecoderOutput:
            nonlocal is_decoder_called
            is_decoder_called = True
            return decoder_output

        with self._replace_forwards(return_hidden, run_head):
            output = self.model.apply(
                self._with_buffers(variables),
                hidden,
                input_ids=jnp.zeros(hidden.shape[:2], jnp.int32),
                use_cache=False,
                dropout_key=dropout_key,
            )
        if not is_decoder_called:
            raise _unsupported(self.module, decoder)
        return output["logits"]

    def run_selected(
        self,
        variables: Mapping[str, PyTree],
        input_ids: jax.Array,
        index: jax.Array,
        run: Callable[..., PyTree],
        *args: PyTree,
    ) -> PyTree:
        """Runs the model, and computes the logits of only one token of each row.

        Args:
            variables: As in `hidden_states`.
            input_ids: Token ids `[B, T]`.
            index: The index of this token in all rows.
            run: Called instead of the model's `forward`, as
                `run(forward, *args, input_ids=input_ids)`, with tensors for arrays.
            *args: The arguments of `run`.

        Returns:
            What `run` returns, with JAX arrays in place of tensors.

        Raises:
            ValueError: As `hidden_states`.
        """
        decoder = _decoder_of(self.module)
        run_layers, run_model = decoder.forward, self.module.forward
        # `apply` passes `index` to `run_model_on_token` as a tensor, to be kept here.
        selected: Any = None

        def run_model_on_token(index: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal selected
            selected = index[None]
            return run(run_model, *args, **kwargs)

        def select_hidden(*args: Any, **kwargs: Any) -> _DecoderOutput:
            output = run_layers(*args, **kwargs)
            hidden = output if torch.is_tensor(output) else output[0]
            return _DecoderOutput(hidden[:, selected])

        with self._replace_forwards(select_hidden, run_model_on_token):
            return self.model.apply(
                self._with_buffers(variables), index, *args, input_ids=input_ids
            )

    @contextlib.contextmanager
    def _replace_forwards(
        self, run_decoder: Callable[..., Any], run_model: Callable[..., Any]
    ) -> Iterator[None]:
        """Replaces `forward` of the decoder and the model in the context."""
        decoder, module = _decoder_of(self.module), self.module
        decoder.forward, module.forward = run_decoder, run_model
        try:
            yield
        finally:
            del decoder.forward, module.forward

    def _with_buffers(self, variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
        return {**variables, "params": {**self.buffers, **variables["params"]}}


def open_language_model(
    folder: str | pathlib.Path,
    *,
    has_dropout: bool = False,
    policy: Policy | None = None,
    backend: Backend = None,
) -> LanguageModel:
    """Returns the language model that a folder's `config.json` describes.

    If transformers has an `AutoModelForImageTextToText` for its type, the model can
    also read images.

    The parameters are on the meta device: they have shapes, but no values. `ql.io.load`
    reads the values from the folder. The model is in evaluation mode. If its class
    supports that, it computes attention as `register_attention` describes.

    Args:
        folder: A folder with the `config.json` of a model of transformers.
        has_dropout: Whether adapters have dropout. The dropout of the model itself is
            always off.
        policy: As in `wrap`.
        backend: As in `wrap`.

    Raises:
        ValueError: If transformers has no causal language model of this type, or if the
            values of its buffers are not known.
        CheckpointError: If the folder has no `config.json` that can be read.

    Example:
        >>> import qlora_jax as ql, tempfile, transformers
        >>> folder = tempfile.mkdtemp()
        >>> transformers.OPTConfig(num_hidden_layers=2).save_pretrained(folder)
        >>> type(ql.torch.open_language_model(folder).module).__name__
        'OPTForCausalLM'
    """
    import transformers

    register_attention()
    # For a type that it does not have, transformers would offer to run code of the
    # folder, or guess the type from the folder's name.
    model_type = read_config_json(folder).get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ValueError(
            "`model_type` in config.json must be one that transformers has, because "
            f"code in a model's folder is never run. Got {model_type!r}."
        )
    config: Any = transformers.AutoConfig.from_pretrained(
        folder, trust_remote_code=False
    )
    mapping: Any = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto_class: Any = transformers.AutoModelForImageTextToText
    if type(config) not in mapping:
        mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        auto_class = transformers.AutoModelForCausalLM
    model_class: Any = mapping.get(type(config), None)
    if model_class is None:
        raise ValueError(
            f"`folder` must have a causal language model. Got {config.model_type!r}, "
            "for which transformers has none."
        )
    # Classes that do not support SDPA compute attention in their own code. They expect
    # a mask that is added to the scores. The masks of `register_attention` are bool.
    attention = ATTENTION_NAME if model_class._supports_sdpa else "eager"
    with torch.device("meta"):
        module = auto_class.from_config(
            config,
            attn_implementation=attention,
            dtype=torch.float32,
            trust_remote_code=False,
        )
    module.eval()
    buffers = _compute_buffers(module)
    # `apply` accepts a dropout key only if some module is in training mode. Only the
    # outermost module is, which has no dropout itself, so only adapters have dropout.
    module.training = has_dropout
    return LanguageModel(wrap(module, policy=policy, backend=backend), buffers)


def _compute_buffers(module: Any) -> dict[str, jax.Array]:
    """Computes the buffers that are not in files, and returns their values by name."""
    stored = module.state_dict()
    computed = {n: x for n, x in module.named_buffers() if n not in stored}
    owners = dict.fromkeys(name.rpartition(".")[0] for name in computed)
    # 1. Fill the buffers with a value that shows afterwards which ones were not set.
    # This is NaN for floats, True for booleans, and 0 for integers.
    fill_values: dict[str, float] = {}
    for name, buffer in computed.items():
        owner, _, attribute = name.rpartition(".")
        value = 1 if buffer.dtype == torch.bool else 0
        fill_values[name] = math.nan if buffer.is_floating_point() else value
        filled = torch.full_like(buffer, fill_values[name], device="cpu")
        setattr(module.get_submodule(owner), attribute, filled)
    # 2. Initialize them with `_init_weights` of transformers. This is a method of the
    # innermost model that contains the buffer, such as a vision tower.
    with torch.no_grad():
        for owner in owners:
            parts = owner.split(".")
            prefixes = (".".join(parts[:i]) for i in range(len(parts), -1, -1))
            models: Any = map(module.get_submodule, prefixes)
            inner = next(x for x in models if hasattr(x, "_init_weights"))
            inner._init_weights(module.get_submodule(owner))
    buffers = {name: module.get_buffer(name) for name in computed}
    unknown = [
        name
        for name, x in buffers.items()
        if x.numel() and (x.isnan() | (x == fill_values[name])).all()
    ]
    if unknown:
        raise ValueError(
            "`folder` must have a model whose buffers can be computed. Got "
            f"{type(module).__name__}, which does not initialize {unknown}."
        )
    return {name: to_jax(x) for name, x in buffers.items()}


def _joins_rows(transform: Any) -> bool:
    """Whether a conversion only joins the rows of matrices, or stacks experts."""
    operations = [
        (type(x).__name__, getattr(x, "dim", None))
        for x in getattr(transform, "operations", [])
    ]
    stack_experts, join_rows = ("MergeModulelist", 0), ("Concatenate", 0)
    join_rows_of_experts = ("Concatenate", 1)
    is_supported = operations in (
        [stack_experts],
        [stack_experts, join_rows_of_experts],
        [join_rows],
    )
    return is_supported and len(transform.target_patterns) == 1


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Returns a sort key for names with numbers in them, which puts 2 before 10."""
    parts = name.split(".")
    return [(int(x), "") if x.isdigit() else (-1, x) for x in parts]


class _AfterLayers(Exception):  # noqa: N818  (it ends a call, and is not an error)
    """Ends a call of the model after its layers."""

    def __init__(self, hidden: torch.Tensor):
        self.hidden = hidden


@dataclass(frozen=True)
class _DecoderOutput:
    """Replaces the decoder's output. All values except the hidden states are None."""

    last_hidden_state: torch.Tensor

    def __getitem__(self, index: int | str) -> torch.Tensor | None:
        return self.last_hidden_state if index in (0, "last_hidden_state") else None

    def keys(self) -> tuple[str, ...]:
        """Returns the names of the values, for models that call `f(**output)`."""
        return ("last_hidden_state",)

    def __getattr__(self, name: str) -> None:
        return None


def _decoder_of(module: Any) -> Any:
    """Returns the module that contains the layers of a language model, not its head."""
    decoder = module.get_decoder()
    if decoder is module:
        raise _unsupported(module, decoder)
    return decoder


def _unsupported(module: torch.nn.Module, decoder: torch.nn.Module) -> ValueError:
    return ValueError(
        "the layers and the head of the model must be separate modules. Got "
        f"{type(module).__name__}, which does not call {type(decoder).__name__}."
    )
