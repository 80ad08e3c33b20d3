"""Wrapped modules are pure functions, and do not change their modules."""

import copy
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import refusal
from tolerances import assert_close
from torch_helpers import (
    adapter_gradients,
    init,
    logits_of,
    random_ids,
    random_model,
    torch_logits,
)

import qlora_jax as ql


class Net(torch.nn.Module):
    """A module with tied weights, a buffer, batch normalization and dropout."""

    def __init__(self, rate=0.5):
        super().__init__()
        self.table = torch.nn.Embedding(48, 64)
        self.up = torch.nn.Linear(64, 32)
        self.norm = torch.nn.BatchNorm1d(32)
        self.dropout = torch.nn.Dropout(rate)
        self.down = torch.nn.Linear(32, 64)
        self.head = torch.nn.Linear(64, 48, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.arange(64.0), persistent=False)

    def forward(self, ids):
        x = self.table(ids) + self.shift
        x = self.norm(torch.relu(self.up(x)).flatten(0, -2)).unflatten(0, ids.shape)
        return {"logits": self.head(self.down(self.dropout(x)))}


IDS = np.arange(24).reshape(2, 12)
ARRAYS = jnp.array(IDS)


def make_net(**settings):
    torch.manual_seed(0)
    return Net(**settings).eval()


def output_in_pytorch(module, base):
    """Returns PyTorch's output with the decoded weights of a base tree."""
    module = copy.deepcopy(module)
    state = {name: torch.tensor(np.array(x)) for name, x in ql.dequantize(base).items()}
    state["head.weight"] = state["table.weight"]
    state.pop("shift", None)
    module.load_state_dict(state)
    with torch.no_grad():
        return module(torch.tensor(IDS))["logits"].numpy()


@pytest.mark.parametrize("targets", [r"(up|down)\.weight", r".*(table|up)\.weight"])
def test_tied_weights_biases_and_buffers(targets):
    net = make_net()
    model, base, lora = init(net, targets)
    assert "head.weight" not in base and "shift" in base
    logits = jax.jit(model.apply)({"params": base}, ARRAYS)["logits"]
    assert_close(logits, output_in_pytorch(net, base))
    logits = model.apply({"params": base, "lora": lora}, ARRAYS)["logits"]
    assert_close(logits, output_in_pytorch(net, ql.merge(base, lora)))
    combined = model.apply({"params": ql.combine(base, lora)}, ARRAYS)["logits"]
    np.testing.assert_array_equal(combined, logits)


def test_biases_and_rows_that_are_trained_in_full():
    net = make_net()
    settings = {"trainable": r".*bias", "trainable_rows": {r"table\.weight": [1, 5]}}
    model, base, lora = init(net, r"up\.weight", **settings)
    assert isinstance(lora["up.bias"], ql.Trained)
    logits = model.apply({"params": base, "lora": lora}, ARRAYS)["logits"]
    assert_close(logits, output_in_pytorch(net, ql.merge(base, lora)))


def test_a_back_end_computes_all_products():
    """This includes the products of linear layers and of a mixture of experts."""
    net = make_net()
    _, base, _ = init(net, r"(up|down)\.weight")
    with pytest.raises(ValueError, match="`backend` must be one of"):
        ql.torch.wrap(net, backend="cuda").apply({"params": base}, ARRAYS)
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    mixture = random_model("qwen3_moe", **settings)
    mixture.set_experts_implementation("grouped_mm")
    _, expert_base, _ = init(mixture, r".*experts\.gate_up_proj")
    # The kernel for TPUs does not run on the CPU of this process.
    errors = ValueError, NotImplementedError
    message = "Only interpret mode|`pallas_tpu_v5e` does not support"
    with pytest.raises(errors, match=message):
        on_tpu = ql.torch.wrap(net, backend="pallas_tpu_v5e")
        on_tpu.apply({"params": base}, ARRAYS)
    with pytest.raises(errors, match=message):
        on_tpu = ql.torch.wrap(mixture, backend="pallas_tpu_v5e")
        logits_of(on_tpu, {"params": expert_base}, random_ids())


def test_the_module_does_not_change():
    net = make_net().train()
    before = copy.deepcopy(net.state_dict())
    model, base, lora = init(net.eval(), r"(up|down)\.weight")
    net.train()  # has no effect on `model`, which was wrapped in evaluation mode
    model.apply({"params": base, "lora": lora}, ARRAYS)
    assert all(module.training for module in net.modules())
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert net.head.weight is net.table.weight


