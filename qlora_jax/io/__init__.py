"""Reads and writes checkpoints and adapters of Hugging Face, bitsandbytes and PEFT."""

from .files import CheckpointError, check_links, new_path, parse_json
from .formats.registry import (
    packed_tensors,
    read_quantization,
    save_bitsandbytes,
    save_packed,
)
from .hf.hub import fetch
from .hf.load import load
from .hf.merged import save_merged
from .model_folder import older_config_keys, read_config_json
from .names import Entry, Names
from .native import Restored, restore, save
from .peft.config import PeftConfig
from .peft.files import load_peft, save_peft
from .peft.servers import PlainLoRA, portable, save_mlx
from .peft.settings import peft_config
from .safetensors import open_safetensors, write_safetensors
from .tensors import LazyTensor, Tensors

__all__ = [
    "CheckpointError",
    "Entry",
    "LazyTensor",
    "Names",
    "PeftConfig",
    "PlainLoRA",
    "Restored",
    "Tensors",
    "check_links",
    "fetch",
    "load",
    "load_peft",
    "new_path",
    "older_config_keys",
    "open_safetensors",
    "packed_tensors",
    "parse_json",
    "peft_config",
    "portable",
    "read_config_json",
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
