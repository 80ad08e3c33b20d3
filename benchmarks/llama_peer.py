"""llama.cpp as a contestant of generation.py: its server, in the worker's process."""

import tempfile

import httpx
from cases import NEW_TOKENS, SMOLLM2_135M, Job
from xllamacpp import CommonParams, Server

from qlora_jax.llm.gguf.decoder_out import save_gguf
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.download import fetch
from qlora_jax.llm.models.tiny import save_tiny

THREADS = 2


def build(peer: str, case: dict) -> Job:
    """Greedy tokens of SmolLM2-135M, its layers in Q4_0 and its head in float16."""
    del peer
    out = tempfile.mkdtemp()
    is_tiny = case["model"] != SMOLLM2_135M
    folder = save_tiny(out) if is_tiny else fetch("HuggingFaceTB/SmolLM2-135M-Instruct")
    _, weights = load(folder, progress=False)
    save_gguf(f"{out}/q4_0.gguf", folder, weights, fmt="Q4_0", progress=False)
    params = CommonParams()
    params.model.path = f"{out}/q4_0.gguf"
    params.n_ctx, params.n_parallel, params.verbosity = 256, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = Server(params)
    ids: list[int] = []

    def call():
        # The server caches the prompt, so it reads one token per step like others.
        ids[:] = ids or [1] * 32
        body = {"prompt": ids, "n_predict": case["tokens"], "temperature": 0}
        body |= {"return_tokens": True, "ignore_eos": True, "cache_prompt": True}
        reply = httpx.post(f"{server.listening_address}/completion", json=body).json()
        ids.extend(reply["tokens"])
        if len(ids) >= 32 + NEW_TOKENS:
            ids.clear()

    return Job(call, lambda: None, {"bits": 4.5})