def test_a_failed_call_leaves_the_module_as_it_was():
    layers = Layers(lambda x, layer, index: layer(x) + x)
    model, base, _ = init(layers, r".*weight")
    stacked = ql.torch.stack(model, base)
    refusal(
        lambda: model.apply({"params": stacked}, jnp.ones((2, 64))),
        "'layers' cannot be scanned",
        "not stacked",
    )
    assert all("forward" not in vars(layer) for layer in layers.layers)
    x = jnp.ones((2, 64))
    expected = layers(torch.ones(2, 64)).detach().numpy()
    assert_close(model.apply({"params": ql.torch.params(layers)}, x), expected)


class Layers(torch.nn.Module):
    """A module with equal layers, each of which `step(x, layer, index)` calls."""

    def __init__(self, step):
        super().__init__()
        torch.manual_seed(0)
        layers = [torch.nn.Linear(64, 64) for _ in range(3)]
        self.layers = torch.nn.ModuleList(layers)
        self.step = step

    def forward(self, x):
        for index, layer in enumerate(self.layers):
            x = self.step(x, layer, index)
        return x


class Scaled(torch.nn.Linear):
    """A layer whose output depends on its index, and is the same for every fourth."""

    def forward(self, x):
        return super().forward(x) / (self.layer_idx % 4 + 1)


@pytest.mark.parametrize("count", [3, 5])  # the last layer differs, or is the same
def test_layers_that_depend_on_their_index_cannot_be_scanned(count):
    module = Layers(lambda x, layer, index: layer(x))
    module.layers = torch.nn.ModuleList(Scaled(64, 64) for _ in range(count))
    for index, layer in enumerate(module.layers):
        layer.layer_idx = index
    model = ql.torch.wrap(module)
    params = ql.torch.params(model)
    x = jnp.ones((2, 64))
    expected = module(torch.ones(2, 64)).detach().numpy()
    assert_close(model.apply({"params": params}, x), expected)
    stacked = ql.torch.stack(model, params)
    refusal(lambda: model.apply({"params": stacked}, x), "[0, 1] compute differently")


@pytest.mark.parametrize("last", ["nothing", "other", "linear"])
@pytest.mark.parametrize("num_empty", [1, 2])
def test_runs_that_begin_with_a_layer_without_parameters(num_empty, last):
    module = Layers(lambda x, layer, index: layer(x))
    classes = [torch.nn.ReLU, torch.nn.Tanh][:num_empty]
    layers = []
    for _ in range(2):
        layers += [*(cls() for cls in classes), torch.nn.Linear(64, 64)]
    others = {"other": torch.nn.Sigmoid(), "linear": torch.nn.Linear(64, 8)}
    layers += [others[last]] if last in others else []
    module.layers = torch.nn.ModuleList(layers)
    params = ql.torch.stack(module, ql.torch.params(module))
    name = {1: "layers.1:4:2.weight", 2: "layers.2:6:3.weight"}[num_empty]
    assert params[name].shape == (2, 64, 64)
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    output = ql.torch.wrap(module).apply({"params": params}, x)
    assert_close(output, module(torch.tensor(x)).detach().numpy())


