"""An adapter trained here is served there, and the reverse, on a 4-bit base.

"There" is transformers with bitsandbytes and PEFT on the CPU.
"""

import functools

import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import pytest
import torch
from peft import LoraConfig, get_peft_model
from stored import tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINING = np.random.default_rng(1).integers(0, 96, (4, 16))
STEPS, RATE = 20, 1e-2


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return llama.save_float(tmp_path_factory.mktemp("float"))


def loss_here(config, base, lora, tokens):
    model = ql.linen.wrap(Decoder(config))
    logits = model.apply({"params": base, "lora": lora}, jnp.asarray(tokens))
    return optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1], jnp.asarray(tokens[:, 1:])
    ).mean()


def train_here(config, base, lora):
    tx = optax.adamw(RATE)
    loss = functools.partial(loss_here, config)

    @jax.jit
    def step(lora, state):
        value, grads = jax.value_and_grad(loss, argnums=1)(base, lora, TRAINING)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    state, losses = tx.init(lora), []
    for _ in range(STEPS):
        lora, state, value = step(lora, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0]
    return lora


def train_there(model):
    optimizer = torch.optim.AdamW(
        [x for x in model.parameters() if x.requires_grad], lr=RATE
    )
    tokens, losses = torch.tensor(TRAINING), []
    for _ in range(STEPS):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def assert_equal_models(config, base, lora, model, folder):
    """Compares the logits, and the gradients of each A and B."""
    tokens = torch.tensor(llama.TOKENS)
    output = model(tokens, labels=tokens)
    theirs = output.logits.detach().numpy()
    assert theirs.std() > 0.5
    ours = llama.our_logits(config, base, lora)
    assert_close(ours, theirs)
    bare = llama.our_logits(config, base, None)
    assert np.abs(bare - theirs).max() > 0.1

    model.zero_grad()
    output.loss.backward()
    loss = functools.partial(loss_here, config)
    grads = jax.jit(jax.grad(loss, argnums=1))(base, lora, llama.TOKENS)
    ql.io.save_peft(folder / "gradients", base, grads, decoder_names(config))
    gradients = tensors_of(folder / "gradients")
    assert len(gradients) == 2 * 7 * config.num_layers
    assert_close(gradients, llama.gradients_of(model))


def test_trained_here_is_served_there(floats, tmp_path):
    config, params = load(floats, progress=False)
    settings = ql.QLoRAConfig(rank=8, alpha=16, targets=llama.PACKED)
    base, lora = ql.init(jax.random.key(0), params, settings)
    lora, names = train_here(config, base, lora), decoder_names(config)
    ql.io.save_bitsandbytes(tmp_path / "base", base, names, floats, progress=False)
    ql.io.save_peft(tmp_path / "adapter", base, lora, names)
    adapter = tmp_path / "adapter"
    model = llama.their_model(tmp_path / "base", adapter, is_trainable=True)
    assert_equal_models(config, base, lora, model, tmp_path)


def test_trained_there_is_served_here(floats, tmp_path):
    llama.save_4bit(tmp_path / "base", floats)
    model = llama.their_model(tmp_path / "base")
    linear = [path.rpartition("/")[2] for path in llama.LINEAR]
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=linear
    )
    model = get_peft_model(model, settings)
    train_there(model)
    model.save_pretrained(tmp_path / "adapter")
    config, base = load(tmp_path / "base", progress=False)
    names = decoder_names(config)
    base, lora, _ = ql.io.load_peft(tmp_path / "adapter", base, names)
    assert_equal_models(config, base, lora, model, tmp_path)
