"""Runs a tiny random model of every causal language model of transformers.

    python tests/pytorch/sweep.py [KIND ...]
    python tests/pytorch/sweep.py --page

The first command appends rows to `docs/reports/torch_models.tsv`. The second one writes
`docs/torch_models.md` from them.

For each model type, it compares the logits of float weights with PyTorch's, and the
loss on packed weights with PyTorch's on the decoded weights.
"""

import argparse
import pathlib
import re
import signal
import traceback
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from tolerances import TERMS, rounding
from torch_helpers import (
    init,
    logits_of,
    loss_of,
    random_ids,
    torch_logits,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import qlora_jax as ql
from qlora_jax.torch.init import kernel_roles

DOCS = pathlib.Path(__file__).parents[2] / "docs"
ROWS = DOCS / "reports" / "torch_models.tsv"
LARGEST_ERROR = rounding(TERMS)
PAGE = """# PyTorch models that were tested

transformers has {kinds} types of causal language models. The sweep tried {tried} of
them, and {untried} were never tried. For {passed} types, the logits of float weights
and the loss on packed weights with adapters equal those of PyTorch, and the gradients
are finite.
The columns show the relative difference between the logits (Frobenius norm), the
relative difference between the losses, and the number of packed weights.
`tests/pytorch/sweep.py` runs the models and writes this page.
"""
FAILED = """
## Types that did not pass

"no model" means that the tiny model does not run in PyTorch either, because its type
needs other sizes or settings than the sweep chooses. The others did not pass in
`ql.torch`.

| model type | reason |
|---|---|
"""
KINDS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The value of each size of a tiny model, by the names that configs have for the size.
TINY = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], 128),
    **dict.fromkeys(["depth", "num_vision_layers", "vision_layers"], 2),
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embed_dim", "dim"], 64),
    **dict.fromkeys(["word_embed_proj_dim", "embedding_size", "width"], 64),
    **dict.fromkeys(["mamba_d_ssm", "lru_width", "attention_hidden_size"], 64),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"], 96),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size"], 96),
    **dict.fromkeys(["dense_intermediate_size", "intermediate_size_mlp"], 96),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers"], 2),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "num_heads", "n_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "n_head_kv", "num_kv_heads"], 2),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "index_n_heads"], 4),
    **dict.fromkeys(["head_dim", "d_head", "attention_head_dim", "mamba_d_head"], 16),
    **dict.fromkeys(["mamba_head_dim", "d_kv", "index_head_dim", "state_size"], 16),
    **dict.fromkeys(["mamba_d_state", "ssm_state_size", "time_step_rank"], 16),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 16),
    **dict.fromkeys(["linear_num_key_heads", "mamba_n_groups", "n_groups"], 2),
    "linear_num_value_heads": 4,
    "global_head_dim": 16,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_num_experts", "num_routed_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"], 2),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "n_group"], 1),
    **dict.fromkeys(["topk_group", "first_k_dense_replace"], 1),
    **dict.fromkeys(["moe_intermediate_size", "expert_hidden_size"], 32),
    **dict.fromkeys(
        ["shared_expert_intermediate_size", "shared_intermediate_size"], 32
    ),
    **dict.fromkeys(["moe_shared_expert_intermediate_size"], 32),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank"], 32),
    **dict.fromkeys(["qk_nope_head_dim", "v_head_dim"], 16),
    "qk_rope_head_dim": 8,
    **dict.fromkeys(["sliding_window", "attention_window_size", "local_window"], 6),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], 128),
    **dict.fromkeys(["pad_token_id"], 0),
    **dict.fromkeys(["bos_token_id", "decoder_start_token_id"], 1),
    **dict.fromkeys(["eos_token_id"], 2),
}
# Further settings that some model types need.
SPECIAL: dict[str, dict] = {
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "bamba": {"mamba_d_head": 32},
}


def tiny_settings(settings):
    """Returns tiny values for all sizes in a config, and in the configs inside it."""
    changes = {name: TINY[name] for name in settings if name in TINY}
    if "qk_rope_head_dim" in changes:  # multi-head latent attention
        changes |= {"num_key_value_heads": 4}
        changes |= {"head_dim": 8} if "head_dim" in changes else {}
    for name, value in settings.items():
        if name.endswith("_config") and isinstance(value, dict):
            inner = {"model_type": value["model_type"]} if "model_type" in value else {}
            changes[name] = inner | tiny_settings(value)
    return changes


