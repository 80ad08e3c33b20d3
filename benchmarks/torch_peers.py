"""The torch contestants: bitsandbytes' Linear4bit, and dense torch; both with PEFT."""

import torch
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
    """Returns the job of a torch peer."""
    torch.manual_seed(0)
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


def linear(peer: str, w: torch.Tensor) -> torch.nn.Module:
    """Returns a frozen layer that holds W [K, N]."""
    k, n = w.shape
    if peer == "torch":
        layer = torch.nn.Linear(k, n, bias=False, dtype=w.dtype)
        layer.weight = torch.nn.Parameter(w.T.contiguous(), requires_grad=False)
        return layer
    import bitsandbytes

    kind = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(k, n, bias=False, compute_dtype=w.dtype, **kind)
    layer.weight = bitsandbytes.nn.Params4bit(
        w.T.contiguous(), blocksize=BLOCK_SIZE, **kind
    )
    return layer.to("cpu")  # moving it to a device is what quantizes it


def stored_bits(layers) -> float:
    """Returns stored bits per weight, counted from the buffers."""
    size, count = 0, 0
    for layer in layers:
        state = getattr(layer.weight, "quant_state", None)
        buffers = [layer.weight]
        if state is not None:
            buffers += [state.absmax, state.state2.absmax, state.offset]
        size += sum(x.numel() * x.element_size() for x in buffers)
        count += layer.in_features * layer.out_features
    return 8 * size / count


def as_torch(x, dtype: str) -> torch.Tensor:
    """Returns a NumPy array as a tensor of the named dtype."""
    return torch.from_numpy(x).to(getattr(torch, dtype))


def product_job(peer: str, case: dict) -> Job:
    """One product, with `case["backward"]` the input gradient too."""
    layer = linear(peer, as_torch(weights(case), case["dtype"]))
    x, g = (as_torch(v, case["dtype"]) for v in inputs(case))
    facts = {"bits": stored_bits([layer])}

    @torch.no_grad()
    def forward():
        return layer(x)

    def product_and_gradient():
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return y, torch.autograd.grad(y, leaf, g)

    if not case["backward"]:
        layer.eval()
    call = product_and_gradient if case["backward"] else forward
    return Job(call, lambda: forward().float().numpy(), facts)


def quantize_job(case: dict) -> Job:
    """The quantization that Linear4bit calls, including double quantization."""
    import bitsandbytes.functional as bnb

    w = as_torch(weights(case), case["dtype"]).T.contiguous()
    x = torch.from_numpy(inputs(case)[0])
    kind = {"quant_type": "nf4", "blocksize": BLOCK_SIZE, "compress_statistics": True}

    def call():
        return bnb.quantize_4bit(w, **kind)

    def decode():
        return bnb.dequantize_4bit(*call()).float()

    return Job(call, lambda: (x @ decode().T).numpy())


class Stack(torch.nn.Module):
    """Layers `h + tanh(proj(h))`."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleDict({"proj": layer}) for layer in layers
        )

    def forward(self, h):
        for layer in self.layers:
            h = h + torch.tanh(layer["proj"](h))
        return h


def step_job(peer: str, case: dict) -> Job:
    """One training step of PEFT's LoRA on the stack."""
    import peft

    w = as_torch(weights(case), case["dtype"])
    x, target = (as_torch(v, case["dtype"]) for v in inputs(case))
    stack = Stack([linear(peer, layer) for layer in w])
    facts = {"bits": stored_bits(layer["proj"] for layer in stack.layers)}
    config = peft.LoraConfig(
        r=case["rank"], lora_alpha=case["rank"], target_modules=["proj"]
    )
    model = peft.get_peft_model(stack, config)
    with torch.no_grad():
        start = model(x).float().numpy()
    trained = [param for param in model.parameters() if param.requires_grad]
    assert len(trained) == 2 * case["layers"]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def call():
        optimizer.zero_grad()
        (model(x) - target).float().square().mean().backward()
        optimizer.step()

    return Job(call, lambda: start, facts)


def language_model(peer: str, case: dict):
    """Returns transformers' Llama with PEFT's LoRA on all its layers, and facts."""
    import peft
    import transformers

    name, _, form = peer.partition("-")
    config = transformers.LlamaConfig(**case["model"], tie_word_embeddings=True)
    llama = transformers.LlamaForCausalLM(config).to(getattr(torch, case["dtype"]))
    packed = []
    for block in llama.model.layers:
        for part in (block.self_attn, block.mlp):
            for child, layer in [*part.named_children()]:
                if isinstance(layer, torch.nn.Linear):
                    packed.append(linear(name, layer.weight.detach().T))
                    setattr(part, child, packed[-1])
    facts = {"bits": stored_bits(packed)}
    names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    lora = peft.LoraConfig(
        r=case["rank"], lora_alpha=case["rank"], target_modules=names
    )
    if form == "remat":
        llama.gradient_checkpointing_enable({"use_reentrant": False})
    model = peft.get_peft_model(llama, lora).train()
    trained = [param for param in model.parameters() if param.requires_grad]
    assert len(trained) == 2 * len(packed)
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    return model, trained, optimizer, facts


def model_job(peer: str, case: dict) -> Job:
    """One training step of transformers' Llama with PEFT's LoRA on all its layers."""
    model, _, optimizer, facts = language_model(peer, case)
    batch = torch.from_numpy(tokens(case))

    def call():
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()

    return Job(call, lambda: None, facts)


def train_job(peer: str, case: dict) -> Job:
    """A step on packed rows: sequences see only themselves, and answers are targets."""
    model, trained, optimizer, facts = language_model(peer, case)
    size = case["rows"], width(case)
    ids, segments, positions = torch.zeros((3, *size), dtype=torch.long)
    labels = torch.full(size, -100)
    for i, row in enumerate(sequences(case)):
        start = 0
        for segment, (sequence, prompt) in enumerate(row, 1):
            columns = slice(start, start + len(sequence))
            ids[i, columns] = torch.from_numpy(sequence).long()
            segments[i, columns] = segment
            positions[i, columns] = torch.arange(len(sequence))
            labels[i, start + prompt : columns.stop] = ids[
                i, start + prompt : columns.stop
            ]
            start = columns.stop
    same = segments[:, None, :, None] == segments[:, None, None, :]
    mask = same & torch.ones(size[1], size[1], dtype=torch.bool).tril()
    batch = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}

    def call():
        optimizer.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    return Job(call, lambda: None, facts)


def generate_job(peer: str, case: dict) -> Job:
    """Greedy tokens of transformers' Llama with random weights, in a plain loop."""
    model, *_, facts = language_model(peer, case | {"rank": case["rank"] or 1})
    if not case["rank"]:
        model = model.unload()
    model = model.eval()

    def tokens():
        while True:
            ids, past = torch.ones((1, 32), dtype=torch.long), None
            for _ in range(NEW_TOKENS):
                out = model(input_ids=ids, past_key_values=past, use_cache=True)
                past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
                yield int(ids)

    endless = tokens()

    def call():
        with torch.inference_mode():
            for _ in range(case["tokens"]):
                next(endless)

    return Job(call, lambda: None, facts)
