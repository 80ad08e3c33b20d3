"""llama.cpp."""

from .server import INT4_FMTS, Server

LLAMA_CPP = Server(
    name="llama.cpp",
    reads=("gguf",),
    bases=dict.fromkeys(INT4_FMTS, "gguf"),  # in GGUF: Q4_0, in blocks of 32
    floats="gguf",
    adapter="gguf-lora",
    adapts_experts=False,
    command="llama-server -m {base}",
    option=" --lora {adapter}",
    port=8080,
    adapter_fields={"lora": [{"id": 0, "scale": 1.0}]},
)
