"""The JAX contestants: this library, dense JAX in two forms, qwix, ejkernel.

Products are `x @ W`, perhaps with the input gradient. Steps train a stack of
`h + tanh(h @ W + LoRA)` with squared loss and AdamW on the adapters, or a whole
language model. A peer's name may end in "-unrolled" for a Python loop over the layers
instead of a scan, or, for the model, in "-remat" for recomputed layers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cases import (
    BLOCK_SIZE,
    NEW_TOKENS,
    RATE,
    Job,
    inputs,
    sequences,
    tokens,
    weights,
    width,
)


def build(peer: str, case: dict) -> Job:
    """Returns the job of a JAX peer."""
    if case["kind"] == "quantize":
        return quantize_job(case)
    if case["kind"] == "product":
        return product_job(peer, case)
    if case["kind"] == "model":
        return model_job(peer, case)
    if case["kind"] == "train":
        return train_job(peer, case)
    if case["kind"] == "generate":
        return generate_job(peer, case)
    return step_job(peer, case)


def temporaries(function, *args) -> int | None:
    """Returns the bytes of temporaries of a jitted function's executable."""
    analysis = function.lower(*args).compile().memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def stored_bytes(tree) -> int:
    """Returns the bytes that a tree's buffers take on this device."""
    return sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(tree))


def float32(x) -> np.ndarray:
    """Returns a NumPy copy in float32."""
    return np.asarray(x, np.float32)


def dot(x, w):
    """The plain product."""
    return jnp.dot(x, w)


@jax.custom_vjp
def best_dot(x, w):
    """The product with a float32 result, which is its fast form in bfloat16."""
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _best_bwd(w, g):
    contract = (((g.ndim - 1,), (1,)), ((), ()))
    dx = jax.lax.dot_general(g, w, contract, preferred_element_type=jnp.float32)
    return dx.astype(g.dtype), None


best_dot.defvjp(lambda x, w: (best_dot(x, w), w), _best_bwd)


def contestant(peer: str, w: jax.Array):
    """Returns what a peer stores for W [K, N] and its product function."""
    if peer == "qlora_jax":
        import qlora_jax as ql

        return ql.quantize(w, "nf4", block_size=BLOCK_SIZE), ql.matmul
    if peer == "qwix":
        import qwix

        q = qwix.quantize(w, "nf4", channelwise_axes=(1,), tiled_axes={0: BLOCK_SIZE})
        return q, lambda x, q: qwix.dot_general(x, q, (((1,), (0,)), ((), ())))
    if peer == "ejkernel":
        from ejkernel.modules.operations.quantized_matmul import quantized_matmul
        from ejkernel.quantization import prepack_quantized_weights

        format_options = {"mode": "nf4", "group_size": BLOCK_SIZE, "axis": "row"}

        # Its result is float32.
        def product(x, q):
            return quantized_matmul(x, *q, **format_options, platform="xla").astype(
                x.dtype
            )

        return prepack_quantized_weights(w.T, **format_options), product
    return w, {"dense": dot, "dense-best": best_dot}[peer]


def product_functions(product):
    """Returns the jitted forward, and forward with input gradient."""

    def product_and_gradient(x, w, g):
        y, pullback = jax.vjp(lambda x: product(x, w), x)
        return y, pullback(g)[0]

    return jax.jit(lambda x, w: product(x, w)), jax.jit(product_and_gradient)


def product_job(peer: str, case: dict) -> Job:
    """One product, with `case["backward"]` the input gradient too."""
    x, g = (jnp.asarray(v, case["dtype"]) for v in inputs(case))
    stored, product = contestant(peer, jnp.asarray(weights(case), case["dtype"]))
    forward, both = product_functions(product)
    function, args = (
        (both, (x, stored, g)) if case["backward"] else (forward, (x, stored))
    )
    facts = {
        "temporaries": temporaries(function, *args),
        "bits": 8 * stored_bytes(stored) / (case["k"] * case["n"]),
    }

    def call():
        return jax.block_until_ready(function(*args))

    return Job(call, lambda: float32(forward(x, stored)), facts)


def quantize_job(case: dict) -> Job:
    """`ql.quantize` as a user calls it, outside jit."""
    import qlora_jax as ql

    w = jnp.asarray(weights(case), case["dtype"])

    def run():
        return ql.quantize(w, "nf4", block_size=BLOCK_SIZE, double_quant=True)

    def call():
        return jax.block_until_ready(run())

    return Job(call, lambda: float32(inputs(case)[0] @ float32(ql.dequantize(run()))))


