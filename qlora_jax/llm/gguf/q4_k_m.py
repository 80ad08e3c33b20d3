"""Files of llama.cpp's type Q4_K_M, in which tensors have different formats."""

import re

from ..models.config import DecoderConfig
from .k_quants import K_QUANT_BLOCK

# For tensors whose number of inputs is not a multiple of 256: the format that replaces
# each K-quant.
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
_FALLBACK_BLOCK = 32


def q4_k_m_format(
    name: str, num_inputs: int, config: DecoderConfig, architecture: str
) -> str:
    """Returns the format that llama.cpp's `llama-quantize` chooses for Q4_K_M.

    Args:
        name: The name of a matrix in the GGUF file. Routers of experts, which
            llama.cpp does not quantize, must not be passed.
        num_inputs: The size of its last axis.
        config: The config of the model.
        architecture: The name of the model's architecture in llama.cpp.

    Returns:
        The name of the format; "F16" if 32 does not divide the number of inputs.

    Example:
        >>> config = DecoderConfig(320, 512, 1024, 32, 4, 2, tie_embeddings=False)
        >>> [
        ...     q4_k_m_format(f"blk.{layer}.ffn_down.weight", 1024, config, "llama")
        ...     for layer in (0, 4, 31)
        ... ]
        ['Q6_K', 'Q4_K', 'Q6_K']
    """
    fmt = _choose_k_quant(name, config, architecture)
    if num_inputs % K_QUANT_BLOCK:
        fmt = _FALLBACKS.get(fmt, fmt)
    return fmt if num_inputs % _FALLBACK_BLOCK == 0 else "F16"


def _choose_k_quant(name: str, config: DecoderConfig, architecture: str) -> str:
    # 1. The head, which may be the embedding.
    if name == ("token_embd.weight" if config.tie_embeddings else "output.weight"):
        return "Q6_K"
    match = re.fullmatch(r"blk\.(\d+)\.(.*)\.weight", name)
    if match is None:
        return "Q4_K"
    # 2. The value and down projections suffer most from rounding. They have more bits
    # in the first and last eighth of the layers, and in every third one between them.
    layer, matrix = int(match[1]), match[2]
    eighth = config.num_layers // 8
    is_outer = not eighth <= layer < 7 * config.num_layers // 8
    has_more_bits = is_outer or (layer - eighth) % 3 == 2
    is_value = matrix in ("attn_v", "attn_qkv")
    # 3. Models with 8 experts, such as Mixtral, have small matrices for attention.
    if config.experts is not None and config.experts.count == 8:
        if is_value or matrix == "attn_k":
            return "Q8_0"
        if matrix == "attn_output":
            return "Q5_K"
    if has_more_bits and (is_value or matrix.startswith("ffn_down")):
        return "Q6_K"
    # 4. llama.cpp recognizes models with 70 billion parameters by their 80 layers.
    is_grouped = config.num_heads != config.num_kv_heads
    is_70b = architecture == "qwen2" or (architecture == "llama" and is_grouped)
    if is_value and config.num_layers == 80 and is_70b:
        return "Q5_K"
    return "Q4_K"
