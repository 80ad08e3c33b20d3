"""Programs that users serve exported files with: llama.cpp and mlx-lm.

Each must continue prompts as transformers does. llama.cpp rounds the inputs of weights
in F16 to F16, so the prompts are those whose best tokens have a margin.
"""

import json
import pathlib

import gguf
import jax
import llama
import numpy as np
import peft
import pytest
import torch
import transformers
from clients import llama_cpp, log_probabilities, mlx_logits
from configs import (
    DELTA,
    EXPERTS,
    LINEAR,
    LLAMA3,
    OLMOE,
    SIZES,
    YARN,
    longrope,
    random_model,
)
from helpers import trees_of
from stored import export
from tokenizer_helpers import save_split_tokenizer
from tokenizers import AddedToken, decoders, normalizers, processors
from tolerances import assert_close

import qlora_jax as ql
from qlora_jax.llm.data import open_tokenizer
from qlora_jax.llm.gguf.pre_tokenizers import PRE_TOKENIZERS
from qlora_jax.llm.gguf.save import save_gguf
from qlora_jax.llm.models import tiny
from qlora_jax.llm.models.checkpoint import load
from qlora_jax.llm.models.decoder_names import decoder_names

SIZES = SIZES | {"vocab_size": 272, "max_position_embeddings": 1024}
HEADS = {"head_dim": 16}  # not the hidden size by the heads
GEMMA = HEADS | {"sliding_window": 8, "query_pre_attn_scalar": 16}
ROPES = {"full_attention": LINEAR | {"rope_theta": 1e6}}
ROPES |= {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
# llama.cpp has one size for keys and values.
QWEN3_5 = DELTA | {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
OSS = HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}
# llama.cpp rounds the bounds of YaRN's ramp, here 0 and 3.9996.
WHOLE = YARN | {"rope_theta": 1024.0, "original_max_position_embeddings": 201}
WHOLE |= {"truncate": False}
# What differs from SIZES, by model_type. Windows are shorter than the prompt.
CASES = {
    "llama": HEADS,
    "llama, biases, llama3": {"attention_bias": True, "mlp_bias": True}
    | {"rope_parameters": LLAMA3},
    "llama, biases of the MLP": {"mlp_bias": True},
    "llama, linear": {"rope_parameters": LINEAR},
    "mistral": HEADS | {"sliding_window": None},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": HEADS | {"rope_parameters": LINEAR},
    "qwen3_moe": HEADS | EXPERTS | {"norm_topk_prob": True},
    "olmoe": OLMOE | {"num_key_value_heads": 4},
    "mixtral": HEADS | {"num_local_experts": 4},
    "qwen3_5_text": QWEN3_5,
    "qwen3_5_moe_text": QWEN3_5
    | EXPERTS
    | {"shared_expert_intermediate_size": 24, "initializer_range": 0.3},
    "gpt_oss": OSS | {"rope_parameters": LINEAR},
    "gpt_oss, yarn": OSS | {"rope_parameters": WHOLE},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"num_hidden_layers": 7, "rope_parameters": ROPES},
    "gemma": HEADS,
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 5, "rope_parameters": LINEAR},
    "phi3": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "phi3, longrope, short": longrope(4, original=512),
    "phi3, longrope, long": longrope(4, original=20),
}
NEW = 8