class LayerList(torch.nn.ModuleList):
    """A list of layers that is a model."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def test_a_module_that_is_a_list_is_not_stacked():
    module = LayerList(torch.nn.Linear(64, 64) for _ in range(2))
    params = ql.torch.params(module)
    assert ql.torch.stack(module, params).keys() == params.keys()


class Reads(Layers):
    """A module that also calls `read(x, weight)` with the weight of a layer."""

    def __init__(self, read):
        super().__init__(lambda x, layer, index: layer(x))
        self.read = read

    def forward(self, x):
        return self.read(super().forward(x), self.layers[0].weight)


@pytest.mark.parametrize(
    "read",
    [
        lambda x, weight: x @ weight,
        lambda x, weight: x * float(weight[0, 0]),
        lambda x, weight: x + weight.sum(),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_weights_of_stacked_layers_cannot_be_read_elsewhere(read, is_packed):
    """The weights that the module itself has are not those of the call."""
    model, base, _ = init(Reads(read), r".*weight")
    base = base if is_packed else ql.dequantize(base)
    stacked = ql.torch.stack(model, base)
    refusal(
        lambda: model.apply({"params": stacked}, jnp.ones((2, 64))),
        "'layers' cannot be scanned: a weight of one is read by",
    )


def test_types_of_the_weights_of_stacked_layers_can_be_read():
    def read(x, weight):
        assert weight.is_floating_point()
        assert weight.shape == (64, 64)
        return x.to(weight.dtype)

    module = Reads(read)
    stacked = ql.torch.stack(module, ql.torch.params(module))
    output = ql.torch.wrap(module).apply({"params": stacked}, jnp.ones((2, 64)))
    assert_close(output, module(torch.ones(2, 64)).detach().numpy())


class InList(torch.nn.Linear):
    def forward(self, x):
        return [super().forward(x)]


def test_scanned_layers_cannot_return_lists():
    module = Layers(lambda x, layer, index: layer(x)[0])
    module.layers = torch.nn.ModuleList(InList(64, 64) for _ in range(2))
    params = ql.torch.params(module)
    model, x = ql.torch.wrap(module), jnp.ones((2, 64))
    expected = module(torch.ones(2, 64)).detach().numpy()
    assert_close(model.apply({"params": params}, x), expected)
    stacked = ql.torch.stack(module, params)
    refusal(lambda: model.apply({"params": stacked}, x), "Got list", "not stacked")


class Twice(torch.nn.Linear):
    def forward(self, x):
        return torch.cat([x, x], -1) + self.bias[0]


@pytest.mark.parametrize(
    "layer_class, dtype, change",
    [
        (torch.nn.Linear, "bfloat16", "bfloat16[2,64], but is float32[2,64]"),
        (Twice, "float32", "float32[2,64], but is float32[2,128]"),
    ],
)
def test_scanned_layers_cannot_change_the_type_of_hidden_states(
    layer_class, dtype, change
):
    module = Layers(lambda x, layer, index: layer(x))
    module.layers = torch.nn.ModuleList(layer_class(64, 64) for _ in range(2))
    stacked = ql.torch.stack(module, ql.torch.params(module))
    x = jnp.ones((2, 64), dtype)
    model = ql.torch.wrap(module)
    refusal(lambda: model.apply({"params": stacked}, x), "cannot be scanned", change)


class ByName(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x)


def test_scanned_layers_must_get_hidden_states():
    module = Layers(lambda x, layer, index: layer(x=x))
    module.layers = torch.nn.ModuleList(ByName(64, 64) for _ in range(2))
    stacked = ql.torch.stack(module, ql.torch.params(module))
    x = jnp.ones((2, 64))
    refusal(
        lambda: ql.torch.wrap(module).apply({"params": stacked}, x),
        "must get their hidden states as the first argument",
    )


def shared_layers():
    layer = torch.nn.Linear(64, 64)
    return [layer, torch.nn.Linear(64, 64), layer]


def shared_activations():
    activation = torch.nn.ReLU()
    return [torch.nn.Linear(64, 64), activation, torch.nn.Linear(64, 64), activation]


def tied_layers():
    layers = [torch.nn.Linear(64, 64) for _ in range(3)]
    layers[2].weight = layers[0].weight
    return layers


@pytest.mark.parametrize(
    "make_layers", [shared_layers, shared_activations, tied_layers]
)
def test_layers_that_share_modules_or_tensors_are_not_stacked(make_layers):
    module = Layers(lambda x, layer, index: layer(x))
    module.layers = torch.nn.ModuleList(make_layers())
    params = ql.torch.params(module)
    if make_layers is not tied_layers:
        assert ql.torch.stack(module, params).keys() == params.keys()
    output = ql.torch.wrap(module).apply({"params": params}, jnp.ones((2, 64)))
    assert_close(output, module(torch.ones(2, 64)).detach().numpy())


def test_numpy_arrays_are_stacked():
    module = Layers(lambda x, layer, index: layer(x))
    module.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
    params = jax.tree.map(np.asarray, ql.torch.params(ql.torch.wrap(module)))
    stacked = ql.torch.stack(module, params)
    expected = [layer.weight.detach().numpy() for layer in module.layers]
    np.testing.assert_array_equal(stacked["layers.0:2:1.weight"], np.stack(expected))


class Gain(torch.nn.Linear):
    def forward(self, x, gain):
        return super().forward(x) * gain


def test_arguments_that_differ_between_layers_are_scanned_too():
    gains = torch.arange(1.0, 4.0)
    module = Layers(lambda x, layer, index: layer(x, module.gains[index]))
    module.register_buffer("gains", gains)
    module.layers = torch.nn.ModuleList(Gain(64, 64) for _ in range(3))
    model = ql.torch.wrap(module)
    stacked = ql.torch.stack(model, ql.torch.params(model))
    assert {*stacked} == {"gains", "layers.0:3:1.weight", "layers.0:3:1.bias"}
    expected = module(torch.ones(2, 64)).detach().numpy()
    assert_close(model.apply({"params": stacked}, jnp.ones((2, 64))), expected)


def test_layers_that_are_packed_differently_cannot_be_stacked():
    model, base, lora = init(
        Layers(lambda x, layer, index: layer(x)), r"layers\.[01]\.weight"
    )
    for tree in (base, lora):
        refusal(lambda tree=tree: ql.torch.stack(model, tree), "layers.0:3:1.weight")


def test_dropout_needs_a_key_and_training_mode():
    net = make_net()
    net.dropout.train()  # batch normalization stays in evaluation mode
    model, base, lora = init(net, r"(up|down)\.weight", dropout=0.5)
    variables = {"params": base, "lora": lora}
    refusal(lambda: model.apply(variables, ARRAYS), "`dropout_key` must be a key")
    apply = jax.jit(lambda v, key: model.apply(v, ARRAYS, dropout_key=key)["logits"])
    keys = jax.random.split(jax.random.key(0), 2)
    first, again, second = (apply(variables, keys[i]) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    evaluated = ql.torch.wrap(net.eval())
    refusal(
        lambda: evaluated.apply(variables, ARRAYS, dropout_key=keys[0]),
        "evaluation mode",
    )


def test_the_mean_over_dropout_is_the_output_without_it():
    # Everything after each dropout is linear, so the expected output with dropout is
    # exactly the output without dropout.
    net = make_net()
    net.dropout.train()
    model, base, lora = init(net, r"down\.weight", dropout=0.5)
    variables = {"params": base, "lora": lora}

    def logits(key):
        return model.apply(variables, ARRAYS[:1, :2], dropout_key=key)["logits"]

    draws = jax.lax.map(jax.jit(logits), jax.random.split(jax.random.key(0), 4000))
    expected = ql.torch.wrap(net.eval()).apply(variables, ARRAYS[:1, :2])["logits"]
    spread = np.std(draws, axis=0) / np.sqrt(len(draws))  # the error of a mean
    deviation = (np.mean(draws, axis=0) - expected) / spread
    assert np.abs(deviation).max() < 5
    assert spread.min() > 0


def assert_equal_to_pytorch(loss, gradients, module, base, lora, x):
    """Compares the mean squared output for x, and its gradients, with PyTorch's."""
    expected_loss, expected = adapter_gradients(
        module, base, lora, lambda: (module(torch.tensor(x)) ** 2).mean()
    )
    assert_close(np.asarray(loss), np.float32(expected_loss))
    assert_close(gradients, expected)


