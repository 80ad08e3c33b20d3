"""Maps a decoder's parameters to Hugging Face tensor names."""

import re

import qlora_jax as ql

from .config import DecoderConfig, Experts


def decoder_names(config: DecoderConfig) -> ql.io.Names:
    """Returns the Hugging Face names of a decoder's parameters.

    Args:
        config: The decoder's config.

    Example:
        >>> config = DecoderConfig(64, 32, 48, 2, num_heads=4, num_kv_heads=2)
        >>> decoder_names(config).of("layers/mlp/up_proj/kernel", (2,))[1]
        'model.layers.1.mlp.up_proj.weight'
    """
    c = config
    entries: dict[str, str | ql.io.Entry] = {
        "embed_tokens/embedding": f"{c.module}.embed_tokens.weight",
        "norm/scale": f"{c.module}.norm.weight",
    }
    ignored = [r".*\.inv_freq"]
    if c.module != "model":  # the decoder is the text half of a larger model
        ignored.append(r"(model\.)?(vision_tower|multi_modal_projector)\..*")
    if c.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    else:
        entries["lm_head/kernel"] = "lm_head.weight"
    # 1. The linear layers, and whether they have a bias.
    qkv, gate_up = ["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]
    if c.fused:
        qkv, gate_up = ["qkv_proj"], ["gate_up_proj"]
    linear = {f"self_attn.{name}": c.qkv_bias for name in qkv}
    linear["self_attn.o_proj"] = c.o_bias
    if c.experts is None:
        linear |= {f"mlp.{name}": c.mlp_bias for name in [*gate_up, "down_proj"]}
    # 2. The norms.
    norms = ["input_layernorm", "post_attention_layernorm"]
    if c.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if c.qk_norms:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    # 3. The leaves of norms and linear layers, with the leaf's name here and in Hugging
    # Face models. Then the other parameters of a layer.
    layer = f"{c.module}.layers.{{layer}}"
    leaves = [(name, "scale", "weight") for name in norms]
    leaves += [(name, "kernel", "weight") for name in linear]
    leaves += [(name, "bias", "bias") for name, has_bias in linear.items() if has_bias]
    for name, leaf, hf_leaf in leaves:
        entries[f"layers/{name.replace('.', '/')}/{leaf}"] = f"{layer}.{name}.{hf_leaf}"
    if c.sinks:
        entries["layers/self_attn/sinks"] = f"{layer}.self_attn.sinks"
    if c.experts is not None:
        entries |= _expert_entries(c.experts, layer, c.mlp_bias)
    return ql.io.Names(entries, ignored=tuple(ignored))


def _expert_entries(
    experts: Experts, layer: str, has_bias: bool
) -> "dict[str, str | ql.io.Entry]":
    hf_names = experts.names or experts.kernels
    tensors = {"router": f"{experts.router}.weight"}
    for kernel, hf_name in zip(experts.kernels, hf_names, strict=True):
        tensors[f"experts/{kernel}"] = experts.kernel.replace("NAME", hf_name)
    entries = {}
    for path, tensor in tensors.items():
        # In transformers, one parameter contains all experts, with gate and up joined.
        parameter = path.replace("/", ".")
        parameter = re.sub(r"\.(gate|up)_proj", ".gate_up_proj", parameter)
        if path == "router":
            parameter = f"{experts.router.rpartition('.')[2]}.weight"
        entries[f"layers/mlp/{path}/kernel"] = ql.io.Entry(
            f"{layer}.{tensor}", parameter=f"{layer}.mlp.{parameter}"
        )
        if has_bias:  # the biases of all experts are one tensor
            bias = re.sub(r"\.\{expert\}$", "_bias", tensor)
            bias = re.sub(r"\.weight$", ".bias", bias)
            entries[f"layers/mlp/{path}/bias"] = f"{layer}.{bias}"
    return entries
