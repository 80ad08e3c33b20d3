"""A model in a GGUF file, and its description as Hugging Face files."""

import contextlib
import json
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ..models.config import DecoderConfig, Rope
from ..models.families import FAMILIES, config_from_hf
from ..models.folder import ChatSettings
from .decoder_in import gguf_fmt, read_gguf
from .file import GGUFFile, open_gguf
from .tokenizer_in import chat_templates, gguf_tokenizer, special_tokens
from .values import OSS, architecture_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """A `ModelSource` in a file of llama.cpp."""

    path: pathlib.Path
    # Blocks without an equivalent here are decoded to floats, which keeps all values.
    is_recoded: ClassVar[bool] = True

    @cached_property
    def file(self) -> GGUFFile:
        """The file."""
        return open_gguf(self.path)

    @cached_property
    def _contents(self) -> tuple[DecoderConfig, Mapping[str, Any]]:
        return read_gguf(self.file)

    @property
    def config(self) -> DecoderConfig:
        """The config of the decoder; raises if `Decoder` does not support the model."""
        return self._contents[0]

    @property
    def context_length(self) -> int:
        """The context length in tokens."""
        key = f"{self.file.values.get('general.architecture')}.context_length"
        if not (length := self.file.values.get(key)):
            raise ValueError(f"{self.path} must have a context length, `{key}`.")
        return int(length)

    @property
    def quantization(self) -> Mapping[str, Any]:
        """The format of the packed layers."""
        return {"quant_method": "gguf", "fmt": gguf_fmt(self.file)}

    @property
    def stored_tensors(self) -> Mapping[str, Any]:
        """The tensors by Hugging Face name."""
        return self._contents[1]

    def open_tensors(self) -> Mapping[str, Any]:
        """Returns the tensors by Hugging Face name."""
        return self.stored_tensors

    def build_tokenizer(self) -> "Tokenizer":
        """Returns the tokenizer."""
        return gguf_tokenizer(self.file)

    def read_chat(self) -> ChatSettings:
        """Returns the chat templates and the special tokens."""
        ids, end_ids = special_tokens(self.file)
        tokens: Any = self.file.values.get("tokenizer.ggml.tokens")
        special = {name: tokens[index] for name, index in ids.items()}
        return ChatSettings(chat_templates(self.file), special, tuple(end_ids))

    @contextlib.contextmanager
    def open_description(self) -> Iterator[pathlib.Path]:
        """Yields a temporary folder with the config and the tokenizer."""
        chat = self.read_chat()
        special, _ = special_tokens(self.file)
        ids: dict[str, Any] = {f"{name}_id": index for name, index in special.items()}
        ends = [*chat.end_ids]
        eos = {"eos_token_id": ends if ends[1:] else ends[0]} if ends else {}
        files: dict[str, Any] = {
            "config.json": hf_config(self.config, self.context_length) | ids,
            "generation_config.json": ids | eos,
        }
        tokenizer = None
        if "tokenizer.ggml.model" in self.file.values:
            tokenizer = self.build_tokenizer()
            templates: Any = chat.templates
            if [*templates] == ["default"]:
                templates = templates["default"]
            else:
                templates = [{"name": k, "template": x} for k, x in templates.items()]
            files["tokenizer_config.json"] = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                **{name: tokenizer.id_to_token(i) for name, i in special.items()},
                **({"chat_template": templates} if templates else {}),
            }
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            for name, values in files.items():
                text = json.dumps(values, indent=2) + "\n"
                (folder / name).write_text(text, "utf-8")
            if tokenizer is not None:
                tokenizer.save(str(folder / "tokenizer.json"))
            yield folder