def test_no_grad_in_the_module_stops_gradients_as_in_pytorch():
    class Refined(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(64, 64)
            self.step = torch.nn.Linear(64, 64)

        def forward(self, x):
            x = self.first(x)
            with torch.no_grad():
                guess = torch.tanh(self.step(x)).view(-1, 64)
            return x + torch.tanh(self.step(guess))

    torch.manual_seed(0)
    module = Refined().eval()
    model, base, lora = init(module, r".*\.weight")
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)

    def compute_loss(lora):
        return (model.apply({"params": base, "lora": lora}, x) ** 2).mean()

    with torch.no_grad():  # has no effect around `apply`
        loss, gradients = jax.value_and_grad(compute_loss)(lora)
    assert_equal_to_pytorch(loss, gradients, module, base, lora, x)


class Round(torch.autograd.Function):
    """Rounds to multiples of `size`, and passes gradients unless inputs are large."""

    @staticmethod
    def forward(ctx, x, size):
        ctx.save_for_backward(x)
        ctx.limit = 3 * size
        return torch.round(x / size) * size

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() < ctx.limit), None


class Scale(torch.autograd.Function):
    """Multiplies by rows of a table, and doubles the gradient of x."""

    @staticmethod
    def forward(x, table, index, scale=0.5):
        return x * table[index] * scale, x.sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, table, ctx.index, ctx.scale = inputs
        ctx.save_for_backward(table)

    @staticmethod
    def backward(ctx, gradient, of_sum):
        (table,) = ctx.saved_tensors
        of_x = 2 * gradient * table[ctx.index] * ctx.scale + of_sum
        return of_x, None, None, None