def step_job(peer: str, case: dict) -> Job:
    """One training step of a stack of layers."""
    x, target = (jnp.asarray(v, case["dtype"]) for v in inputs(case))
    name, _, form = peer.partition("-")
    make = {"qlora_jax": our_stack, "dense": dense_stack, "qwix": qwix_stack}[name]
    base, lora, apply = make(case, form == "unrolled")
    initial = jax.tree.map(jnp.copy, lora)
    forward = jax.jit(apply)

    def loss(lora, base):
        error = apply(base, lora, x) - target
        return jnp.mean(jnp.square(error.astype(jnp.float32)))

    call, facts = training(loss, lora, base)
    facts["bits"] = 8 * stored_bytes(base) / (case["layers"] * case["width"] ** 2)
    return Job(call, lambda: float32(forward(base, initial, x)), facts)


def language_model(peer: str, case: dict) -> tuple[Any, Any, Any, float]:
    """Returns this library's wrapped Llama, base, adapters, and bits per weight."""
    import qlora_jax as ql
    from qlora_jax.llm.models.config import DecoderConfig
    from qlora_jax.llm.models.decoder import Decoder

    m, dtype = case["model"], jnp.dtype(case["dtype"])
    name, _, form = peer.partition("-")
    config = DecoderConfig(
        m["vocab_size"],
        m["hidden_size"],
        m["intermediate_size"],
        m["num_hidden_layers"],
        num_heads=m["num_attention_heads"],
        num_kv_heads=m["num_key_value_heads"],
    )
    model, shapes = Decoder(config, dtype, remat=form == "remat"), (1, 16)
    shapes = jax.ShapeDtypeStruct(shapes, jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16), jnp.int32))
    params = jax.tree.map(lambda x: x.astype(dtype), params["params"])
    settings = ql.QLoRAConfig(
        rank=case["rank"],
        fmt=case.get("fmt", "nf4") if name == "qlora_jax" else None,
        block_size=BLOCK_SIZE,
        targets=r".*_proj/kernel",
    )
    base, lora = ql.linen.init(jax.random.key(1), model, params, settings, shapes)
    kernels = sum(math.prod(x.shape) for x in jax.tree.leaves(params["layers"]))
    bits = 8 * stored_bytes(base["layers"]) / kernels
    return ql.linen.wrap(model, scanned=model.scanned), base, lora, bits


def model_job(peer: str, case: dict) -> Job:
    """One training step of our decoder as a Llama; "dense" is plain LoRA on it."""
    import optax

    model, base, lora, bits = language_model(peer, case)
    batch = tokens(case)

    def loss(lora, base):
        logits = model.apply({"params": base, "lora": lora}, batch)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
        return jnp.mean(losses)

    call, facts = training(loss, lora, base)
    return Job(call, lambda: None, facts | {"bits": bits})