def hf_config(config: DecoderConfig, context: int) -> dict[str, Any]:
    """Returns a `config.json` for a decoder from a GGUF file."""
    c, architecture = config, architecture_of(config)
    is_mixture = c.experts is not None
    model_type = _MODEL_TYPES.get((architecture, is_mixture), architecture)
    family = FAMILIES[model_type]
    is_gpt_oss = model_type == "gpt_oss"
    raw = {
        "architectures": list(family.architectures),
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu" if is_gpt_oss else c.activation,
        "max_position_embeddings": context,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": c.o_bias,
        # gpt-oss always has these biases, but its config has no key for them.
        **({} if is_gpt_oss else {"mlp_bias": c.mlp_bias}),
        **_rope_keys(c, model_type),
    }
    # The values of keys that only some families read.
    optional = {
        "hidden_activation": c.activation,
        "query_pre_attn_scalar": round(c.attention_scale**-2),
        "attn_logit_softcapping": c.attention_soft_cap,
        "final_logit_softcapping": c.logit_soft_cap,
        "moe_intermediate_size": c.intermediate_size,
        # Despite its name, this key has 1 for layers with rotary positions.
        "no_rope_layers": [int(layer.rope is not None) for layer in c.layers],
    }
    if c.experts is not None:
        is_local = model_type in ("mixtral", "gpt_oss")
        optional["num_local_experts" if is_local else "num_experts"] = c.experts.count
        optional["num_experts_per_tok"] = c.experts.per_token
        optional["norm_topk_prob"] = c.experts.normalized
    windows = [layer.window for layer in c.layers]
    if set(windows) != {None}:
        optional["sliding_window"] = next(filter(None, windows))
        names = ("sliding_attention", "full_attention")
        optional["layer_types"] = [names[window is None] for window in windows]
    raw |= {key: x for key, x in optional.items() if key in family.keys.split()}
    if config_from_hf(raw) != config:
        raise ValueError(
            "a GGUF model must have an equivalent Hugging Face config. This "
            f"{architecture} has none. For example, a GGUF file has the frequencies of "
            "an extended context, but not the rule that produced them."
        )
    return raw


def _rope_keys(c: DecoderConfig, model_type: str) -> dict[str, Any]:
    """Returns the keys about rotary positions.

    transformers 5 reads `rope_parameters`; older versions read the other keys.
    """
    ropes = {layer.window is None: layer.rope for layer in c.layers if layer.rope}
    if model_type == "gemma3_text":
        full, local = ropes.get(True, Rope(1e6)), ropes.get(False, Rope())
        sections = {"full_attention": _rope_section(full, model_type)}
        sections["sliding_attention"] = _rope_section(local, model_type)
        thetas = {"rope_theta": full.theta, "rope_local_base_freq": local.theta}
        return thetas | {"rope_parameters": sections}
    rope = ropes.get(True) or ropes.get(False) or Rope()
    keys, section = {"rope_theta": rope.theta}, _rope_section(rope, model_type)
    if model_type == "phi3":
        fraction = {"partial_rotary_factor": c.rotary_dim / c.head_dim}
        keys, section = keys | fraction, section | fraction
        if rope.original_length:
            keys["original_max_position_embeddings"] = rope.original_length
    return keys | {"rope_parameters": section}


def _rope_section(rope: Rope, model_type: str) -> dict[str, Any]:
    section = {"rope_theta": rope.theta}
    if not rope.divisors:
        return section | {"rope_type": "default"}
    if model_type == "phi3":
        factors = {"short_factor": rope.divisors, "long_factor": rope.long_divisors}
        section |= {key: list(values) for key, values in factors.items()}
        return section | {"rope_type": "longrope", "attention_factor": rope.scale}
    if rope.original_length:  # gpt-oss
        original = {"original_max_position_embeddings": rope.original_length}
        yarn = {"rope_type": "yarn", "factor": rope.divisors[-1], "truncate": False}
        return section | yarn | original
    return section | {"rope_type": "linear", "factor": rope.divisors[0]}


# The model type by architecture and whether there are experts. Other architectures have
# the same name as their model type.
_MODEL_TYPES = {
    ("gemma3", False): "gemma3_text",
    ("qwen3moe", True): "qwen3_moe",
    ("llama", True): "mixtral",
    (OSS, True): "gpt_oss",
}