@pytest.mark.parametrize("is_compiled", [False, True])
def test_autograd_functions_have_their_own_backward_pass(is_compiled):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(64, 64)
            self.table = torch.nn.Linear(64, 8, bias=False)
            self.last = torch.nn.Linear(64, 64)

        def forward(self, x):
            x = Round.apply(self.first(x), 0.25)
            index = torch.arange(len(x), device=x.device) % 8
            x, total = Scale.apply(x, self.table.weight, index)
            return self.last(x) + torch.tanh(total)

    torch.manual_seed(0)
    module = Net().eval()
    model, base, lora = init(module, r"(first|last)\.weight")
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)

    def compute_loss(lora):
        return (model.apply({"params": base, "lora": lora}, x) ** 2).mean()

    if is_compiled:
        compute_loss = jax.jit(jax.checkpoint(compute_loss))
    loss, gradients = jax.value_and_grad(compute_loss)(lora)
    assert_equal_to_pytorch(loss, gradients, module, base, lora, x)
    assert all(np.linalg.norm(g) > 0 for g in jax.tree.leaves(gradients))


def test_changes_of_buffers_are_refused():
    model = ql.torch.wrap(make_net(rate=0.0).train())
    variables = {"params": ql.torch.params(model)}
    refusal(
        lambda: model.apply(variables, ARRAYS, dropout_key=jax.random.key(0)),
        "norm.num_batches_tracked",
    )


class Counter(torch.nn.Linear):
    """A layer that adds a buffer, which grows in each call, to its output."""

    def __init__(self, is_in_place):
        super().__init__(64, 64)
        self.register_buffer("calls", torch.zeros(1))
        self.is_in_place = is_in_place

    def forward(self, x):
        if self.is_in_place:
            self.calls.add_(1)
        else:
            self.calls = self.calls + 1
        return super().forward(x) + self.calls


@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("is_in_place", [False, True])
def test_changes_of_the_buffers_of_layers_are_refused(is_in_place, is_stacked):
    module = Layers(lambda x, layer, index: layer(x))
    module.layers = torch.nn.ModuleList(Counter(is_in_place) for _ in range(3))
    params = ql.torch.params(module)
    params = ql.torch.stack(module, params) if is_stacked else params
    refusal(
        lambda: ql.torch.wrap(module).apply({"params": params}, jnp.ones((2, 64))),
        "must not change its buffers",
        "layers.0:3:1.calls" if is_stacked else "layers.2.calls",
    )


def test_updates_of_running_statistics_are_refused():
    layer = torch.nn.InstanceNorm1d(8, track_running_stats=True).train()
    params = ql.torch.params(layer)
    x = jnp.ones((2, 8, 5))
    refusal(
        lambda: ql.torch.wrap(layer).apply({"params": params}, x),
        "running_mean",
        "running_var",
    )
    output = ql.torch.wrap(layer.eval()).apply({"params": params}, x)
    assert_close(output, layer(torch.ones(2, 8, 5)).detach().numpy())


class Weight(torch.nn.Module):
    """A module with a square weight, which `compute(x, weight)` uses."""

    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(64, 64))
        self.compute = compute

    def forward(self, x):
        return self.compute(x, self.weight)


def double(x, weight):
    with torch.no_grad():
        weight.mul_(2)
    return x @ weight


def set_data(x, weight):
    weight.data = weight.data * 2
    return x @ weight


def rectify(x, weight):
    torch.nn.functional.relu(weight, inplace=True)
    return x @ weight


def write_product(x, weight):
    torch.mul(weight, 2, out=weight)
    return x @ weight


def change_view(x, weight):
    weight[0].add_(1)
    return x @ weight


def set_row(x, weight):
    weight[0] = 1
    return x @ weight


def change_data(x, weight):
    weight.data.add_(1)
    return x @ weight


def change_data_without_gradients(x, weight):
    with torch.no_grad():
        weight.data.add_(1)
    return x @ weight


def change_detached(x, weight):
    weight.detach().add_(1)
    return x @ weight