def tiny_model(kind):
    """Returns a tiny random model of a type, in evaluation mode."""
    defaults = transformers.AutoConfig.for_model(kind)
    changes = tiny_settings(defaults.to_dict()) | SPECIAL.get(kind, {})
    config = type(defaults)(**changes)
    torch.manual_seed(0)
    options = {"attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **options).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # the noise is for weights that are zero, as in routers
                weight.mul_(2).add_(0.02 * torch.randn_like(weight))
    return model.eval()


def check(module, ids, expected):
    """Returns the error of the logits, that of the loss, and how many were packed.

    The logits are those of float weights, and the loss is that of packed weights.
    `expected` are PyTorch's logits.
    """
    model = ql.torch.wrap(module)
    params = ql.torch.params(model)
    apply = jax.jit(lambda params, ids: logits_of(model, {"params": params}, ids))
    logits = np.asarray(apply(params, jnp.array(ids)))
    float_error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    names = [n for n, _ in kernel_roles(module) if is_target(n, params)]
    model, base, lora = init(module, [re.escape(name) for name in names])

    def loss(lora, base, ids):
        return loss_of(model, {"params": base, "lora": lora}, ids)

    packed_loss, gradients = jax.jit(jax.value_and_grad(loss))(
        lora, base, jnp.array(ids)
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))
    merged = ql.merge(base, lora)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(torch.tensor(np.asarray(merged[name])))
    logits = torch.tensor(torch_logits(module, ids))[:, :-1]
    labels = torch.tensor(ids)[:, 1:]
    torch_loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten()
    )
    loss_error = abs(float(packed_loss) - torch_loss.item()) / torch_loss.item()
    return float(float_error), loss_error, len(names)


def is_target(name, params):
    is_head = re.search(r"embed|lm_head|wte|wpe|output_projection", name)
    return name in params and not is_head and min(params[name].shape[-2:]) > 4


def result_of(kind):
    """Runs a model type. Returns a word for the result, and further cells.

    The word is "ok", "differs", "fails", or "no model" if PyTorch fails.
    """
    failure = "no model"
    try:
        module, ids = tiny_model(kind), random_ids()
        expected = torch_logits(module, ids)
        failure = "fails"
        float_error, loss_error, count = check(module, ids, expected)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{pathlib.Path(frame.filename).name}:{frame.lineno}"
        reason = re.sub(r"\s+", " ", str(error))[:160]
        return failure, f"{type(error).__name__}: {reason} ({place})"
    word = "ok" if max(float_error, loss_error) < LARGEST_ERROR else "differs"
    return word, f"{float_error:.1e}", f"{loss_error:.1e}", str(count)


def read_rows():
    """Returns the newest row of each model type, by type."""
    lines = ROWS.read_text("utf-8").splitlines()
    return {line.partition("\t")[0]: line.split("\t")[1:] for line in lines}


def write_page():
    rows = sorted(read_rows().items())
    passed = [(kind, row) for kind, row in rows if row[0] == "ok"]
    counts = {"kinds": len(KINDS), "tried": len(rows), "passed": len(passed)}
    text = PAGE.format(**counts, untried=len({*KINDS} - dict(rows).keys()))
    text += "\n| model type | logits | loss | packed weights |\n|---|---|---|---|\n"
    for kind, (_, *numbers) in passed:
        text += f"| `{kind}` | {' | '.join(numbers)} |\n"
    text += FAILED
    for kind, (word, *details) in rows:
        if word != "ok":
            reason = " ".join([word, *details]).replace("|", "/").replace("`", "'")
            text += f"| `{kind}` | {reason} |\n"
    (DOCS / "torch_models.md").write_text(text, "utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS)
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--seconds", type=int, default=300, help="limit of a model")
    args = parser.parse_args()
    if args.page:
        return write_page()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGALRM, raise_timeout)
    for kind in args.kinds:
        signal.alarm(args.seconds)
        row = "\t".join([kind, *result_of(kind)])
        signal.alarm(0)
        print(row, flush=True)
        with ROWS.open("a", encoding="utf-8") as file:
            file.write(row + "\n")


def raise_timeout(*_):
    raise TimeoutError("took too long")


if __name__ == "__main__":
    main()
