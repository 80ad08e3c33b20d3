"""Name tables for the models of Tunix and of the `gemma` package."""

# Gemma's attention has k and v (or q, k and v) in one kernel, and the `gemma` package
# has gate and up in one. The axis that stacks these weights is a batch axis. The
# letters of each `Entry` are the roles of axes: b batch, k contracted, n output.

from qlora_jax.io import Entry, Names

_LAYER = "layers.{layer}."
_ROTARY = (r".*\.rotary_emb\..*",)  # buffers of older checkpoints, not parameters
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_POST_ATTENTION_NORMS = {"gemma2": "post_attn_norm", "gemma3": "post_attention_norm"}


def tunix_names(
    model: str, *, qkv_einsum: bool = False, prefix: str = "model."
) -> Names:
    """Returns the name table of one of Tunix's nnx models.

    Args:
        model: "llama3" (`tunix.models.llama3`), "qwen3", "gemma2"
            (`tunix.models.gemma`) or "gemma3". For Gemma models, wrap with
            `contract={r".*/kv_einsum/w": "bnkn"}` (or `qkv_einsum`, if the model has
            it), so that k and v have separate adapters.
        qkv_einsum: Whether q, k and v of a Gemma model are one kernel, as they are if
            they have the same number of heads.
        prefix: The start of the names; "model.language_model." for multimodal models.

    Raises:
        ValueError: If `model` is not one of these.

    Example:
        >>> names = tunix_names("llama3")
        >>> names.of("layers/3/attn/q_proj/w").item(), names.roles("lm_head/w")
        ('model.layers.3.self_attn.q_proj.weight', 'kn')
    """
    path, hf = "layers/{layer}/", prefix + _LAYER
    if model in ("llama3", "qwen3"):
        norm, entries = "w", _llama_layer(path, hf)
        entries["lm_head/w"] = Entry("lm_head.weight", "kn")
    elif model in _POST_ATTENTION_NORMS:
        norm, post_norm = "scale", _POST_ATTENTION_NORMS[model]
        entries = _gemma_layer(path, hf, post_norm, qkv_einsum)
    else:
        models = ["llama3", "qwen3", *_POST_ATTENTION_NORMS]
        raise ValueError(f"`model` must be one of {models}. Got {model!r}.")
    entries["embedder/input_embedding"] = Entry(f"{prefix}embed_tokens.weight")
    entries[f"final_norm/{norm}"] = Entry(f"{prefix}norm.weight")
    for name in _PROJECTIONS:
        entries[f"{path}mlp/{name}/kernel"] = Entry(f"{hf}mlp.{name}.weight")
    return Names(entries, ignored=_ROTARY)


def gemma_names(
    *,
    qkv_einsum: bool = False,
    transpose_gating_einsum: bool = True,
    prefix: str = "model.",
) -> Names:
    """Returns the name table of the `gemma` package's linen transformers.

    When packing the parameters, set `contract` to these roles: "nkn" for `q_einsum/w`,
    "bnkn" for `kv_einsum/w` and `qkv_einsum/w`, "kkn" for `attn_vec_einsum/w`, and
    "bnk" for `gating_einsum` (or "bkn", without `transpose_gating_einsum`).

    Args:
        qkv_einsum: Whether q, k and v are one kernel, as they are if they have the
            same number of heads.
        transpose_gating_einsum: The setting of this name in the transformer's config.
        prefix: The start of the names; "model.language_model." for multimodal models.

    Example:
        >>> names = gemma_names()
        >>> names.of("layer_0/mlp/gating_einsum", (2,))[1]
        'model.layers.0.mlp.up_proj.weight'
    """
    hf = prefix + _LAYER
    gate_up_roles = "bnk" if transpose_gating_einsum else "bkn"
    gate_up = tuple(f"{hf}mlp.{name}.weight" for name in _PROJECTIONS[:2])
    entries = {
        "embedder/input_embedding": f"{prefix}embed_tokens.weight",
        "final_norm/scale": f"{prefix}norm.weight",
        **_gemma_layer("layer_{layer}/", hf, "post_attention_norm", qkv_einsum),
        "layer_{layer}/mlp/gating_einsum": Entry(gate_up, gate_up_roles),
        "layer_{layer}/mlp/linear": Entry(f"{hf}mlp.down_proj.weight", "kn"),
    }
    return Names(entries, ignored=_ROTARY)


def _llama_layer(path: str, hf: str) -> dict[str, Entry]:
    entries = {}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        entries[f"{path}{norm}/w"] = Entry(f"{hf}{norm}.weight")
    for norm in ("q_norm", "k_norm"):
        entries[f"{path}attn/{norm}/w"] = Entry(f"{hf}self_attn.{norm}.weight")
    for name, roles in (("q", "knn"), ("k", "knn"), ("v", "knn"), ("o", "kkn")):
        entry = Entry(f"{hf}self_attn.{name}_proj.weight", roles)
        entries[f"{path}attn/{name}_proj/w"] = entry
    # Mixture-of-experts models have these instead of the projections in `tunix_names`.
    entries[f"{path}mlp/router/kernel"] = Entry(f"{hf}mlp.gate.weight")
    for name in _PROJECTIONS:
        expert = f"{hf}mlp.experts.{{expert}}.{name}.weight"
        entries[f"{path}mlp/{name}"] = Entry(expert, "kn")
    return entries


def _gemma_layer(
    path: str, hf: str, post_norm: str, qkv_einsum: bool
) -> dict[str, Entry]:
    q, k, v, o = (f"{hf}self_attn.{name}_proj.weight" for name in "qkvo")
    norms = {
        "pre_attention_norm": "input_layernorm",
        post_norm: "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn/_query_norm": "self_attn.q_norm",
        "attn/_key_norm": "self_attn.k_norm",
    }
    entries = {f"{path}{n}/scale": Entry(f"{hf}{m}.weight") for n, m in norms.items()}
    if qkv_einsum:
        entries[f"{path}attn/qkv_einsum/w"] = Entry((q, k, v), "bnkn")
    else:
        entries[f"{path}attn/q_einsum/w"] = Entry(q, "nkn")
        entries[f"{path}attn/kv_einsum/w"] = Entry((k, v), "bnkn")
    entries[f"{path}attn/attn_vec_einsum/w"] = Entry(o, "kkn")
    return entries