def save_model(folder, name, **changes):
    """Saves a random model of transformers, and a tokenizer."""
    model = random_model(name.split(",")[0], SIZES | CASES[name] | changes)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def continue_greedily(model):
    """Returns the prompt of 64 that the model continues with the largest margins.

    Also returns the new tokens, and log-probabilities after the prompt and at the end.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 256, (64, 32), generator=generator)
    tokens, leads, logs = prompts, [], []
    with torch.no_grad():
        for _ in range(NEW + 1):
            last = torch.log_softmax(model(tokens).logits[:, -1], -1)
            best = last.topk(2).values
            leads.append(best[:, 0] - best[:, 1])
            logs.append(last)
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
    # llama.cpp is told not to end its texts, so it skips the end token.
    is_ordinary = ((tokens[:, 32:] >= 3) & (tokens[:, 32:] < 256)).all(1)
    lead, row = torch.where(is_ordinary, torch.stack(leads).amin(0), 0).max(0)
    assert lead > 0.1
    text = tokens[row].tolist()
    return text[:32], text[32 : 32 + NEW], [logs[i][row].numpy() for i in (0, NEW)]


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_continues_as_transformers_does(tmp_path, name):
    model = save_model(tmp_path, name)
    prompt, text, logs = continue_greedily(model)
    path = tmp_path / "model.gguf"
    _, params = load(tmp_path, progress=False)
    save_gguf(path, tmp_path, params, progress=False)
    check_llama_cpp(prompt, text, logs, path)


def check_llama_cpp(prompt, text, logs, *files):
    body = {"prompt": prompt, "n_predict": NEW, "temperature": 0}
    body |= {"return_tokens": True, "ignore_eos": True}
    with llama_cpp(*files) as ask:
        assert ask("/completion", body)["tokens"] == text
        log_probs = [log_probabilities(ask, x) for x in (prompt, prompt + text)]
    for got, want in zip(log_probs, logs, strict=True):
        # llama.cpp rounds the inputs of seven products a layer to 16 bits.
        assert_close(got, want, dtype=np.float16, roundings=64)


def adapt(model, folder, size=0.2):
    """Adds an adapter of several ranks and scalings by PEFT, and saves it."""
    options = {"rank_pattern": {"down_proj": 2}, "r": 4, "lora_alpha": 6}
    options |= {"alpha_pattern": {"0.mlp.down_proj": 3}, "use_rslora": True}
    options |= {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    settings = peft.LoraConfig(**options)
    model = peft.get_peft_model(model, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore")  # of PEFT
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3_5_text"])
def test_clients_add_an_adapter_as_peft_does(tmp_path, name):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = adapt(save_model(base, name), adapter)
    prompt, text, logs = continue_greedily(model)
    with torch.no_grad(), model.disable_adapter():
        bare = torch.log_softmax(model(torch.tensor([prompt])).logits[0, -1], -1)
    assert np.abs(bare.numpy() - logs[0]).max() > 0.5
    files = [tmp_path / "base.gguf", tmp_path / "lora.gguf"]
    export(base, "gguf", files[0])
    export(base, "gguf-lora", files[1], adapter)
    check_llama_cpp(prompt, text, logs, *files)
    # mlx-lm computes this Phi-3 differently, even without an adapter.
    if name == "llama":
        export(base, "mlx", tmp_path / "mlx", adapter)
        check_mlx(prompt, text, logs, base, tmp_path / "mlx")


SERVED = dict(hidden_size=64, intermediate_size=128, initializer_range=0.08)
PACKED = dict(fmt="int4_f16", block_size=32)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A float model that training packs as int4 in groups of 32, and an adapter.

    Also the model of transformers with the decoded weights plus the adapter.
    """
    folder = tmp_path_factory.mktemp("trained")
    base, adapter = folder / "base", folder / "adapter"
    adapt(save_model(base, "llama", **SERVED), adapter, size=0.05)
    settings = ql.QLoRAConfig(targets=llama.PACKED, **PACKED)
    config, params = load(base, qlora=settings, progress=False)
    names = decoder_names(config)
    params, lora, _ = ql.io.load_peft(adapter, params, names)
    ql.io.save_merged(folder / "sum", params, lora, names, base, progress=False)
    return base, adapter, llama.their_model(folder / "sum")


def serve(trained, server, out):
    """Exports for a server; returns the paths of base and adapter."""
    base, adapter, _ = trained
    written = export(base, None, out, adapter, server=server, **PACKED)
    assert written.pair is not None and written.pair.exact
    return sorted(x for x in out.iterdir() if x.stem in ("base", "adapter"))[::-1]