def train_job(peer: str, case: dict) -> Job:
    """One step of `qlora-jax train` on packed rows; "dense" is plain LoRA."""
    from qlora_jax.llm import data, train
    from qlora_jax.llm.data.batching import collate

    model, base, lora, bits = language_model(peer, case)
    groups = [
        [
            data.Row(ids, np.where(np.arange(len(ids)) < prompt, -100, ids), "")
            for ids, prompt in row
        ]
        for row in sequences(case)
    ]
    num_trained = max(sum(row.num_trained for row in group) for group in groups)
    batch = collate(groups, case["rows"], width(case), -(-num_trained // 16) * 16)
    optimizer = train.make_optimizer("adamw", lambda step: RATE, clip=1.0)
    step = train.make_step(train.decoder_loss(model), optimizer)
    carried = {"state": train.State.create(lora, optimizer, seed=0)}

    def call():
        carried["state"], report = step(carried["state"], base, [batch])
        jax.block_until_ready((carried, report))

    return Job(call, lambda: None, {"bits": bits})


def generate_job(peer: str, case: dict) -> Job:
    """Greedy tokens as `qlora-jax generate` makes them, one by one."""
    from qlora_jax.llm.models.stream import Stream

    wrapped, base, lora, bits = language_model(peer, case | {"rank": case["rank"] or 1})
    stream = Stream(wrapped, {"params": base, "lora": lora if case["rank"] else {}})

    def tokens():
        while True:
            yield from stream([1] * 32, max_new_tokens=NEW_TOKENS, eos_ids=())

    endless = tokens()

    def call():
        return [next(endless) for _ in range(case["tokens"])]

    return Job(call, lambda: None, {"bits": bits})


def training(loss, lora, base) -> tuple[Any, dict]:
    """Returns a call that takes a step with a donated state, and facts."""
    import optax

    optimizer = optax.adamw(RATE, weight_decay=0.0)

    def step(lora, state, base):
        value, grads = jax.value_and_grad(loss)(lora, base)
        updates, state = optimizer.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    step = jax.jit(step, donate_argnums=(0, 1))
    carried = {"lora": lora, "state": optimizer.init(lora)}
    facts = {"temporaries": temporaries(step, carried["lora"], carried["state"], base)}

    def call():
        carried["lora"], carried["state"], value = step(
            carried["lora"], carried["state"], base
        )
        jax.block_until_ready((carried, value))

    return call, facts


def stacked(layer, unrolled: bool, layers: int):
    """Returns a function of (base, lora, x) that scans or loops over the layers."""

    def scanned(base, lora, h):
        return jax.lax.scan(
            lambda h, layer_params: (layer(*layer_params, h), None), h, (base, lora)
        )[0]

    def loop_over_layers(base, lora, h):
        for i in range(layers):
            h = layer(base[i], lora[i], h)
        return h

    return loop_over_layers if unrolled else scanned


def our_stack(case: dict, unrolled: bool):
    """Returns this library's base, adapters and function."""
    import qlora_jax as ql

    w = jnp.asarray(weights(case), case["dtype"])
    config = ql.QLoRAConfig(rank=case["rank"], block_size=BLOCK_SIZE)

    def init(w):
        return ql.init(jax.random.key(0), {"kernel": w}, config)

    def layer(base, lora, h):
        return h + jnp.tanh(ql.apply(base, lora, h))

    base, lora = zip(*map(init, w), strict=True) if unrolled else init(w)
    return base, lora, stacked(layer, unrolled, case["layers"])


def dense_stack(case: dict, unrolled: bool):
    """Returns plain LoRA on a float base, in plain JAX."""
    w = jnp.asarray(weights(case), case["dtype"])
    layers, width, rank = case["layers"], case["width"], case["rank"]
    bound = width**-0.5
    a = jax.random.uniform(
        jax.random.key(0), (layers, width, rank), minval=-bound, maxval=bound
    )
    lora = {"a": a, "b": jnp.zeros((layers, rank, width))}

    def layer(w, lora, h):
        delta = h.astype(jnp.float32) @ lora["a"] @ lora["b"]
        return h + jnp.tanh(best_dot(h, w) + delta.astype(h.dtype))

    if unrolled:
        lora = [jax.tree.map(lambda x: x[i], lora) for i in range(layers)]  # noqa: B023
        w = list(w)
    return w, lora, stacked(layer, unrolled, layers)


def qwix_stack(case: dict, unrolled: bool):
    """Returns qwix's base, adapters and function, by its own linen route."""
    import flax.linen as nn
    import qwix

    width, dtype = case["width"], jnp.dtype(case["dtype"])
    dense = {"use_bias": False, "dtype": dtype, "param_dtype": dtype, "name": "proj"}

    class Block(nn.Module):
        @nn.compact
        def __call__(self, h, _=None):
            return h + jnp.tanh(nn.Dense(width, **dense)(h)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, h):
            if unrolled:
                for i in range(case["layers"]):
                    h, _ = Block(name=f"layer_{i}")(h)
                return h
            split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            scan = nn.scan(Block, length=case["layers"], **split)
            return scan(name="layers")(h, None)[0]

    x = jnp.zeros((case["rows"], width), dtype)
    provider = qwix.LoraProvider(
        module_path=".*proj",
        rank=case["rank"],
        alpha=case["rank"],
        weight_qtype="nf4",
        tile_size=BLOCK_SIZE,
    )
    model = qwix.apply_lora_to_model(Stack(), provider)
    params = model.init(jax.random.key(0), x)["params"]
    w = jnp.asarray(weights(case), dtype)
    if unrolled:
        kernels = {f"layer_{i}": {"proj": {"kernel": w[i]}} for i in range(len(w))}
        base = qwix.quantize_params(kernels, params)
    else:  # quantize_params refuses a stack, so its arrays are set here
        tiles = {"channelwise_axes": (1,), "tiled_axes": {0: BLOCK_SIZE}}
        packed = jax.vmap(lambda w: qwix.quantize(w, "nf4", **tiles))(w)
        old = params["layers"]["proj"]["kernel"]
        kernel = jax.tree.unflatten(jax.tree.structure(old), jax.tree.leaves(packed))
        assert jax.tree.map(jnp.shape, kernel) == jax.tree.map(jnp.shape, old)
        base = {"layers": {"proj": {"kernel": kernel}}}
    lora = {k: {"proj": _adapters(v["proj"])} for k, v in params.items()}

    def apply(base, lora, h):
        both = {k: {"proj": base[k]["proj"] | lora[k]["proj"]} for k in base}
        return model.apply({"params": both}, h)

    return base, lora, apply


def _adapters(proj: dict) -> dict:
    adapter_arrays = {k: v for k, v in proj.items() if "lora" in k}
    if len(adapter_arrays) != 2:
        raise ValueError(f"qwix made no adapter: {list(proj)}")
    return adapter_arrays
