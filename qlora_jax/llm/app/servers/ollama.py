"""Ollama."""

from .server import INT4_FMTS, Server

# Since 0.34.1, `ollama create` rejects `ADAPTER` (ollama's pull request 14969).
OLLAMA = Server(
    name="ollama",
    reads=("gguf",),
    bases=dict.fromkeys(INT4_FMTS, "gguf"),  # in GGUF: Q4_0, in blocks of 32
    floats="gguf",
    adapter=None,
    command="ollama create adapted -f Modelfile && ollama run adapted",
    files={"Modelfile": "FROM {base}\n"},
    port=11434,
    model="adapted",
)
