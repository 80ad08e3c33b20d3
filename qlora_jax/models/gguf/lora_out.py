"""Writes adapters as a GGUF file."""

import contextlib
import pathlib

import gguf
import numpy as np

import qlora_jax as ql

from .decoder_in import gguf_names, permute, permuted_heads
from .decoder_out import check_gguf_source


def save_gguf_lora(
    path: str | pathlib.Path, source: str | pathlib.Path, adapter: "ql.io.PlainLoRA"
) -> None:
    """Writes adapters for llama.cpp, which adds them to their model's GGUF file.

    Args:
        path: The file.
        source: The folder or `.gguf` file of the model.
        adapter: The adapters.

    Raises:
        ValueError: If llama.cpp, as we write its files, does not compute the model, or
            if adapters are of experts, which are one tensor there.
    """
    if experts := sorted(name for name in adapter.factors if ".experts." in name):
        raise ValueError(
            "a file of adapters for llama.cpp, as written here, must have none of "
            f"experts: write the sum, as GGUF. Got {len(experts)}, as {experts[0]}."
        )
    config, architecture = check_gguf_source(pathlib.Path(source), tokenizer=False)
    names = gguf_names(config, architecture)
    with (
        ql.io.new_path(path) as new,
        contextlib.closing(gguf.GGUFWriter(str(new), architecture)) as writer,
    ):
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        for module, own in adapter.factors.items():
            name = f"{module}.weight"
            heads = permuted_heads(name, config, architecture)
            b = own["b"] if heads is None else permute(own["b"], heads)
            writer.add_tensor(f"{names[name]}.lora_a", own["a"])
            writer.add_tensor(f"{names[name]}.lora_b", np.ascontiguousarray(b))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
