"""Maps a decoder's parameters to Hugging Face tensor names."""

import dataclasses
import re

import qlora_jax as ql

from .config import DecoderConfig
from .groups import layer_stacks
from .layer import Layer
from .per_layer_input import PerLayerEmbedding
from .products import norm_leaves


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
    }
    for leaf, hf_leaf in norm_leaves(c).items():
        entries[f"norm/{leaf}"] = f"{c.module}.norm.{hf_leaf}"
    ignored = [r".*\.inv_freq"]
    if c.delta_rule is not None:
        # Layers of Qwen3.5 that predict further tokens are not part of the decoder.
        ignored.append(r"mtp\..*")
    if c.module != "model":  # the decoder is the text half of a larger model
        ignored.append(
            r"(model\.)?(vision_tower|multi_modal_projector|visual|embed_vision"
            r"|vision_model|vision_embedder|audio_tower|embed_audio)\..*"
        )
    if c.tie_embeddings:
        ignored.append(rf"{re.escape(c.head_module)}\.weight")
    else:
        entries["lm_head/kernel"] = f"{c.head_module}.weight"
    if c.per_layer_width:
        entries |= {
            f"{PerLayerEmbedding.part_name}/{path}": f"{c.module}.{name}"
            for path, name in PerLayerEmbedding.tensor_names(c).items()
        }
    for layer in range(c.num_layers, c.num_layers + c.num_ignored_layers):
        ignored.append(rf"{re.escape(c.module)}\.layers\.{layer}\..*")
    # Files contain keys and values of layers that do not use them.
    without_kv = [str(i) for i, kind in enumerate(c.layers) if not kind.has_kv]
    if without_kv:
        layers = f"{re.escape(c.module)}\\.layers\\.({'|'.join(without_kv)})"
        ignored.append(rf"{layers}\.self_attn\.[kv]_(proj|norm)\..*")
    for stack in layer_stacks(c):
        numbers = {"layer": stack.layers}
        for path, x in Layer.tensor_names(c, stack.kinds[0]).items():
            entry = x if isinstance(x, ql.io.Entry) else ql.io.Entry(x)
            full_name = f"{c.module}.layers.{{layer}}.{entry.names}"
            parameter = entry.parameter
            if parameter is not None:
                parameter = f"{c.module}.layers.{{layer}}.{parameter}"
            entries[f"{stack.path}/{path}"] = dataclasses.replace(
                entry, names=full_name, parameter=parameter, numbers=numbers
            )
    entries = {path: _rename_modules(c, x) for path, x in entries.items()}
    return ql.io.Names(entries, ignored=tuple(ignored))


def _rename_modules(
    config: DecoderConfig, entry: str | ql.io.Entry
) -> str | ql.io.Entry:
    """Replaces the names that modules have in Llama by those of the family."""
    if isinstance(entry, ql.io.Entry):
        assert isinstance(entry.names, str)
        changes = {"names": _rename_modules(config, entry.names)}
        if entry.parameter is not None:
            changes["parameter"] = _rename_modules(config, entry.parameter)
        return dataclasses.replace(entry, **changes)
    for llama_name, name in config.module_names:
        entry = re.sub(rf"(?<=\.){re.escape(llama_name)}(?=\.)", name, entry)
    return entry