@pytest.mark.filterwarnings("ignore")  # of PEFT
def test_llama_cpp_runs_the_very_base_of_the_adapter(trained, tmp_path):
    """Its loss is that of the decoded weights.

    llama.cpp rounds the inputs of weights in Q4_0 to 8 bits, which changed the loss by
    4e-4 here, and those of the same weights in F16 to F16, which changed it by 4e-6.
    """
    model = trained[-1]
    prompt, text, _ = continue_greedily(model)
    base, lora = serve(trained, "llama.cpp", tmp_path / "served")
    body = {"prompt": prompt, "n_predict": NEW, "temperature": 0}
    with llama_cpp(base, lora) as ask:
        answer = ask("/completion", body | {"return_tokens": True, "ignore_eos": True})
    assert answer["tokens"] == text
    floats = tmp_path / "floats.gguf"
    export(trained[0], "gguf", floats, **PACKED)
    for file in (base, floats):
        check_loss(model, file, lora)


def check_loss(model, *files):
    """Checks that llama.cpp's loss of random tokens is that of transformers."""
    tokens = np.random.default_rng(0).integers(3, 256, 64).tolist()
    logs = jax.nn.log_softmax(llama.logits_of(model, [tokens])[0])

    def mean_loss(logs):
        return -np.mean([x[i] for x, i in zip(logs, tokens[1:], strict=False)])

    with llama_cpp(*files) as ask:
        log_probs = [log_probabilities(ask, tokens[:i]) for i in range(1, len(tokens))]
    assert_close(mean_loss(log_probs), mean_loss(logs), dtype=np.float16)


def test_llama_cpp_runs_the_very_experts_in_mxfp4(tmp_path):
    base, path = tmp_path / "base", tmp_path / "model.gguf"
    save_model(base, "gpt_oss", **SERVED | {"intermediate_size": 64})
    settings = ql.QLoRAConfig(fmt="mxfp4", targets="layers/mlp/experts/.*/kernel")
    config, params = load(base, qlora=settings, progress=False)
    save_gguf(path, base, params, progress=False)
    stored = {x.name: x for x in gguf.GGUFReader(str(path)).tensors}
    gate_up = params["layers"]["mlp"]["experts"]["gate_up_proj"]["kernel"]
    decoded = gate_up.dequantize(jax.numpy.float32)
    for i, name in enumerate(("gate", "up")):
        x = stored[f"blk.1.ffn_{name}_exps.weight"]
        assert x.tensor_type == gguf.GGMLQuantizationType.MXFP4
        got = gguf.dequantize(x.data, x.tensor_type).swapaxes(1, 2)
        np.testing.assert_array_equal(got, decoded[1, ..., i::2])
    names = decoder_names(config)
    ql.io.save_merged(tmp_path / "sum", params, {}, names, base, progress=False)
    check_loss(llama.their_model(tmp_path / "sum"), path)


@pytest.mark.filterwarnings("ignore")  # of PEFT and transformers
@pytest.mark.parametrize("server", ["mlx", "transformers"])
def test_clients_run_the_very_base_of_the_adapter(trained, tmp_path, server):
    """The scales of AWQ and compressed-tensors are in float16."""
    base, adapter = serve(trained, server, tmp_path / "served")
    tokens = np.random.default_rng(0).integers(3, 256, (1, 64))
    want = llama.logits_of(trained[-1], tokens)
    if server == "mlx":
        got = mlx_logits(tokens, base, adapter)
    else:
        plain = transformers.CompressedTensorsConfig(run_compressed=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, quantization_config=plain
        )
        got = llama.logits_of(peft.PeftModel.from_pretrained(model, adapter), tokens)
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


