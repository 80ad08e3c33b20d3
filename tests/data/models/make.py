"""Makes the golden files of the decoder with torch, transformers and gguf.

Run as `python make.py PATH/SmolLM2-135M-Instruct.Q4_1.gguf`. Versions used: torch 2.13,
transformers 5.24, tokenizers 0.23.
"""

import json
import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

FOLDER = pathlib.Path(__file__).parent
SIZES = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
SIZES |= dict(max_position_embeddings=128)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
SMALL = {
    "llama_tied": LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=True),
    "llama_untied": LlamaConfig(**SIZES, head_dim=8, tie_word_embeddings=False),
    "llama_biased_stretched": LlamaConfig(
        **SIZES, head_dim=8, attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
}
TEXTS = [
    "Hello, world! It's 12345.67 dollars; they'll pay 3rd-party fees.",
    "  leading spaces\n\nand newlines\t tabs   inside  ",
    "Naïve café — 東京 🙂 x² = 10⁻³",
    "def f(x):\n    return x**2  # comment",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "year 2024/12/31 at 23:59:59, 1,000,000 times",
]
QUESTION = "What is the capital of France?"
PROMPT = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


def small(name, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, param in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                param.add_(0.3 * torch.randn_like(param))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    with torch.no_grad():
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    model.save_pretrained(FOLDER / name, safe_serialization=True)
    (FOLDER / name / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(FOLDER / name / "golden.npz", tokens=tokens, logits=logits)


def real(path):
    path = pathlib.Path(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    tokens = torch.tensor([tokenizer(PROMPT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        logits = model(tokens).logits.numpy()
        out = model.generate(
            tokens, max_new_tokens=40, do_sample=False, eos_token_id=2, pad_token_id=2
        )
    new = out[0, tokens.shape[1] :].tolist()
    columns = np.arange(0, logits.shape[-1], 97)
    np.savez_compressed(
        FOLDER / "smollm2.npz", columns=columns, logits=logits[0][:, columns]
    )
    golden = {
        "prompt": PROMPT,
        "tokens": tokens[0].tolist(),
        "new_tokens": new,
        "new_text": tokenizer.decode(new, skip_special_tokens=True),
        "tokenizer": [
            {"text": t, "ids": tokenizer(t, add_special_tokens=False).input_ids}
            for t in TEXTS
        ],
    }
    (FOLDER / "smollm2.json").write_text(json.dumps(golden, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    for name, config in SMALL.items():
        small(name, config)
    real(sys.argv[1])
