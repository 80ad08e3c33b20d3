"""Wrapped modules compute the same on a mesh as PyTorch."""

import jax
import numpy as np
import torch
from jax.sharding import AxisType, NamedSharding, set_mesh
from jax.sharding import PartitionSpec as P
from tolerances import assert_close
from torch_helpers import adapter_gradients, init

import qlora_jax as ql

KERNELS = r"layers\..*\.linear\.weight"


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_mesh_has_the_loss_and_the_gradients_of_pytorch():
    torch.manual_seed(0)
    module = Net().eval()
    model, base, lora = init(module, KERNELS)
    x = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
    expected_loss, expected = adapter_gradients(
        module, base, lora, lambda: (module(torch.tensor(x)) ** 2).mean()
    )
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    stacked = [ql.torch.stack(model, tree) for tree in (base, lora)]
    rules = {KERNELS: P(None, "fsdp", None)}
    base, lora = ql.sharding.place(*stacked, mesh, rules, rows=["fsdp"])
    codes = base["layers.0:4:1.linear.weight"].codes
    assert codes.addressable_shards[0].data.size * 8 == codes.size

    def loss_of(lora, base, x):
        return (model.apply({"params": base, "lora": lora}, x) ** 2).mean()

    with set_mesh(mesh):
        batch = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        loss, gradients = jax.jit(jax.value_and_grad(loss_of))(lora, base, batch)
    assert_close(np.asarray(loss), np.float32(expected_loss))
    assert_close(ql.torch.unstack(jax.device_get(gradients)), expected)
