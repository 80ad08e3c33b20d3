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

    def full_name(name: str) -> str:
        """Returns a name with the path of the module, as the family calls it."""
        name = f"{c.module}.{name}"
        for llama_name, family_name in c.module_names:
            name = re.sub(rf"(?<=\.){re.escape(llama_name)}(?=\.)", family_name, name)
        return name

    entries: dict[str, str | ql.io.Entry] = {
        "embed_tokens/embedding": full_name("embed_tokens.weight")
    }
    for leaf, hf_leaf in norm_leaves(c).items():
        entries[f"norm/{leaf}"] = full_name(f"norm.{hf_leaf}")
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
            f"{PerLayerEmbedding.part_name}/{path}": full_name(name)
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
            names = full_name(f"layers.{{layer}}.{entry.names}")
            parameter = entry.parameter
            if parameter is not None:
                parameter = full_name(f"layers.{{layer}}.{parameter}")
            entries[f"{stack.path}/{path}"] = dataclasses.replace(
                entry, names=names, parameter=parameter, numbers=numbers
            )
    return ql.io.Names(entries, ignored=tuple(ignored))
