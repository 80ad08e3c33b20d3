"""Models of transformers compute what they compute in PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import assert_close
from torch_helpers import (
    init,
    logits_of,
    loss_of,
    peft_loss_and_gradients,
    random_ids,
    random_model,
    torch_logits,
)

import qlora_jax as ql

PROJECTIONS = r".*_proj\.weight"
KINDS = {"llama": PROJECTIONS}


@pytest.mark.parametrize("kind", KINDS)
def test_float_logits_equal_pytorch(kind):
    module, ids = random_model(kind), random_ids()
    expected = torch_logits(module, ids)
    model = ql.torch.wrap(module)
    variables = {"params": ql.torch.params(model)}
    logits = jax.jit(lambda v, ids: logits_of(model, v, ids))(variables, jnp.array(ids))
    assert np.abs(expected).max() > 1
    assert_close(logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_on_packed_weights_equal_peft(kind):
    module, ids = random_model(kind), random_ids()
    model, base, lora = init(module, KINDS[kind])
    assert len(lora) >= 8

    @jax.jit
    def loss_and_gradients(lora, base, ids):
        def loss(lora):
            return loss_of(model, {"params": base, "lora": lora}, ids)

        return jax.value_and_grad(loss)(lora)

    loss, gradients = loss_and_gradients(lora, base, jnp.array(ids))
    expected_loss, expected = peft_loss_and_gradients(module, base, lora, ids)
    assert_close(np.asarray(loss), np.asarray(expected_loss))
    assert_close(gradients, expected)
