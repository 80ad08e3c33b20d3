"""The servers that `pairs` lists and that `export --for` accepts, each in its own file.

What a file says about its server was checked in the server's source code or, if the
server runs on a CPU, by running it.
"""

from .llama_cpp import LLAMA_CPP
from .mlx import MLX
from .ollama import OLLAMA
from .server import FMTS_BY_FORMAT, INT4_FMTS, Server
from .sglang import SGLANG
from .transformers import TRANSFORMERS
from .vllm import VLLM

_ALL = (VLLM, SGLANG, LLAMA_CPP, OLLAMA, MLX, TRANSFORMERS)
SERVERS: dict[str, Server] = {server.name: server for server in _ALL}
__all__ = ["FMTS_BY_FORMAT", "INT4_FMTS", "SERVERS", "Server"]