def change_row_of_detached(x, weight):
    torch.detach(weight)[0].add_(1)
    return x @ weight


def set_data_to_a_view(x, weight):
    weight.data = weight.t()
    return x @ weight


@pytest.mark.parametrize(
    "compute",
    [
        change_detached,
        change_row_of_detached,
        set_data_to_a_view,
        double,
        set_data,
        rectify,
        write_product,
        change_view,
        set_row,
        change_data,
        change_data_without_gradients,
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_changes_of_weights_in_place_are_refused(compute, is_packed):
    module = Weight(compute)
    params = ql.torch.params(module)
    base = {"weight": ql.quantize(params["weight"])} if is_packed else params
    refusal(
        lambda: ql.torch.wrap(module).apply({"params": base}, jnp.ones((2, 64))),
        "in place" if is_packed else "['weight']",
    )


def test_the_sum_of_a_packed_weight_and_a_product():
    module = Weight(lambda x, weight: torch.addmm(weight, x, weight))
    base = {"weight": ql.quantize(ql.torch.params(module)["weight"])}
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    weight = np.asarray(ql.dequantize(base["weight"]))
    output = ql.torch.wrap(module).apply({"params": base}, x)
    assert_close(output, weight + x @ weight)


def test_copies_with_arguments_by_name():
    module = Weight(lambda x, weight: x.new_zeros(2, 64).copy_(other=x[1:3]))
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    model = ql.torch.wrap(module)
    assert_close(model.apply({"params": ql.torch.params(module)}, x), x[1:3])


def test_tuples_of_pytorch_are_returned_inside_jit():
    module = Weight(lambda x, weight: (torch.max(x, dim=1), x.shape))
    x = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    apply = jax.jit(ql.torch.wrap(module).apply)
    (values, indices), shape = apply({"params": ql.torch.params(module)}, x)
    np.testing.assert_array_equal(values, x.max(1))
    np.testing.assert_array_equal(indices, x.argmax(1))
    assert shape == (4, 64)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, weight: torch.matmul(x, other=weight),
        lambda x, weight: torch.matmul(input=x, other=weight),
        lambda x, weight: torch.mm(x, mat2=weight),
    ],
)
def test_products_with_arguments_by_name(compute):
    module = Weight(compute)
    base = {"weight": ql.quantize(ql.torch.params(module)["weight"])}
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    output = ql.torch.wrap(module).apply({"params": base}, x)
    assert_close(output, x @ np.asarray(ql.dequantize(base["weight"])))


@pytest.mark.parametrize("targets", [None, "weight"])
def test_embeddings_with_a_largest_norm_are_refused(targets):
    table = torch.nn.Embedding(48, 64, max_norm=1.0)
    params = ql.torch.params(table)
    base = params if targets is None else init(table, targets)[1]
    message = "must not have `max_norm`"
    refusal(lambda: ql.torch.wrap(table).apply({"params": base}, ARRAYS), message)


def test_tensors_of_pytorch_are_no_arguments():
    model = ql.torch.wrap(make_net())
    params = ql.torch.params(model)
    with pytest.raises(TypeError, match="must be JAX or NumPy arrays"):
        model.apply({"params": params}, torch.tensor(IDS))


def test_a_module_on_the_meta_device():
    net = make_net()
    params = ql.torch.params(net)
    expected = ql.torch.wrap(net).apply({"params": params}, ARRAYS)["logits"]
    with torch.device("meta"):
        model = ql.torch.wrap(Net().eval())
    refusal(lambda: ql.torch.params(model), "table.weight", "running_var", "shift")
    np.testing.assert_array_equal(
        model.apply({"params": params}, ARRAYS)["logits"], expected
    )


def test_bfloat16():
    module, ids = random_model("llama").to(torch.bfloat16), random_ids()
    model, base, lora = init(module, r".*_proj\.weight", fmt=None)
    assert base["model.layers.0.mlp.up_proj.weight"].dtype == jnp.bfloat16
    logits = logits_of(model, {"params": base}, jnp.array(ids))
    assert logits.dtype == jnp.bfloat16
    with torch.no_grad():
        exact = torch_logits(module.float(), ids)
    # About ten results in a row are rounded, in two layers and the head.
    assert_close(logits, exact, roundings=10)


