"""QLoRA on a model of google-tunix, with its own trainer, and an adapter for PEFT.

    pip install '.[outside]' && python examples/tunix_finetune.py

A Tunix Llama with random weights takes the place of a loaded checkpoint. Its kernels
are packed in 4 bits, Tunix's `PeftTrainer` trains the adapters on counting sequences,
and they are saved in PEFT's format. It takes half a minute; `--tiny` takes a few steps.
"""

import argparse
import pathlib

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from name_tables import tunix_names
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer, utils

import qlora_jax as ql

VOCABULARY, LENGTH = 64, 16
TARGETS = r"layers/.*_proj/(w|kernel)|lm_head/w"


def make_model(dim: int, depth: int) -> nnx.Module:
    """A random model; `tunix.models.llama3.params` reads one from a folder."""
    config = llama3.ModelConfig(
        num_layers=depth,
        vocab_size=VOCABULARY,
        embed_dim=dim,
        hidden_dim=2 * dim,
        num_heads=4,
        head_dim=dim // 4,
        num_kv_heads=2,
        rope_theta=1_000_000,  # what Tunix 0.1.7 uses, whatever is set here
        norm_eps=1e-5,
        weight_tying=False,
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(0))


def batches(steps: int, seed: int, size: int = 16):
    """Yields sequences that count up by 1 to 5 from a random start."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        start, stride = rng.integers(0, VOCABULARY, size), rng.integers(1, 6, size)
        tokens = (start[:, None] + stride[:, None] * np.arange(LENGTH)) % VOCABULARY
        yield peft_trainer.TrainingInput(
            input_tokens=jnp.asarray(tokens, jnp.int32),
            input_mask=jnp.ones(tokens.shape, bool),
        )


def model_inputs(batch: peft_trainer.TrainingInput) -> dict:
    """Returns the arguments of Tunix's language model loss."""
    mask = jnp.asarray(batch.input_mask)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": mask,
        "positions": utils.build_positions_from_mask(mask),
        "attention_mask": utils.make_causal_attn_mask(mask),
    }


def train(dim: int, depth: int, steps: int) -> tuple[nnx.Module, float, float]:
    """Returns the wrapped model, and its loss on new sequences before and after."""
    config = ql.QLoRAConfig(rank=16, targets=TARGETS)
    model = make_model(dim, depth)
    model = ql.nnx.wrap(model, config, rngs=nnx.Rngs(1), donate=True)
    # The trainer finds the adapters, `nnx.LoRAParam`, and trains nothing else.
    trainer = peft_trainer.PeftTrainer(
        model,
        optax.adamw(1e-2),
        peft_trainer.TrainingConfig(eval_every_n_steps=steps, max_steps=steps),
    ).with_gen_model_input_fn(model_inputs)
    (held_out,) = batches(1, seed=1, size=64)

    def loss():
        return float(trainer.loss_fn(model, **model_inputs(held_out)))

    before = loss()
    trainer.train(batches(steps, seed=0))
    return model, before, loss()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a few steps")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=pathlib.Path, default="runs/tunix/adapter")
    args = parser.parse_args(argv)
    sizes = (64, 2, 8) if args.tiny else (128, 2, args.steps)
    model, before, after = train(*sizes)
    base, lora = ql.nnx.split(model)
    print(ql.summary(base, lora))
    print(f"loss {before:.3f} before, {after:.3f} after")
    ql.io.save_peft(args.out, base, lora, tunix_names("llama3"))
    print(f"an adapter for PEFT: {args.out}")


if __name__ == "__main__":
    main()
