"""Builds a tokenizer from the metadata of a GGUF file.

GGUF calls byte-level BPE "gpt2", and SentencePiece's BPE (Gemma, Llama 2, Phi-3)
"llama". A `tokenizer.json` lists the merges in order. For "llama", GGUF has a score for
each token instead: the pair that forms the token with the highest score merges first.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import qlora_jax as ql

from .file import GGUFFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.decoders import Decoder
    from tokenizers.pre_tokenizers import PreTokenizer

# llama.cpp's token types.
NORMAL, UNKNOWN, SPECIAL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # how SentencePiece writes a space
BYTE_TOKENS = {f"<0x{byte:02X}>": byte for byte in range(256)}
_PREFIX = "tokenizer.ggml."
_BPE_KEYS = ("model", "pre", "tokens", "token_type", "merges")
# Special tokens: Hugging Face's name by llama.cpp's. "eot" and "eom" end a turn, like
# "eos", but Hugging Face has no name for them.
_HF_NAMES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token"}
_HF_NAMES |= {"padding": "pad_token", "eot": "", "eom": ""}
# The expression by which Llama 3 and Qwen2 split text; %s is the part for numbers.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In Qwen3.5, marks belong to letters.
_WORDS_WITH_MARKS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _PreTokenizer(NamedTuple):
    expression: str | None  # splits text; None for GPT-2's expression
    normalizer: str | None = None  # its name in `tokenizers`
    ignores_merges: bool = False  # whether a word that is itself a token skips them
    splits_digits: bool = False  # whether each digit is split off first


# By llama.cpp's names.
PRE_TOKENIZERS = {
    "gpt-2": _PreTokenizer(None),
    "smollm": _PreTokenizer(None, splits_digits=True),
    "llama-bpe": _PreTokenizer(_WORDS % r"\p{N}{1,3}", ignores_merges=True),
    "smaug-bpe": _PreTokenizer(_WORDS % r"\p{N}{1,3}"),
    "qwen2": _PreTokenizer(_WORDS % r"\p{N}", "NFC"),
    "qwen35": _PreTokenizer(_WORDS_WITH_MARKS, "NFC"),
}


def _get(file: GGUFFile, key: str, default: Any = None) -> Any:
    return file.values.get(f"{_PREFIX}{key}", default)


def gguf_tokenizer(file: GGUFFile) -> "Tokenizer":
    """Returns the `tokenizers.Tokenizer` of a GGUF file."""
    if _get(file, "model") == "llama":
        return _read_spm(file)
    missing = [f"{_PREFIX}{key}" for key in sorted(_BPE_KEYS)]
    missing = [key for key in missing if key not in file.values]
    if missing:
        raise ql.io.CheckpointError(f"{file.path} must have {', '.join(missing)}.")
    return _read_bpe(file)


def _read_bpe(file: GGUFFile) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    model, pre, tokens, types, merges = (_get(file, key) for key in _BPE_KEYS)
    if model != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            'The GGUF tokenizer must be "llama", or "gpt2" with one of the '
            f"pre-tokenizers {tuple(PRE_TOKENIZERS)}. Got {(model, pre)}. Use a folder "
            "with tokenizer.json."
        )
    settings = PRE_TOKENIZERS[pre]
    _check_lengths(tokens=tokens, token_type=types)
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if wrong := [merge for merge in merges if " " not in merge]:
        raise ql.io.CheckpointError(
            "the merges of a GGUF file must be pairs of tokens with a space between "
            f"them. Got {wrong[:3]}."
        )
    bpe = models.BPE(vocab=vocab, merges=pairs, ignore_merges=settings.ignores_merges)
    tokenizer = Tokenizer(bpe)
    if settings.normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, settings.normalizer)()
    tokenizer.pre_tokenizer = make_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, types)
    _add_bos_and_eos(tokenizer, file, adds_bos=pre == "llama-bpe")
    return tokenizer


def _read_spm(file: GGUFFile) -> "Tokenizer":
    from tokenizers import Tokenizer, models, normalizers

    keys = ("tokens", "token_type", "scores")
    tokens, types, scores = (_get(file, key) for key in keys)
    _check_lengths(tokens=tokens, token_type=types, scores=scores)
    # 1. Merges form all tokens except special and added ones.
    unknown = next(iter(_tokens_of_types(tokens, types, UNKNOWN)), None)
    unmerged = _tokens_of_types(tokens, types, SPECIAL, USER_DEFINED, UNUSED, UNKNOWN)
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [p for t in vocab.keys() - {*unmerged} for p in split_pairs(t, vocab)]
    # Higher scores merge first; with equal scores, pairs with a longer left token.
    pairs.sort(
        key=lambda p: (scores[vocab["".join(p)]], len(p[0]), len(p[1])), reverse=True
    )
    bpe = models.BPE(
        vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    # 2. Spaces: Llama and Phi put one before a text, but Gemma does not.
    if _get(file, "add_space_prefix", True):
        replace = normalizers.Replace(" ", SPACE)
        prepend = normalizers.Prepend(SPACE)
        tokenizer.normalizer = normalizers.Sequence([prepend, replace])
        tokenizer.decoder = spm_decoder(strips=True)
    else:
        split_as_gemma(tokenizer)
    # 3. Add the tokens that no merge forms, and those before and after a text.
    _add_tokens(tokenizer, tokens, types)
    _add_bos_and_eos(tokenizer, file, adds_bos=True)
    return tokenizer


def _check_lengths(**arrays: Sequence[object] | None) -> None:
    """Checks that arrays with an item for each token have one length, and not 0."""
    sizes = {name: len(array or ()) for name, array in arrays.items()}
    if 0 in sizes.values() or len({*sizes.values()}) > 1:
        raise ql.io.CheckpointError(
            f"{', '.join(sizes)} must have the same length, and at least one item. Got "
            f"{sizes}."
        )


def split_pairs(token: str, vocab: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yields the pairs of tokens that concatenate to a token; none for a byte token."""
    if token in BYTE_TOKENS:
        return
    for i in range(1, len(token)):
        if token[:i] in vocab and token[i:] in vocab:
            yield token[:i], token[i:]


