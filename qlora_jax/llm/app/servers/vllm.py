"""vLLM."""

from .server import AWQ, BITSANDBYTES, E2M1, METHODS, Server

_NVFP4 = "its kernel rounds a tensor's float32 scale to bfloat16"
VLLM = Server(
    name="vllm",
    reads=METHODS,
    bases={**BITSANDBYTES, **AWQ, **E2M1},
    adapter="peft-portable",
    find_difference=lambda config_json, config, fmt: _NVFP4 if fmt == "nvfp4" else None,
    command="vllm serve {base}",
    option=" --enable-lora --max-lora-rank {rank} --lora-modules adapter={adapter}",
    ranks=(8, 16, 32, 64, 128, 256, 320, 512),
    port=8000,
    adapter_fields={"model": "adapter"},
)
