"""Maps a decoder's parameters to Hugging Face tensor names."""

import re
from typing import Any

import qlora_jax as ql

from .config import DecoderConfig


def decoder_names(config: DecoderConfig) -> "ql.io.Names":
    """Returns the Hugging Face names of a decoder's parameters.

    Args:
        config: The decoder's config.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> decoder_names(config).of("layers/mlp/up_proj/kernel", (2,))[1]
        'model.layers.1.mlp.up_proj.weight'
    """
    c = config
    qkv, gate_up = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if c.fused:
        qkv, gate_up = ["qkv_proj"], ["gate_up_proj"]
    linear = {f"self_attn.{name}": c.qkv_bias for name in qkv}
    linear["self_attn.o_proj"] = c.o_bias
    if c.experts is None:
        linear |= {f"mlp.{name}": c.mlp_bias for name in [*gate_up, "down_proj"]}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if c.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if c.qk_norms:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    entries: dict[str, Any] = {
        "embed_tokens/embedding": f"{c.module}.embed_tokens.weight",
        "norm/scale": f"{c.module}.norm.weight",
    }
    ignored = [r".*\.inv_freq"]
    if c.module != "model":  # it is the text half of a model
        ignored.append(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
    if c.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    else:
        entries["lm_head/kernel"] = "lm_head.weight"
    layer = f"{c.module}.layers.{{layer}}"
    leaves = [(name, "scale", "weight") for name in norms]
    leaves += [(name, "kernel", "weight") for name in linear]
    leaves += [(name, "bias", "bias") for name, has_bias in linear.items() if has_bias]
    for name, leaf, end in leaves:
        entries[f"layers/{name.replace('.', '/')}/{leaf}"] = f"{layer}.{name}.{end}"
    if c.sinks:
        entries["layers/self_attn/sinks"] = f"{layer}.self_attn.sinks"
    if c.experts is not None:
        found = {"router": f"{c.experts.router}.weight"}
        kernels = c.experts.kernels
        for name, hf_name in zip(kernels, c.experts.names or kernels, strict=True):
            found[f"experts/{name}"] = c.experts.kernel.replace("NAME", hf_name)
        for path, name in found.items():
            # transformers has one parameter of all experts, and of gate and up.
            hf_name = path.replace("/", ".")
            hf_name = re.sub(r"\.(gate|up)_proj", ".gate_up_proj", hf_name)
            if path == "router":
                hf_name = f"{c.experts.router.rpartition('.')[2]}.weight"
            entries[f"layers/mlp/{path}/kernel"] = ql.io.Entry(
                f"{layer}.{name}", parameter=f"{layer}.mlp.{hf_name}"
            )
            if c.mlp_bias:  # of all experts, one tensor
                of_bias = re.sub(r"\.\{expert\}$", "_bias", name)
                of_bias = re.sub(r"\.weight$", ".bias", of_bias)
                entries[f"layers/mlp/{path}/bias"] = f"{layer}.{of_bias}"
    return ql.io.Names(entries, ignored=tuple(ignored))
