"""Reads and writes checkpoints and adapters of Hugging Face, bitsandbytes and PEFT."""

from .files import CheckpointError
from .formats.registry import (
    packed_tensors,
    read_quantization,
    save_bitsandbytes,
    save_packed,
)
from .hf.hub import fetch
from .hf.load import load
from .hf.merged import save_merged
from .names import Entry, Names
from .native import restore, save
from .peft.config import PeftConfig
from .peft.files import load_peft, save_peft
from .peft.servers import PlainLoRA, portable, save_mlx
from .peft.settings import peft_config
from .safetensors import open_safetensors, write_safetensors

__all__ = [
    "CheckpointError",
    "Entry",
    "Names",
    "PeftConfig",
    "PlainLoRA",
    "fetch",
    "load",
    "load_peft",
    "open_safetensors",
    "packed_tensors",
    "peft_config",
    "portable",
    "read_quantization",
    "restore",
    "save",
    "save_bitsandbytes",
    "save_merged",
    "save_mlx",
    "save_packed",
    "save_peft",
    "write_safetensors",
]