def spm_decoder(strips: bool) -> "Decoder":
    """Returns SentencePiece's decoder; if `strips`, it removes one leading space."""
    from tokenizers import decoders

    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strips)


def split_as_gemma(tokenizer: "Tokenizer") -> None:
    """Makes a tokenizer treat spaces as Gemma does: it adds none before the text."""
    from tokenizers import normalizers, pre_tokenizers

    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = spm_decoder(strips=False)


def special_tokens(file: GGUFFile) -> tuple[dict[str, int], list[int]]:
    """Returns special token ids by Hugging Face name, and the ids that end a turn."""
    num_tokens = len(_get(file, "tokens") or ())
    ids = {name: _get(file, f"{name}_token_id") for name in _HF_NAMES}
    ids = {n: i for n, i in ids.items() if isinstance(i, int) and 0 <= i < num_tokens}
    special = {_HF_NAMES[name]: i for name, i in ids.items() if _HF_NAMES[name]}
    ends = dict.fromkeys(ids[name] for name in ("eos", "eot", "eom") if name in ids)
    return special, [*ends]


def chat_templates(file: GGUFFile) -> dict[str, str]:
    """Returns the chat templates by name; the main one is "default"."""
    prefix = "tokenizer.chat_template"
    keys = [k for k in file.values if k == prefix or k.startswith(f"{prefix}.")]
    names = [key.removeprefix(prefix).removeprefix(".") or "default" for key in keys]
    templates = dict(zip(names, (file.values[key] for key in keys), strict=True))
    if wrong := [name for name, text in templates.items() if not isinstance(text, str)]:
        raise ql.io.CheckpointError(
            "the chat templates of a GGUF file must be text. Got other values for "
            f"{wrong}."
        )
    return templates


def _tokens_of_types(
    tokens: Sequence[str], types: Sequence[int], *selected: int
) -> list[str]:
    return [t for t, kind in zip(tokens, types, strict=True) if kind in selected]


def _add_tokens(
    tokenizer: "Tokenizer", tokens: Sequence[str], types: Sequence[int]
) -> None:
    from tokenizers import AddedToken

    special = _tokens_of_types(tokens, types, SPECIAL, UNKNOWN)
    user_defined = _tokens_of_types(tokens, types, USER_DEFINED)
    flags = {"normalized": False}
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, **flags) for text in special]
    )
    tokenizer.add_tokens(
        [AddedToken(text, special=False, **flags) for text in user_defined]
    )


def _add_bos_and_eos(tokenizer: "Tokenizer", file: GGUFFile, adds_bos: bool) -> None:
    """Makes a tokenizer add the tokens that llama.cpp adds before and after a text.

    `adds_bos` is llama.cpp's default for files without `add_bos_token`.
    """
    from tokenizers import processors

    adds = {"bos": _get(file, "add_bos_token", adds_bos)}
    adds["eos"] = _get(file, "add_eos_token", False)
    ids = {name: _get(file, f"{name}_token_id") for name in adds if adds[name]}
    tokens: dict[str, str] = {}
    for name, index in ids.items():
        is_id = isinstance(index, int) and index >= 0
        token = tokenizer.id_to_token(index) if is_id else None
        if token is None:
            # llama.cpp would add a default token, whose id is 1 for "llama" and 11 for
            # "gpt2". In most vocabularies, token 11 is an ordinary one.
            raise ql.io.CheckpointError(
                f"`{_PREFIX}{name}_token_id` must be the id of a token. Got {index!r}. "
                "This token is added to each text. If the model needs none, set "
                f"`{_PREFIX}add_{name}_token` to false."
            )
        tokens[name] = token
    if tokens:
        pieces = [tokens.get("bos"), "$A", tokens.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for piece in pieces if piece is not None],
            special_tokens=[(token, ids[name]) for name, token in tokens.items()],
        )


def make_pre_tokenizer(name: str, space: bool = False) -> "PreTokenizer":
    """Returns the pre-tokenizer that has this name in llama.cpp.

    If `space` is true, the pre-tokenizer puts a space before a text.
    """
    from tokenizers import Regex, pre_tokenizers

    settings = PRE_TOKENIZERS[name]
    # `use_regex` splits by GPT-2's expression.
    byte_level = pre_tokenizers.ByteLevel(
        add_prefix_space=space, use_regex=settings.expression is None
    )
    if settings.splits_digits:
        splitter = pre_tokenizers.Digits(individual_digits=True)
    elif settings.expression is not None:
        splitter = pre_tokenizers.Split(Regex(settings.expression), "isolated")
    else:
        return byte_level
    return pre_tokenizers.Sequence([splitter, byte_level])
