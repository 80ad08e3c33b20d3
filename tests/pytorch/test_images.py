"""Models of text and images compute the same in JAX as in PyTorch and PEFT."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers import refusal
from image_models import IMAGE, image_inputs, image_model
from tolerances import assert_close
from torch_helpers import init, logits_of, loss_of, peft_loss_and_gradients

import qlora_jax as ql

LANGUAGE = r".*language_model\..*_proj\.weight"
VISION = r".*vision_tower\.encoder\.layers.*(q_proj|fc1)\.weight"


def test_loss_and_gradients_equal_peft():
    ql.torch.register_attention()
    module, (ids, inputs) = image_model(), image_inputs()
    tensors = {name: torch.tensor(x) for name, x in inputs.items()}
    module.set_attn_implementation("qlora_jax")
    model, base, lora = init(module, (LANGUAGE, VISION))
    assert sum("vision_tower" in name for name in lora) == 2 * 2

    def loss(lora, base, ids, inputs):
        variables = {"params": base, "lora": lora}
        return loss_of(model, variables, ids, **inputs)

    gradient = jax.jit(jax.value_and_grad(loss))
    stacked = [ql.torch.stack(model, tree) for tree in (lora, base)]
    loss, gradients = gradient(*stacked, jnp.array(ids), inputs)
    module.set_attn_implementation("eager")
    expected_loss, expected, merged = peft_loss_and_gradients(
        module, base, lora, ids, **tensors
    )
    assert not merged  # PEFT adapts all weights
    assert_close(np.asarray(loss), np.asarray(expected_loss))
    assert_close(ql.torch.unstack(gradients), expected)


def test_other_numbers_of_images_than_placeholders():
    ql.torch.register_attention()
    module, (ids, inputs) = image_model(), image_inputs()
    module.set_attn_implementation("qlora_jax")
    model = ql.torch.wrap(module)
    variables = {"params": ql.torch.params(model)}
    ids = np.where(ids == IMAGE, IMAGE + 20, ids)  # no placeholders
    refusal(
        lambda: logits_of(model, variables, jnp.array(ids), **inputs),
        "Image features and image tokens do not match",
    )
    # While JAX traces the model, these numbers are not known, so the output is NaN.
    apply = jax.jit(lambda v, ids, inputs: logits_of(model, v, ids, **inputs))
    assert np.isnan(apply(variables, jnp.array(ids), inputs)).all()
