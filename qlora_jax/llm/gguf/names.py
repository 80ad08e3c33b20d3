"""The names that llama.cpp gives to a decoder's tensors."""

import re

import gguf

from ..models.config import DecoderConfig
from ..models.decoder_names import decoder_names

# Replacements that turn Hugging Face names into names that the map of the gguf package
# knows. In the map, all experts of a layer are one tensor, and all names end in
# ".weight" or ".bias".
_PATTERNS = {
    r"\.experts\.\d+\.": ".experts.",
    r"(\.experts\.\w+_proj)\.\d+$": r"\1.weight",
    r"(\.experts\.\w+_proj)_bias$": r"\1.bias",
    # Gate and up become two tensors (see `save.py`).
    r"\.experts\.gate_up_proj\.": ".experts.gate_proj.",
    r"\.sinks$": ".sinks.weight",
    r"\.dt_bias$": ".dt_proj.bias",
}


def gguf_names(config: DecoderConfig, architecture: str) -> dict[str, str]:
    """Maps Hugging Face tensor names to GGUF names.

    All experts of a layer have one GGUF name.
    """
    arch = gguf.MODEL_ARCH[architecture.upper().replace("-", "_")]
    name_map = gguf.get_tensor_name_map(arch, config.num_layers)
    names = decoder_names(config)
    gguf_name_of: dict[str, str] = {}
    num_experts = config.experts.count if config.experts else 1
    for path, entry in names.entries.items():
        # The batch axes of a leaf, if it has any, are layers and then experts.
        sizes = len(entry.numbers.get("layer", ())), num_experts
        for hf_name in names.of(path, sizes[: names.num_batch_axes(path)]).flat:
            mapped = hf_name
            for pattern, replacement in _PATTERNS.items():
                mapped = re.sub(pattern, replacement, mapped)
            gguf_name = name_map.get_name(mapped, try_suffixes=(".weight", ".bias"))
            if gguf_name is None:
                raise ValueError(f"{hf_name} must have a name in llama.cpp. Got none.")
            gguf_name_of[hf_name] = gguf_name
    return gguf_name_of
