"""Small random models of transformers, and their settings."""

from qlora_jax.llm.models.families import FAMILIES

# Without the wrappers of a vision part, whose text half is one of these.
TEXT_FAMILIES = sorted(
    kind for kind, family in FAMILIES.items() if not family.text_family
)
SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
SIZES |= dict(max_position_embeddings=128, pad_token_id=0)
SIZES |= dict(bos_token_id=1, eos_token_id=2)
HEADS = {"head_dim": 12}  # not the hidden size by the heads
THETA = {"rope_theta": 1e4}
LLAMA3 = THETA | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0}
YARN |= {"original_max_position_embeddings": 32}
LINEAR = THETA | {"rope_type": "linear", "factor": 2.0}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 2}
EXPERTS = OLMOE | {"moe_intermediate_size": 64}  # of Qwen3-MoE
DELTA = {"num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2}  # Qwen3.5
DELTA |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 6, "initializer_range": 0.2}


def longrope(pairs, original, **overrides):
    """Returns the settings of LongRoPE for `pairs` of rotated entries."""
    rope = THETA | {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
        "long_factor": [2.0 + 0.5 * i for i in range(pairs)],
    }
    rope |= overrides
    return {"rope_parameters": rope, "original_max_position_embeddings": original}


def random_model(kind, settings):
    """Returns a random model of transformers, whose norms and biases are random too.

    Its kernels are exact in F16.
    """
    import torch
    import transformers

    if kind.startswith("qwen3_5"):
        # transformers' rule for whole sequences subtracts large sums of logarithms. Its
        # rule for single tokens is more exact.
        models = transformers.models
        has_experts = kind.startswith("qwen3_5_moe")
        family = models.qwen3_5_moe if has_experts else models.qwen3_5
        modeling = getattr(family, f"modeling_{family.__name__.rpartition('.')[2]}")
        modeling.torch_chunk_gated_delta_rule = (
            modeling.torch_recurrent_gated_delta_rule
        )
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    randomize(model)
    return model


def randomize(model):
    """Adds random numbers to norms and biases, and rounds kernels to F16."""
    import torch

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # The scales are those of Gemma 4's router.
            if "norm" in key or key.endswith(("bias", "scale")):
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(parameter.half().float())
        for key, buffer in model.named_buffers():
            if key.endswith("layer_scalar"):
                buffer.add_(0.3 * torch.randn_like(buffer))
