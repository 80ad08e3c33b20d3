"""SGLang."""

from .server import AWQ, BITSANDBYTES, METHODS, Server

SGLANG = Server(
    name="sglang",
    reads=METHODS,
    bases={**BITSANDBYTES, **AWQ},
    adapter="peft-portable",
    command="python -m sglang.launch_server --model-path {base}{flags}",
    option=" --enable-lora --lora-paths adapter={adapter}",
    flags={"bitsandbytes": " --load-format bitsandbytes"},
    port=30000,
    adapter_fields={"lora_path": "adapter"},
)
