"""QLoRA in a training loop of your own: a few public names, JAX and Optax.

    python examples/make_data.py && python examples/get_model.py
    python examples/own_loop.py

It trains like `qlora-jax train`, without checkpoints, evaluation and output files.
`--tiny` takes a few steps on a random model.
"""

import argparse
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import make_data
import optax
from tqdm import tqdm

import qlora_jax as ql
from qlora_jax.llm.data import batches, open_tokenizer, read_dataset
from qlora_jax.llm.models.checkpoint import load, read_config
from qlora_jax.llm.models.decoder import Decoder, head_arguments
from qlora_jax.llm.models.decoder_names import decoder_names
from qlora_jax.llm.models.tiny import save_tiny


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    parser.add_argument("--data", default="data/words_to_json/train.jsonl")
    parser.add_argument("--out", default="runs/own_loop/adapter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="a random model, 4 steps")
    args = parser.parse_args(argv)
    if args.tiny:
        folder = pathlib.Path(tempfile.mkdtemp())
        args.model, args.data = save_tiny(folder / "model"), folder / "train.jsonl"
        make_data.write(args.data, make_data.make_splits(training=32)[0])
        args.steps = min(args.steps, 4)
    return args


def main(argv=None):
    args = parse_args(argv)
    path = ql.io.fetch(args.model)
    tokenizer, size = open_tokenizer(path), read_config(path).vocab_size
    dataset = read_dataset(args.data, tokenizer, vocab_size=size, max_length=512)
    train_batches = batches(
        dataset.train, batch_size=16, max_length=512, seed=0, packing=False
    )

    # The base in 4 bits, the adapters, and the model that is called with both.
    config, params = load(path, jnp.bfloat16)
    model = Decoder(config, dtype=jnp.bfloat16, remat=True)
    qlora = ql.QLoRAConfig(rank=16, targets=r"layers/.*_proj/kernel")
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    base, lora = ql.linen.init(
        jax.random.key(0), model, params, qlora, tokens, donate=True
    )
    model = ql.linen.wrap(model, scanned=model.scanned)

    def loss_fn(lora, base, batch):
        hidden = model.apply(
            {"params": base, "lora": lora},
            batch.ids,
            positions=batch.positions,
            segment_ids=batch.segment_ids,
            select=batch.select,
            return_hidden=True,
        )
        losses = ql.losses.chunked_cross_entropy(
            hidden, labels=batch.targets, **head_arguments(config, base, lora)
        )
        return jnp.sum(losses * batch.weights) / jnp.sum(batch.weights)

    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, args.steps // 10, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.99))
    opt_state = tx.init(lora)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(lora, opt_state, base, batch):
        loss, grads = jax.value_and_grad(loss_fn)(lora, base, batch)
        updates, opt_state = tx.update(grads, opt_state, lora)
        return optax.apply_updates(lora, updates), opt_state, loss

    bar = tqdm(range(args.steps), unit="step")
    for _, batch in zip(bar, train_batches, strict=False):
        lora, opt_state, loss = step(lora, opt_state, base, batch)
        bar.set_postfix_str(f"loss {float(loss):.4f}")
    ql.io.save_peft(args.out, base, lora, decoder_names(config))
    print(f"an adapter for PEFT: {args.out}")


if __name__ == "__main__":
    main()
