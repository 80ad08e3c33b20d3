"""The loss and gradients of distillation equal torch's `kl_div`, and TRL's loss."""

import warnings

import jax
import jax.numpy as jnp
import llama
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from stored import tensors_of
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm import data, train
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder import Decoder
from qlora_jax.llm.models.decoder_names import decoder_names

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

pytestmark = pytest.mark.filterwarnings("ignore")
TEMPERATURE = 2.0


def loss_there(student, teacher, ids, labels):
    """Returns the loss of the distillation recipes of transformers, and that of TRL.

    In transformers, it is `kl_div` of softened logits at the target tokens, times the
    squared temperature. TRL does not multiply it.
    """
    is_target = torch.tensor(labels[:, 1:] != -100)
    with torch.no_grad():
        teacher_logits = teacher(torch.tensor(ids)).logits[:, :-1][is_target]
    logits = student(torch.tensor(ids)).logits[:, :-1][is_target]
    divergence = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, dim=-1),
        F.softmax(teacher_logits / TEMPERATURE, dim=-1),
        reduction="batchmean",
    )
    trl_loss = GKDTrainer.generalized_jsd_loss(
        logits, teacher_logits, beta=0.0, temperature=TEMPERATURE
    )
    return divergence * TEMPERATURE**2, trl_loss.item()


def test_equals_transformers(tmp_path):
    student_folder = llama.save_float(tmp_path / "student")
    teacher_folder = llama.save_float(tmp_path / "teacher", hidden_size=64)
    ids, labels = llama.TOKENS.astype(np.int32), llama.TOKENS.astype(np.int32)
    labels = np.where(np.arange(ids.shape[1]) < [[4], [7]], -100, labels)
    # In torch, with random adapters.
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    student = peft.get_peft_model(llama.their_model(student_folder), config)
    llama.draw_adapters(student)
    student.save_pretrained(tmp_path / "adapter")
    teacher = llama.their_model(teacher_folder)
    expected, trl_loss = loss_there(student, teacher, ids, labels)
    expected.backward()
    # Here, with the same adapters.
    config, base = load(student_folder, progress=False)
    names = decoder_names(config)
    base, lora, _ = ql.io.load_peft(tmp_path / "adapter", base, names)
    teacher_config, teacher_params = load(teacher_folder, progress=False)
    loss = train.find_objective("distill").loss(
        ql.linen.wrap(Decoder(config)),
        teacher=ql.linen.wrap(Decoder(teacher_config)),
        temperature=TEMPERATURE,
    )
    rows = [data.Row(*row, "") for row in zip(ids, labels, strict=True)]
    [batch] = data.eval_batches(rows, batch_size=2, max_length=ids.shape[1])

    def mean_loss(lora):
        total, count = loss(lora, (base, teacher_params), batch, None)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(mean_loss))(lora)
    assert float(value) > 0.05 and jnp.isfinite(value)
    # Log-probabilities, which cancel in the divergence, are about `log(96)`.
    magnitude = TEMPERATURE**2 * np.log(96)
    assert_close(float(value), expected.item(), magnitude=magnitude)
    assert_close(float(value), TEMPERATURE**2 * trl_loss, magnitude=magnitude)
    ql.io.save_peft(tmp_path / "grads", base, grads, names)
    assert_close(tensors_of(tmp_path / "grads"), llama.gradients_of(student))
