"""Random models in folders, and rows of tokens, for the tests of the PyTorch engine."""

import json

import numpy as np
import torch
import transformers

from qlora_jax.llm.models.tiny import save_tiny

IDS = np.random.default_rng(0).integers(3, 200, 80)
ROWS = [{"input_ids": IDS[i : 2 * i + 5].tolist()} for i in range(8)]
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 128}


def save_model(folder, config_class, **changes):
    """Writes a random model and the tokenizer of `save_tiny` to a folder."""
    save_tiny(folder)
    # The class for the model's type may add tokens of its own to the vocabulary.
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = config_class(vocab_size=vocab_size, **ids, **SIZES | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)
    model.save_pretrained(folder)
    return folder


def write_rows(folder):
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(data)


def torch_loss(model):
    """Returns the mean loss of all tokens except the first of each row."""
    losses = []
    for row in ROWS:
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        )
    return torch.cat(losses).mean().item()
