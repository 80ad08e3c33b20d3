"""Compares a Llama of transformers in JAX with this library's own decoder.

Both train the same packed weights with the same adapters. Prints the temporaries of the
compiled step, the time of tracing and compiling, and the median time of a step.

    python benchmarks/torch_layers.py --layers 16 --tokens 256
"""

import argparse
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder


def mean_loss(logits, ids):
    log_probs = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_probs, ids[:, 1:, None], -1).mean()


def decoder_case(module, config):
    """Returns the loss of our decoder, and its trees."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        decoder_config, params = load(folder, progress=False)
    model = ql.linen.wrap(Decoder(decoder_config, remat=True))
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    base, lora = ql.linen.init(jax.random.key(0), model, params, config, ids)

    def loss(lora, base, ids):
        return mean_loss(model.apply({"params": base, "lora": lora}, ids), ids)

    return loss, lora, base


def torch_case(module, config):
    """Returns the loss of the PyTorch module with stacked layers, and its trees."""
    model = ql.torch.wrap(module)
    params = ql.torch.stack(model, ql.torch.params(model))
    base, lora = ql.torch.init(jax.random.key(0), model, params, config)

    def loss(lora, base, ids):
        output = model.apply(
            {"params": base, "lora": lora}, input_ids=ids, use_cache=False
        )
        return mean_loss(output["logits"], ids)

    return loss, lora, base


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    ql.torch.register_attention()
    sizes = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 128,
    )
    torch.manual_seed(0)
    module = transformers.AutoModelForCausalLM.from_config(
        sizes, attn_implementation="qlora_jax"
    ).eval()
    ids = np.random.default_rng(0).integers(3, 1000, (args.rows, args.tokens))
    ids = jnp.asarray(ids, jnp.int32)
    kernels = ql.QLoRAConfig(rank=8, exclude=".*(embed|lm_head|head).*")
    weights = ql.QLoRAConfig(rank=8, targets=r".*_proj\.weight")
    cases = {
        "decoder": decoder_case(module, kernels),
        "torch": torch_case(module, weights),
    }
    steps = {}
    for name, (loss, lora, base) in cases.items():
        start = time.perf_counter()
        lowered = jax.jit(jax.value_and_grad(loss)).lower(lora, base, ids)
        traced = time.perf_counter()
        steps[name] = lowered.compile()
        memory = steps[name].memory_analysis().temp_size_in_bytes
        print(
            f"{name}: {memory / 1e6:.1f} MB of temporaries, {traced - start:.1f} s to "
            f"trace, {time.perf_counter() - traced:.1f} s to compile",
            flush=True,
        )
    seconds = {name: [] for name in cases}
    for _ in range(args.steps):  # alternating, so that both see the same machine
        for name, (_, lora, base) in cases.items():
            start = time.perf_counter()
            loss, _ = jax.block_until_ready(steps[name](lora, base, ids))
            seconds[name].append(time.perf_counter() - start)
            print(f"{name}: loss {loss:.5f}", flush=True)
    for name, times in seconds.items():
        print(f"{name}: {np.median(times):.2f} s for a step, at least {min(times):.2f}")


if __name__ == "__main__":
    main()