def test_type_as_returns_a_new_tensor():
    class Cast(torch.nn.Module):
        def forward(self, x, others):
            return x.type_as(others[0]), x

    x, others = jnp.full(3, 1.3), jnp.ones((2, 3), jnp.bfloat16)
    cast, unchanged = ql.torch.wrap(Cast()).apply({"params": {}}, x, others)
    np.testing.assert_array_equal(cast, x.astype(jnp.bfloat16), strict=True)
    np.testing.assert_array_equal(unchanged, x, strict=True)


def test_names_must_be_those_of_the_module():
    model = ql.torch.wrap(make_net())
    params = ql.torch.params(model)
    del params["up.bias"]
    refusal(
        lambda: model.apply({"params": params | {"x": 1}}, ARRAYS), "'x'", "up.bias"
    )
    refusal(lambda: model.apply({"weights": params}, ARRAYS), "'params'", "weights")
    for function in (ql.torch.wrap, ql.torch.params, ql.torch.names):
        with pytest.raises(TypeError, match="torch.nn.Module. Got int"):
            function(3)


def test_a_cache_cannot_be_returned():
    model = ql.torch.wrap(random_model("llama"))
    with pytest.raises(TypeError, match="DynamicCache.*use_cache=False"):
        model.apply({"params": ql.torch.params(model)}, jnp.array(random_ids()))


class Custom(torch.nn.Module):
    """A module with two weights that are not in a layer of PyTorch, and a Conv1d."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = torch.nn.Parameter(torch.randn(64, 32))
        self.gains = torch.nn.Parameter(torch.randn(64, 64))
        self.conv = torch.nn.Conv1d(32, 8, 3)

    def forward(self, x):
        y = (x * self.gains.diagonal()) @ self.mix.T.mT
        return self.conv(y.mT)


def test_weights_of_unknown_modules_are_listed_and_take_a_contract():
    module = Custom().eval()
    params = ql.torch.params(module)
    config = ql.QLoRAConfig(rank=4, targets=r"mix|gains|conv\.weight")
    key = jax.random.key(0)
    refusal(
        lambda: ql.torch.init(key, module, params, config),
        "mix: the axes that its module, Custom",
        "conv.weight: the axes that its module, Conv1d",
        "gains",
    )
    model, base, lora = init(module, "mix|gains", contract="kn")
    x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    with torch.no_grad():
        merged = ql.merge(base, lora)
        for name in ("mix", "gains"):
            getattr(module, name).copy_(torch.tensor(np.asarray(merged[name])))
        expected = module(torch.tensor(x)).numpy()
    assert_close(model.apply({"params": base, "lora": lora}, x), expected)


def test_a_contract_must_not_contradict_the_module():
    net = make_net()
    refusal(lambda: init(net, r"up\.weight", contract="kn"), "up.weight", "'nk'")


def test_no_dropout_of_weights_that_a_module_reads_itself():
    module = Custom().train()
    model, base, lora = init(module, "gains", contract="kn", dropout=0.1)
    variables, x = {"params": base, "lora": lora}, jnp.ones((2, 5, 64))
    key = jax.random.key(0)
    refusal(lambda: model.apply(variables, x, dropout_key=key), "dropout=0.1")


def shift_detached(x):
    y = 3 * x
    y.detach()[0].add_(1)
    return y * y


def without_gradients(x):
    with torch.no_grad():
        row = x[0]
    return row * x


@pytest.mark.parametrize(
    "function",
    [
        shift_detached,
        without_gradients,
        lambda x: x * x.detach(),
        lambda x: x * torch.detach(x),
        lambda x: x * x[:1].detach(),
        lambda x: x * x.data,
        lambda x: x * x[:1].data,
    ],
)
def test_detached_tensors_share_values_and_stop_gradients(function):
    x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    expected = function(tensor)
    expected.sum().backward()
    model = ql.torch.wrap(Function(function))

    def compute_sum(x):
        output = model.apply({"params": {}}, x)
        return output.sum(), output

    gradient, output = jax.jit(jax.grad(compute_sum, has_aux=True))(x)
    assert_close(output, expected.detach().numpy())
    assert_close(gradient, tensor.grad.numpy())


class Function(torch.nn.Module):
    """A module without parameters that calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def fill_rows(x):
    rows = torch.zeros(5, 4)
    rows[:4] = x
    return rows


