"""Models in PyTorch's code compute the same on a mesh as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
from engine_models import ROWS, save_model
from jax.sharding import set_mesh
from tolerances import assert_close
from transformers import GPTNeoXConfig

import qlora_jax as ql
from qlora_jax.llm import app
from qlora_jax.llm.app.adapters import lora_config_for
from qlora_jax.llm.app.open_model import open_model
from qlora_jax.llm.app.training.program import make_batch_placer, make_mesh, make_placer
from qlora_jax.llm.data import Row, eval_batches
from qlora_jax.llm.models.generation import generate
from qlora_jax.llm.train import decoder_loss


def test_a_mesh_has_the_loss_and_the_gradients_of_one_device(tmp_path):
    folder = save_model(
        tmp_path / "model", GPTNeoXConfig, num_hidden_layers=2, intermediate_size=96
    )
    model = open_model(str(folder), engine="torch")
    packing = model.packing_config("nf4", 32, False)
    adapters = lora_config_for(app.TrainConfig("m", "d", "o", rank=4), model, packing)
    base = model.read(dtype=jnp.float32, packing_config=packing, progress=False).base
    lora = ql.init(jax.random.key(0), base, adapters)[1]
    lora = jax.tree.map(lambda x: x + 0.02, lora)  # otherwise, B would be 0
    rows = []
    for row in ROWS:
        ids = np.array(row["input_ids"], np.int32)
        rows.append(Row(ids, np.where(np.arange(len(ids)) > 0, ids, -100), "rows"))
    [batch] = eval_batches(rows, batch_size=len(rows), max_length=16)
    torch_decoder = model.engine.make_model()
    loss = decoder_loss(torch_decoder)
    prompts, settings = [[5, 6, 7], [8, 9]], {"max_new_tokens": 3, "eos_ids": []}

    def mean_loss(lora, base, batch):
        total, count = loss(lora, base, batch, None)
        return total / count

    step = jax.jit(jax.value_and_grad(mean_loss))
    expected_loss, expected = step(lora, base, batch)
    variables = {"params": base, "lora": lora}
    expected_tokens = generate(torch_decoder, variables, prompts, **settings)
    mesh = make_mesh({"fsdp": 2, "tensor": 4}, jax.devices())
    base, lora = make_placer(model.engine, mesh, "device")(base, lora)
    # The contracted axis of the last kernel has three quantization blocks. Two devices
    # cannot split these equally, so both mesh axes split the outputs instead.
    specs = {
        path: tuple(q.codes.sharding.spec)
        for path, q in base.items()
        if ql.is_packed(q)
    }
    prefix = "gpt_neox.layers.0:2:1."
    assert specs[f"{prefix}attention.dense.weight"] == (None, "fsdp", "tensor")
    last = specs[f"{prefix}mlp.dense_4h_to_h.weight"]
    assert last == (None, None, ("tensor", "fsdp"))
    with set_mesh(mesh):
        split_loss, gradients = step(lora, base, make_batch_placer(mesh)(batch))
        variables = {"params": base, "lora": lora}
        tokens = generate(torch_decoder, variables, prompts, **settings)
    assert_close(np.asarray(split_loss), np.asarray(expected_loss))
    assert_close(jax.device_get(gradients), jax.device_get(expected))
    assert tokens.tolist() == expected_tokens.tolist()