def train_spm(folder, kind):
    """Saves a SentencePiece BPE as `tokenizer.json`; returns SentencePiece's own."""
    spm = pytest.importorskip("sentencepiece")
    from transformers.tokenization_utils_base import generate_merges

    (folder / "text").write_text(pathlib.Path("README.md").read_text("utf-8"))
    files = dict(input=str(folder / "text"), model_prefix=str(folder / "spm"))
    settings = dict(vocab_size=500, model_type="bpe", byte_fallback=True, minloglevel=2)
    settings |= dict(character_coverage=0.98, add_dummy_prefix=kind == "llama")
    settings |= dict(
        normalization_rule_name="identity", user_defined_symbols=["<turn>"]
    )
    settings |= dict(remove_extra_whitespaces=False, allow_whitespace_only_pieces=True)
    spm.SentencePieceTrainer.Train(**files, **settings)
    theirs = spm.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    ids = range(theirs.vocab_size())
    vocab = {theirs.id_to_piece(i): i for i in ids}
    merges = generate_merges(vocab, {t: theirs.get_score(i) for t, i in vocab.items()})
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    hf = transformers.GemmaTokenizer(
        vocab, merges, pad_token="</s>", mask_token="<unk>", **names
    )
    tokenizer = hf._tokenizer
    tokenizer.add_tokens([AddedToken("<turn>", normalized=False)])
    if kind == "llama":  # as the files of Llama 2 have it
        prepend, replace = normalizers.Prepend("\u2581"), tokenizer.normalizer
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
        tokenizer.pre_tokenizer = None
        strip = decoders.Strip(" ", 1, 0)
        tokenizer.decoder = decoders.Sequence([tokenizer.decoder, strip])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return theirs


@pytest.mark.parametrize("kind", ["gemma", "llama"])
def test_sentencepiece_is_that_of_llama_cpp(tmp_path, kind):
    folder = tmp_path / "model"
    tiny.save_tiny(folder, vocab_size=500)
    theirs = train_spm(folder, kind)
    _, params = load(folder, progress=False)
    path = tmp_path / "model.gguf"
    save_gguf(path, folder, params, progress=False)
    ours = open_tokenizer(folder).inner
    lines = pathlib.Path("README.md").read_text("utf-8").splitlines()
    texts = [*filter(str.strip, lines), " two  spaces\tand   three", "\n\n x", "é漢 🙂"]
    body = {"add_special": True, "parse_special": True}
    with llama_cpp(path) as ask:

        def tokens(text):
            return ask("/tokenize", body | {"content": text})["tokens"]

        for text in texts:
            want = [1, *theirs.encode(text)]
            assert tokens(text) == want, text
            assert ours.encode(text).ids == want, text
        text = "a<turn>b"
        assert tokens(text) == ours.encode(text).ids


def test_byte_level_tokenizers_are_those_of_llama_cpp(tmp_path):
    folder = tmp_path / "model"
    tiny.save_tiny(folder, vocab_size=272)
    _, params = load(folder, progress=False)
    text = "hello <tool> I'll\n\n  pay 12345, 6 é (Ab)  \t12\n<|end|>we'LL"
    for pre in PRE_TOKENIZERS:
        ours = save_split_tokenizer(folder, pre)
        path = tmp_path / f"{pre}.gguf"
        save_gguf(path, folder, params, progress=False)
        body = {"content": text, "add_special": True, "parse_special": True}
        with llama_cpp(path) as ask:
            tokens = ask("/tokenize", body)["tokens"]
        assert tokens == ours.encode(text).ids, pre


def test_mlx_continues_a_merged_folder_as_transformers_does(tmp_path):
    base_folder, folder = tmp_path / "base", tmp_path / "merged"
    save_model(base_folder, "llama")
    config, params = load(base_folder, progress=False)
    base, lora = trees_of(params, rank=4, targets=llama.PACKED, block_size=16)
    names = decoder_names(config)
    ql.io.save_merged(folder, base, lora, names, base_folder, progress=False)
    torch.manual_seed(1)
    prompt, text, logs = continue_greedily(llama.their_model(folder))
    check_mlx(prompt, text, logs, folder)


def check_mlx(prompt, text, logs, *folders):
    """Checks the tokens and log-probabilities of mlx-lm, with or without an adapter."""
    logits = mlx_logits([prompt + text], *folders)[0]
    assert logits[31:-1].argmax(-1).tolist() == text
    log_probs = jax.nn.log_softmax(logits[[31, -1]])
    assert_close(log_probs, logs)