def add_to_zero(x):
    total = torch.tensor(0.0)
    total += x.sum()
    return total


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x + torch.arange(4),
        lambda x: x + torch.zeros(4),
        lambda x: x * torch.ones(4, 4),
        lambda x: x + torch.full((4,), 2.0),
        lambda x: x @ torch.eye(4),
        lambda x: x + torch.linspace(0, 1, 4),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x + torch.as_tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x + torch.tensor(2.0),
        lambda x: x.masked_fill(torch.tril(torch.ones(4, 4)) == 0, -1.0),
        lambda x: torch.cat([x, torch.zeros(1, 4)]),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x + x.new_tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x + torch.from_numpy(np.arange(4, dtype=np.float32)),
        lambda x: x + torch.ones(4, device="cpu"),
        fill_rows,
        add_to_zero,
        # Python reads the values of these tensors.
        lambda x: x * torch.linspace(0, 1, 3)[1].item(),
        lambda x: x * torch.arange(3).tolist()[2],
        lambda x: sum(x * int(i) for i in torch.arange(3)),
        lambda x: 2 * x if torch.arange(3).max() > 1 else x,
        lambda x: x[torch.tensor([True, False, True, False])],
        # A number does not change the dtype.
        lambda x: x.bfloat16() * torch.tensor(2.0) * torch.linspace(0, 1, 3)[1],
    ],
)
def test_tensors_that_the_module_makes_without_a_device(function):
    x = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    expected = function(torch.tensor(x))
    apply = jax.jit(ql.torch.wrap(Function(function)).apply)
    output = apply({"params": {}}, x)
    assert str(output.dtype) == str(expected.dtype).removeprefix("torch.")
    assert_close(output, expected.float().numpy())


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def parametrized(layer):
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", Double())


def patched(layer):
    layer.forward = types.MethodType(
        lambda self, x: 2 * torch.nn.functional.linear(x, self.weight), layer
    )


CHANGES = {
    "parametrize": parametrized,
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "old weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
    "forward hook": lambda layer: layer.register_forward_hook(
        lambda layer, args, output: output + layer.bias
    ),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(
        lambda layer, args: (2 * args[0],)
    ),
    "patched forward": patched,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("layers", ["all", "first", "last"])
@pytest.mark.parametrize("name", CHANGES)
def test_layers_with_hooks_and_parametrizations(name, layers):
    """Their values are right, or stacked layers are refused by name."""
    module = Layers(lambda x, layer, index: layer(x)).eval()
    chosen = {"all": slice(None), "first": slice(1), "last": slice(2, None)}[layers]
    for layer in module.layers[chosen]:
        CHANGES[name](layer)
    module.eval()
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    model, params = ql.torch.wrap(module), ql.torch.params(module)
    targets = [n for n in params if params[n].ndim > 1 and params[n].shape[1] > 1]
    config = ql.QLoRAConfig(rank=4, targets="|".join(targets), contract="nk")
    base, _ = ql.torch.init(jax.random.key(0), model, params, config)
    for tree in (params, base):
        attributes = [dict(vars(inner)) for inner in module.modules()]
        output = jax.jit(model.apply)({"params": tree}, x)
        try:
            stacked = ql.torch.stack(module, tree)
            stacked_output = model.apply({"params": stacked}, x)
        except ValueError as error:
            assert "'layers' cannot be scanned" in str(error)
            stacked_output = output
        for inner, before in zip(module.modules(), attributes, strict=True):
            assert all(vars(inner)[key] is value for key, value in before.items())
        weights = jax.tree.map(np.array, ql.dequantize(tree))
        with torch.no_grad():
            for tensor_name, tensor in ql.torch.arrays.named_tensors(module).items():
                tensor.copy_(torch.tensor(weights[tensor_name]))
            expected = module(torch.tensor(x)).numpy()
        assert_close(output, expected)
        assert_close(stacked_output, expected)


@pytest.mark.parametrize("owner", ["layers.1", "layers.1.weight"])
def test_backward_hooks_are_refused(owner):
    module = Layers(lambda x, layer, index: layer(x))
    if owner.endswith("weight"):
        module.layers[1].weight.register_hook(lambda gradient: 2 * gradient)
    else:
        module.layers[1].register_full_backward_hook(lambda *_: None)
    params, model = ql.torch.params(module), ql.torch.wrap(module)
    for tree in (params, ql.torch.stack(module, params)):
        refusal(
            lambda tree=tree: model.apply({"params": tree}, jnp.ones((2, 64))),
            "backward hooks",
            owner,
        )
