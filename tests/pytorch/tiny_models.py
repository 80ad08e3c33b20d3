"""Tiny random models of the causal language models of transformers."""

import math

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The sizes of a tiny model. For each value, these are the names of the sizes that have
# it, as in configs. The rows of the sweep have 12 tokens, so windows and indexers see
# only a part of them.
SIZES = {
    1: "n_shared_experts num_shared_experts n_group num_expert_group topk_group "
    "first_k_dense_replace num_dense_layers num_nextn_predict_layers num_mtp_layers "
    "conf_num_hidden_layers num_global_layers num_layers_per_stack "
    "encoder_hash_byte_group_nb_functions",
    2: "depth num_vision_layers vision_layers num_hidden_layers n_layer num_layers "
    "n_layers decoder_layers encoder_layers num_decoder_layers num_key_value_heads "
    "n_head_kv num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads "
    "num_global_key_value_heads mamba_n_groups n_groups num_experts_per_tok "
    "num_experts_per_token moe_topk moe_top_k moe_k top_k_experts hc_mult hc_count "
    "n_mamba_heads o_groups zero_expert_num index_topk_blocks num_codebooks "
    "centroid_intermediate_top_k",
    4: "num_attention_heads n_head num_heads n_heads swa_num_attention_heads "
    "decoder_attention_heads encoder_attention_heads attention_heads mamba_n_heads "
    "mamba_num_heads linear_num_value_heads linear_num_heads "
    "conf_num_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts num_routed_experts index_topk index_block_size split_ngram_parts "
    "local_attn_chunk_length lsh_attn_chunk_length",
    6: "sliding_window attention_window_size local_window window_size "
    "sliding_window_size",
    8: "qk_rope_head_dim mamba_chunk_size chunk_size keep_window_size d_rel "
    "attention_chunk_size num_centroids adapter_rank laurel_rank",
    # The scores of indexers are sums of ReLUs. With few heads, many scores are 0. Among
    # such equal scores, PyTorch and JAX choose different ones.
    16: "index_n_heads head_dim d_head attention_head_dim attention_head_size "
    "mamba_d_head mamba_head_dim d_kv index_head_dim state_size mamba_d_state "
    "ssm_state_size time_step_rank linear_key_head_dim linear_value_head_dim "
    "linear_head_dim global_head_dim hidden_size_per_layer_input qk_nope_head_dim "
    "v_head_dim swa_head_dim kv_channels rel_extent router_hidden_size "
    "query_pre_attn_scalar o_lora_rank hc_lowrank",
    32: "moe_intermediate_size expert_hidden_size shared_expert_intermediate_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size q_lora_rank "
    "kv_lora_rank expert_ffn_hidden_size shared_experts_intermediate_size "
    "pronunciation_embed_dim shape_embed_dim dim_model_base",
    64: "hidden_size n_embd d_model embed_dim dim emb_dim embedding_dim width "
    "word_embed_proj_dim embedding_size mamba_d_ssm lru_width attention_hidden_size "
    "hidden_size_global out_hidden_size vision_output_dim projector_input_dim "
    "projector_output_dim projector_hidden_size backbone_hidden_size mm_embed_dim "
    "output_proj_dims audio_embed_dim adapter_in_dim adapter_out_dim "
    "adapter_input_size text_hidden_size ext_pw_out_channel nemo_conv_channels "
    "depthwise_separable_out_channel",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size decoder_ffn_dim "
    "encoder_ffn_dim feed_forward_size dense_intermediate_size intermediate_size_mlp "
    "prefix_dense_intermediate_size dff d_inner dim_ff",
    128: "vocab_size vocab_size_per_layer_input max_position_embeddings n_positions "
    "n_ctx max_seq_len context_length pronunciation_vocab_size shape_vocab_size "
    "encoder_hash_byte_group_vocab ngram_vocab_size_base",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
TINY |= {"num_kv_shared_layers": 0, "pad_token_id": 0, "bos_token_id": 1}
TINY |= {"decoder_start_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# Further settings that some model types need.
SPECIAL: dict[str, dict] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_d_head": 32},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": ROPE | {"mrope_section": [2, 3, 3]}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_d_head": 32},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "phi4_multimodal": {"audio_config": {"num_blocks": 1}},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # Layers with locality-sensitive hashing draw random numbers, so they are left out.
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_embds": False,
    },
    "xmod": {"default_language": "en_XX"},
    # The attention of these two reads the hidden states and the embeddings, joined to
    # vectors of twice the size.
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# The configs of these types contain the configs of several models. Their language
# models take only the config of the decoder.
DECODER_CONFIGS = {
    "musicgen": "MusicgenDecoderConfig",
    "musicgen_melody": "MusicgenMelodyDecoderConfig",
}
# The largest number of parameters. If a model has more, its config has sizes that are
# missing in `SIZES`.
LARGEST = 30_000_000


def tiny_settings(settings):
    """Returns tiny values for all sizes in a config and in the configs inside it."""
    changes = {name: TINY[name] for name in settings if name in TINY}
    if "qk_rope_head_dim" in changes:  # multi-head latent attention
        changes |= {"num_key_value_heads": 4}
        changes |= {"head_dim": 8} if "head_dim" in changes else {}
    for name, value in settings.items():
        if name.endswith("_config") and isinstance(value, dict):
            inner = {"model_type": value["model_type"]} if "model_type" in value else {}
            changes[name] = inner | tiny_settings(value)
    return changes


def tiny_config(kind):
    """Returns the config of a tiny model of a type."""
    if kind in DECODER_CONFIGS:
        defaults = getattr(transformers, DECODER_CONFIGS[kind])()
    else:
        defaults = transformers.AutoConfig.for_model(kind)
    changes = merge(tiny_settings(defaults.to_dict()), SPECIAL.get(kind, {}))
    return type(defaults)(**changes, attn_implementation="eager")


def make_model(kind, config):
    if kind in DECODER_CONFIGS:
        return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(config)
    make = transformers.AutoModelForCausalLM.from_config
    return make(config, attn_implementation="eager")


def merge(settings, changes):
    """Returns settings with changes. Dicts in both are merged in the same way."""
    merged = dict(settings)
    for name, value in changes.items():
        is_inside = isinstance(value, dict) and isinstance(settings.get(name), dict)
        merged[name] = merge(settings[name], value) if is_inside else value
    return merged


def tiny_model(kind):
    """Returns a tiny random model of a type, in evaluation mode."""
    config = tiny_config(kind)
    with torch.device("meta"):  # shows the size of the model without using memory
        model = make_model(kind, config)
    shapes = {name: tuple(x.shape) for name, x in model.named_parameters()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if sum(sizes.values()) > LARGEST:
        name = max(sizes, key=sizes.__getitem__)
        raise ValueError(f"the model is too large: {name} is {shapes[name]}")
    torch.manual_seed(0)
    model = make_model(kind, config).float()
    with torch.no_grad():
        for weight in model.parameters():
            # Four times the usual spread reaches the regions where functions such as
            # softplus would overflow. The noise is for weights that are zero.
            if weight.ndim > 1:
                weight.mul_(4).add_(0.02 * torch.randn_like(weight))
    return model.eval()
