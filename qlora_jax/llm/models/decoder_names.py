"""Maps a decoder's parameters to Hugging Face tensor names."""

import dataclasses
import re

import qlora_jax as ql

from .config import DecoderConfig
from .groups import layer_stacks
from .layer import Layer
from .per_layer_input import PerLayerEmbedding


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
    if c.delta_rule is not None:
        # Layers of Qwen3.5 that predict further tokens are not part of the decoder.
        ignored.append(r"mtp\..*")
    if c.module != "model":  # the decoder is the text half of a larger model
        ignored.append(
            r"(model\.)?(vision_tower|multi_modal_projector|visual|embed_vision"
            r"|vision_model|vision_embedder|audio_tower|embed_audio)\..*"
        )
    if c.tie_embeddings:
        ignored.append(r"lm_head\.weight")
    else:
        entries["lm_head/kernel"] = "lm_head.weight"
    if c.per_layer_width:
        entries |= {
            f"{PerLayerEmbedding.part_name}/{path}": f"{c.module}.{name}"
            for path, name in PerLayerEmbedding.tensor_names(c).items()
        }
    # Files contain keys and values of layers that do not use them.
    without_kv = [str(i) for i, kind in enumerate(c.layers) if not kind.has_kv]
    if without_kv:
        layers = f"{re.escape(c.module)}\\.layers\\.({'|'.join(without_kv)})"
        ignored.append(rf"{layers}\.self_attn\.[kv]_(proj|norm)\..*")
    for stack in layer_stacks(c):
        numbers = {"layer": stack.layers}
        for path, x in Layer.tensor_names(c, stack.kinds[0]).items():
            entry = x if isinstance(x, ql.io.Entry) else ql.io.Entry(x)
            module = f"{c.module}.layers.{{layer}}"
            names, parameter = f"{module}.{entry.names}", entry.parameter
            if parameter is not None:
                parameter = f"{module}.{parameter}"
            entries[f"{stack.path}/{path}"] = dataclasses.replace(
                entry, names=names, parameter=parameter, numbers=numbers
            )
    return ql.io.Names(entries, ignored=tuple(ignored))
