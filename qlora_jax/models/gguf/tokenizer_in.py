"""Makes a tokenizer from the values of a GGUF file."""

import pathlib
from typing import Any

import qlora_jax as ql

from .open_file import field, open_gguf
from .spm import UNKNOWN, spm_tokenizer

# llama.cpp's token types.
NORMAL, SPECIAL, USER_DEFINED, UNUSED = 1, 3, 4, 5
_PREFIX = "tokenizer.ggml."
_GGUF_KEYS = ("model", "pre", "tokens", "token_type", "merges")
# Special tokens: llama.cpp's name, and Hugging Face's. The last two end a turn, too.
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
_SPECIAL |= {"padding": "pad_token", "eot": "", "eom": ""}
_WORDS = (  # what Llama 3 and Qwen2 split text into, but for numbers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By llama.cpp's name of a pre-tokenizer: the expression that text is split by ("" for
# GPT-2's, and None for GPT-2's after single digits), the normalizer, and whether known
# words skip merges.
PRE_TOKENIZERS = {
    "gpt-2": ("", None, False),
    "smollm": (None, None, False),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}", None, True),
    "smaug-bpe": (_WORDS % r"\p{N}{1,3}", None, False),
    "qwen2": (_WORDS % r"\p{N}", "NFC", False),
}


def _get(reader: Any, key: str, default: Any = None) -> Any:
    return field(reader, f"{_PREFIX}{key}", default)


def gguf_tokenizer(path: pathlib.Path) -> Any:
    """Returns the `tokenizers.Tokenizer` of a GGUF file."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    reader = open_gguf(path)
    if _get(reader, "model") == "llama":
        return _spm_from_gguf(reader)
    if missing := [key for key in _GGUF_KEYS if f"{_PREFIX}{key}" not in reader.fields]:
        names = ", ".join(f"{_PREFIX}{key}" for key in sorted(missing))
        raise ql.io.CheckpointError(f"{path} must have {names}.")
    kind, pre, tokens, kinds, merges = (_get(reader, key) for key in _GGUF_KEYS)
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            'The GGUF tokenizer must be "llama" or "gpt2" with a pre-tokenizer of '
            f"{tuple(PRE_TOKENIZERS)}. Got {(kind, pre)}. Use a folder with "
            "tokenizer.json."
        )
    _, normalizer, ignores_merges = PRE_TOKENIZERS[pre]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in merges]
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignores_merges)
    tokenizer = Tokenizer(bpe)
    if normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = make_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, kinds)
    _add_ends(tokenizer, reader, pre == "llama-bpe")
    return tokenizer


def special_tokens(reader: Any) -> tuple[dict[str, int], list[int]]:
    """Returns the ids of special tokens by Hugging Face's names, and the ends."""
    count = len(_get(reader, "tokens") or ())
    ids = {name: _get(reader, f"{name}_token_id") for name in _SPECIAL}
    ids = {n: i for n, i in ids.items() if isinstance(i, int) and 0 <= i < count}
    special = {_SPECIAL[name]: i for name, i in ids.items() if _SPECIAL[name]}
    ends = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids)
    return special, [*ends]


def chat_templates(reader: Any) -> dict[str, str]:
    """Returns the chat templates by name; the usual one is "default"."""
    start = "tokenizer.chat_template"
    keys = [key for key in reader.fields if key == start or key.startswith(f"{start}.")]
    names = [key.removeprefix(start).removeprefix(".") or "default" for key in keys]
    found = dict(zip(names, (field(reader, key) for key in keys), strict=True))
    if wrong := [name for name, text in found.items() if not isinstance(text, str)]:
        raise ql.io.CheckpointError(
            f"the chat templates of a GGUF file must be text. Got others: {wrong}."
        )
    return found


def _spm_from_gguf(reader: Any) -> Any:
    arrays = ("tokens", "token_type", "scores")
    tokens, kinds, scores = (_get(reader, key) for key in arrays)
    sizes = [len(x or ()) for x in (tokens, kinds, scores)]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ql.io.CheckpointError(
            f"tokens, token_type and scores must be as long as each other. Got {sizes}."
        )
    of = lambda *them: [t for t, k in zip(tokens, kinds, strict=True) if k in them]
    unknown = next(iter(of(UNKNOWN)), None)
    left_out = {*of(SPECIAL, USER_DEFINED, UNUSED, UNKNOWN)}
    space = _get(reader, "add_space_prefix", True)
    tokenizer = spm_tokenizer(tokens, scores, unknown, left_out, space)
    _add_tokens(tokenizer, tokens, kinds)
    _add_ends(tokenizer, reader, True)
    return tokenizer


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    def added(special: bool, *them: int) -> list:
        found = (t for t, k in zip(tokens, kinds, strict=True) if k in them)
        return [AddedToken(t, special=special, normalized=False) for t in found]

    tokenizer.add_special_tokens(added(True, SPECIAL, UNKNOWN))
    tokenizer.add_tokens(added(False, USER_DEFINED))


def _add_ends(tokenizer: Any, reader: Any, begins: bool) -> None:
    """Makes a tokenizer add the tokens that llama.cpp adds around a text."""
    from tokenizers import processors

    adds = {"bos": _get(reader, "add_bos_token", begins)}
    adds["eos"] = _get(reader, "add_eos_token", False)
    ids = {name: _get(reader, f"{name}_token_id") for name in adds if adds[name]}
    tokens = {n: tokenizer.id_to_token(i) for n, i in ids.items() if i is not None}
    if tokens:
        pieces = [tokens.get("bos"), "$A", tokens.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for piece in pieces if piece is not None],
            special_tokens=[(token, ids[name]) for name, token in tokens.items()],
        )


def make_pre_tokenizer(name: str, space: bool = False) -> Any:
    """Returns the pre-tokenizer that llama.cpp calls by this name.

    With `space`, it puts a space before a text.
    """
    from tokenizers import Regex, pre_tokenizers

    expression = PRE_TOKENIZERS[name][0]
    second = pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=not expression)
    if expression == "":
        return second
    first = pre_tokenizers.Digits(individual_digits=True)
    if expression is not None:
        first = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([first, second])
