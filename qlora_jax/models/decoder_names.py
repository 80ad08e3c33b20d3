"""Maps a decoder's parameters to Hugging Face tensor names."""

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
    mlp = [*gate_up, "down_proj"]
    if c.experts is None:
        linear |= {f"mlp.{name}": c.mlp_bias for name in mlp}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if c.post_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if c.qk_norms:
        norms += ["self_attn.q_norm", "self_attn.k_norm"]
    entries = {
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
    for name in norms:
        path = "layers/" + name.replace(".", "/")
        entries[f"{path}/scale"] = f"{c.module}.layers.{{layer}}.{name}.weight"
    for name, has_bias in linear.items():
        path = "layers/" + name.replace(".", "/")
        entries[f"{path}/kernel"] = f"{c.module}.layers.{{layer}}.{name}.weight"
        if has_bias:
            entries[f"{path}/bias"] = f"{c.module}.layers.{{layer}}.{name}.bias"
    if c.experts is not None:
        theirs = dict(zip(mlp, c.experts.kernels, strict=True))
        paths = {f"experts/{name}": theirs[name] for name in mlp}
        paths["router"] = f"{c.experts.router}.weight"
        for path, name in paths.items():
            full = f"{c.module}.layers.{{layer}}.{name}"
            entries[f"layers/mlp/{path}/kernel"] = full
    return ql.io.Names(entries, ignored=tuple(ignored))
