"""Programs that users serve exported files with: llama.cpp and mlx-lm."""

import contextlib
import subprocess
import sys

import httpx
import numpy as np
import pytest

SERVER = """
import sys

from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server
from xllamacpp import ggml_type, llama_flash_attn_type

params = CommonParams()
params.model.path = sys.argv[1]
params.lora_adapters = [CommonAdapterLoraInfo(x, 1.0) for x in sys.argv[2:]]
params.n_ctx, params.n_parallel, params.verbosity = 256, 1, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = ggml_type.GGML_TYPE_F32
params.flash_attn_type = llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def llama_cpp(*files):
    """Yields a function that sends a request, a path and a body, to llama.cpp's server.

    Files are a model and perhaps an adapter.

    The server is in a child process, which is killed, since a server that has just
    started may hang when it is asked to end.
    """
    command = [sys.executable, "-c", SERVER, *map(str, files)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()

        try:
            yield lambda path, body: httpx.post(
                address + path, json=body, timeout=120
            ).json()
        finally:
            process.kill()


def log_probabilities(ask, tokens, count=272):
    """Returns llama.cpp's log-probabilities of `count` tokens as the next token.

    The server returns none if it chooses a token that is not a whole character. A bias
    makes it choose "A", and does not change the log-probabilities.
    """
    body = {"prompt": tokens, "n_predict": 1, "n_probs": count, "cache_prompt": False}
    body |= {"temperature": 0, "logit_bias": [[33, 1000]]}
    (answer,) = ask("/completion", body)["completion_probabilities"]
    log_probs = {x["id"]: x["logprob"] for x in answer["top_logprobs"]}
    return np.array([log_probs[i] for i in range(count)])


def mlx_logits(tokens, folder, *adapters, dtype=None):
    """Returns the logits of mlx-lm with a model and perhaps an adapter.

    The model computes in `dtype`, by default in that of its files.
    """
    mx = pytest.importorskip("mlx.core")
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    for adapter in adapters:
        load_adapters(model, str(adapter)).eval()
    if dtype is not None:
        model.set_dtype(getattr(mx, dtype))
    return np.array(model(mx.array(tokens)).astype(mx.float32))
