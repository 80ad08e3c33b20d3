"""Reads adapters from a GGUF file."""

import dataclasses
import math
import pathlib

import numpy as np

import qlora_jax as ql

from ..config import DecoderConfig
from .decoder_in import GGUFTensor, gguf_names, stored_rows
from .open_file import field, open_gguf
from .values import architecture_of

_ALPHA = "adapter.lora.alpha"
_KNOWN = (
    "adapter.type",
    _ALPHA,
    "adapter.lora.task_name",
    "adapter.lora.prompt_prefix",
)


def read_gguf_lora(
    path: str | pathlib.Path, config: DecoderConfig
) -> "ql.io.PlainLoRA":
    """Returns the adapters that llama.cpp adds to a model, for `ql.io.load_peft`.

    Args:
        path: The file.
        config: The model's config. Names are those of a model that is text alone.

    Raises:
        CheckpointError: If it is broken, not LoRA, or of another architecture.
    """
    reader, kind = open_gguf(path), architecture_of(config)
    wanted = {"general.type": "adapter", "adapter.type": "lora"}
    wanted["general.architecture"] = kind
    problems = [
        f"`{key}` must be {value!r}. Got {found!r:.80}."
        for key, value in wanted.items()
        if (found := field(reader, key)) != value
    ]
    alpha = field(reader, _ALPHA)
    if not isinstance(alpha, float) or not 0 < alpha < math.inf:
        problems.append(f"`{_ALPHA}` must be a positive number. Got {alpha!r:.80}.")
    strange = [x for x in reader.fields if x.startswith("adapter.") and x not in _KNOWN]
    problems += [f"`{key}` is not supported." for key in strange]
    config = dataclasses.replace(config, module="model")
    hf_names = {gguf_name: name for name, gguf_name in gguf_names(config, kind).items()}
    factors: dict[str, dict[str, np.ndarray]] = {}
    for tensor in reader.tensors:
        name, _, part = tensor.name.rpartition(".lora_")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if name not in hf_names or part not in ("a", "b") or len(shape) != 2:
            problems.append(f"{tensor.name}: unexpected, of shape {shape}")
            continue
        rows = stored_rows(hf_names[name], shape, config, kind) if part == "b" else None
        x = GGUFTensor(shape, tensor.data, tensor.tensor_type, rows)[:]
        factors.setdefault(hf_names[name].removesuffix(".weight"), {})[part] = x
    if problems:
        lines = "\n  ".join(sorted(problems))
        raise ql.io.CheckpointError(f"{path} is no LoRA for this model:\n  {lines}")
    assert isinstance(alpha, float)
    return ql.io.PlainLoRA(alpha, factors)
