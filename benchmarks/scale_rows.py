"""The rows of `aot_scale.py`: a model, chips, tokens, settings of `qlora-jax train`.

All have adapters in float32 on all linear modules of a layer, AdamW, and one row of a
batch per chip, or per group of chips along a `tensor` axis. The rank is 64, except in
the rows of the notebook. Rows of models with experts have adapters on the modules in
`target_modules`.

`scale_models.json` has the `config.json` of each model, without the keys that do not
change the program. Those of Qwen3.5 and Gemma 4 are the text halves, with the sizes in
THUDM/slime (scripts/models), in rasbt/LLMs-from-scratch (ch05/17_gemma4), and in the
defaults of transformers.
"""

import json
import pathlib
from typing import Any

CONFIGS: dict[str, dict] = json.loads(
    pathlib.Path(__file__).with_name("scale_models.json").read_text("utf-8")
)
# Bytes that a program may use, as the TPU compiler reports them, or as in the
# descriptions of GPUs below.
HBM = {
    "v5e": 15.75 * 2**30,
    "v6e": 31.24 * 2**30,
    "h100": 84_978_434_048,
    "t4": 15_843_721_216,
}
NAMES = {
    "Qwen3-1.7B": "Qwen3-1.7B",
    "Qwen3-4B": "Qwen3-4B",
    "3B": "Llama-3.2-3B",
    "8B": "Llama-3.1-8B",
    "14B": "Qwen2.5-14B",
    "32B": "Qwen2.5-32B",
    "70B": "Llama-3.1-70B",
    "405B": "Llama-3.1-405B",
    "30B-A3B": "Qwen3-30B-A3B",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
    "Qwen3.5-27B": "Qwen3.5-27B",
    "Qwen3.5-35B-A3B": "Qwen3.5-35B-A3B",
    "Gemma 4 E4B": "Gemma-4-E4B",
    "Gemma 4 31B": "Gemma-4-31B",
    "Gemma 4 26B-A4B": "Gemma-4-26B-A4B",
}
TOPOLOGIES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
TOPOLOGIES |= {128: "8x16", 256: "16x16"}
# Each option includes those before it, in the order of docs/scale/fit.md.
PLAIN: dict[str, Any] = {"attention": "xla"}
SPLASH = {"attention": "splash"}
STREAM = SPLASH | {"stream_dtype": "bfloat16"}
OFFLOAD = STREAM | {"remat": "offload"}
TILES = OFFLOAD | {"mlp_tile": 2048}
HOST = TILES | {"offload_optimizer": True}
STREAMED = HOST | {"base_memory": "host"}
LORA = {"fmt": "none"}
DPO = {"objective": "dpo"}
# Only attention has adapters. Adapters of all experts would be as large as a model.
EXPERTS: dict[str, Any] = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
MIXED = OFFLOAD | EXPERTS
MXFP4 = MIXED | {"fmt": "mxfp4"}
# The same for Qwen3.5: attention, and the delta rule that replaces it in most layers.
DELTA_MODULES = ["in_proj_qkv", "in_proj_z", "out_proj"]
DELTA = {"target_modules": EXPERTS["target_modules"] + DELTA_MODULES}
H100 = PLAIN | {"stream_dtype": "bfloat16", "mlp_tile": 2048}
BLOCKS = H100 | {"attention": "blocks"}
CUDNN = H100 | {"attention": "cudnn"}
MIXED_H100 = PLAIN | {"stream_dtype": "bfloat16"} | EXPERTS
# The notebook's settings for a TPU v5e and for a T4 (examples/colab.ipynb).
NOTEBOOK = {"rank": 16, "packing": True, "fmt": "int8"}
NOTEBOOK |= {"merge_aware": "nf4"}
NOTEBOOK_V5E = NOTEBOOK | {"attention": "splash"}
NOTEBOOK_T4 = NOTEBOOK | {"attention": "xla", "dtype": "float16"}
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# From the output of deviceQuery on a T4. The bandwidth is 5,001 MHz x 2 x 256 bits.
_T4 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 65536 threads_per_core_limit: 1024 core_count: 40
  fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 320064000000 l2_cache_size: 4194304
  clock_rate_ghz: 1.59 device_memory_size: 15843721216
  shared_memory_per_block_optin: 65536
  cuda_compute_capability { major: 7 minor: 5 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "Tesla T4"
"""
# Descriptions that XLA compiles for without a GPU.
GPUS = {"h100": _H100, "t4": _T4}


def chip_of(record: dict) -> str:
    """Returns the name of a row's chips."""
    return record["topology"].partition(":")[0]


def row(
    model: str, chip: str, tokens: int, settings: dict, mesh: str = "", chips: int = 1
) -> dict:
    """Returns a row.

    Args:
        model: Its short name.
        chip: "v5e", "v6e", "h100" or "t4".
        tokens: Tokens of a sequence.
        settings: Settings in addition to those that all rows have.
        mesh: As in `TrainConfig`; one chip where empty.
        chips: How many chips.
    """
    sizes = dict(part.split("=") for part in mesh.split(",")) if mesh else {}
    rows = int(sizes.get("data", 1)) * int(sizes.get("fsdp", 1))
    all_settings = {
        "rank": 64,
        "batch_size": rows,
        "max_length": tokens,
        **settings,
        **({"mesh": mesh} if mesh else {}),
    }
    name = f"{model} on {chips} {chip}, {tokens}"
    name += f", {settings['objective']}" if "objective" in settings else ""
    shape = "1x1x1" if chip in ("h100", "t4") else TOPOLOGIES[chips]
    return {
        "name": name,
        "model": NAMES[model],
        "topology": f"{chip}:{shape}",
        "chips": chips,
        "settings": all_settings,
    }


ROWS = [
    row("8B", "v5e", 8192, TILES),
    row("32B", "v6e", 8192, TILES),
    row("70B", "v5e", 8192, TILES, "fsdp=4", 4),
    row("70B", "v5e", 2048, TILES | {"base_memory": "host"}),
    row("70B", "v5e", 2048, STREAMED),
    row("405B", "v5e", 2048, HOST, "fsdp=4,tensor=4", 16),
    row("70B", "v5e", 32768, TILES, "fsdp=32,tensor=8", 256),
    row("8B", "v5e", 131072, STREAMED),
    # LoRA on a bfloat16 base.
    row("8B", "v5e", 512, LORA | TILES),
    row("14B", "v5e", 512, LORA | TILES),
    row("32B", "v5e", 512, LORA | TILES),
    row("32B", "v6e", 512, LORA | TILES),
    row("70B", "v5e", 512, LORA | TILES),
    row("70B", "v6e", 512, LORA | TILES),
    row("70B", "v5e", 512, LORA | TILES, "fsdp=4", 4),
    row("405B", "v5e", 512, LORA | TILES, "fsdp=16", 16),
    # The largest model that fits the same chips in this way.
    row("3B", "v5e", 8192, LORA | TILES),
    row("8B", "v6e", 8192, LORA | TILES),
    row("14B", "v5e", 8192, LORA | TILES, "fsdp=4", 4),
    row("70B", "v5e", 2048, LORA | TILES, "fsdp=16", 16),
    # The order of docs/scale/fit.md.
    row("8B", "v5e", 8192, PLAIN),
    row("8B", "v5e", 8192, SPLASH),
    row("8B", "v5e", 8192, STREAM),
    row("8B", "v5e", 8192, OFFLOAD),
    row("8B", "v5e", 8192, HOST),
    row("8B", "v5e", 8192, STREAMED),
    # The notebook.
    row("Qwen3-4B", "v5e", 4096, NOTEBOOK_V5E),
    row("Qwen3-1.7B", "t4", 2048, NOTEBOOK_T4),
    # The longest power of two that fits with nothing turned on.
    row("8B", "v5e", 4096, PLAIN),
    # Other models and chips.
    row("14B", "v5e", 16384, HOST),
    row("14B", "v5e", 16384, STREAMED),
    row("32B", "v5e", 8192, STREAMED),
    row("70B", "v6e", 8192, STREAMED),
    row("70B", "v5e", 32768, LORA | TILES, "fsdp=32,tensor=8", 256),
    # Pairs of answers; the reference is the base without the adapter.
    row("8B", "v5e", 4096, TILES | DPO),
    row("8B", "v5e", 4096, LORA | TILES | DPO),
    # Experts.
    row("30B-A3B", "v6e", 8192, MIXED),
    row("30B-A3B", "v5e", 8192, MIXED | {"base_memory": "host"}),
    row("gpt-oss-20b", "v5e", 4096, MXFP4),
    row("gpt-oss-20b", "v5e", 4096, MXFP4 | {"base_memory": "host"}),
    row("gpt-oss-120b", "v6e", 4096, MXFP4, "fsdp=4", 4),
    row("gpt-oss-120b", "v6e", 4096, MXFP4, "fsdp=2,tensor=2", 4),
    row("gpt-oss-120b", "v5e", 4096, MXFP4, "fsdp=16", 16),
    row("30B-A3B", "v6e", 512, LORA | MIXED),
    row("gpt-oss-20b", "v5e", 512, LORA | MIXED),
    row("gpt-oss-120b", "v6e", 512, LORA | MIXED, "fsdp=4", 4),
    row("gpt-oss-120b", "v5e", 512, LORA | MIXED, "fsdp=16", 16),
    # Models whose layers differ: the delta rule, windows, and heads of two sizes.
    row("Qwen3.5-27B", "v6e", 8192, TILES),
    row("Qwen3.5-27B", "v6e", 16384, TILES),
    row("Qwen3.5-35B-A3B", "v6e", 16384, OFFLOAD | DELTA),
    row("Gemma 4 31B", "v6e", 8192, TILES),
    row("Gemma 4 E4B", "v5e", 16384, HOST),
    row("Gemma 4 26B-A4B", "v5e", 2048, MIXED),
    # The same model in our decoder and in the PyTorch code of transformers, with
    # settings that both support.
    row("Qwen3.5-27B", "v6e", 2048, PLAIN | {"stream_dtype": "bfloat16"}),
    row("Qwen3.5-27B", "v6e", 2048, PLAIN | {"engine": "torch"}),
    # Compiled by the CUDA compiler. Splash and host memory are not supported on GPUs.
    row("8B", "h100", 8192, H100),
    row("8B", "h100", 8192, LORA | H100),
    row("8B", "h100", 8192, BLOCKS),
    row("8B", "h100", 8192, CUDNN),
    row("8B", "h100", 65536, BLOCKS),
    row("8B", "h100", 65536, CUDNN),
    row("32B", "h100", 16384, CUDNN),
    row("70B", "h100", 8192, CUDNN),
    row("8B", "t4", 2048, {"attention": "blocks", "dtype": "float16"}),
    row("32B", "h100", 4096, H100),
    row("70B", "h100", 2048, H100),
    row("8B", "h100", 12288, H100),
    row("70B", "h100", 4096, H100),
    row("32B", "h100", 512, LORA | H100),
    row("70B", "h100", 512, LORA | H100),
    row("30B-A3B", "h100", 4096, MIXED_H100),
    row("gpt-oss-20b", "h100", 4096, MIXED_H100 | {"fmt": "mxfp4"}),
    row("30B-A3B", "h100", 512, LORA | MIXED_H100),
    row("gpt-oss-20b", "h100", 512, LORA | MIXED_H100),
    row("Qwen3.5-27B", "h100", 8192, H100),
    row("Qwen3.5-35B-A3B", "h100", 8192, MIXED_H100 | DELTA),
    row("Gemma 4 31B", "h100", 4096, H100),
    row("Gemma 4 31B", "h100", 8192, H100),
    row("Gemma 4 E4B", "h100", 8192, H100),
    row("Gemma 4 E4B", "h100", 16384, H100),
    row("Gemma 4 26B-A4B", "h100", 8192, MIXED_H100),
]
