"""Tokenizers of checkpoints: `tokenizer.json`, and the metadata of GGUF files."""

import json
import pathlib
from typing import Any

import qlora_jax as ql

from .gguf_in import field, open_gguf
from .tokenizer_spm import (
    SPACE,
    UNKNOWN,
    adds_space,
    is_spm,
    kinds_of,
    scores_of,
    spm_tokenizer,
)

# llama.cpp's token types.
_NORMAL, _SPECIAL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_GGUF_KEYS = ("model", "pre", "tokens", "token_type", "merges")
_WORDS = (  # what Llama 3 and Qwen2 split text into, but for numbers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By llama.cpp's name of a pre-tokenizer: the expression that text is split by (None for
# GPT-2's, after single digits), the normalizer, and whether whole words skip merges.
PRE_TOKENIZERS = {
    "smollm": (None, None, False),
    "llama-bpe": (_WORDS % r"\p{N}{1,3}", None, True),
    "smaug-bpe": (_WORDS % r"\p{N}{1,3}", None, False),
    "qwen2": (_WORDS % r"\p{N}", "NFC", False),
}


def load_tokenizer(path: str | pathlib.Path) -> Any:
    """Reads the tokenizer of a checkpoint.

    Args:
        path: A folder with `tokenizer.json`, or a `.gguf` file whose tokenizer is a
            byte-level BPE with a pre-tokenizer that we know.

    Returns:
        A `tokenizers.Tokenizer`.

    Raises:
        ValueError: If a `.gguf` file's tokenizer is of another kind.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.tiny import save_tiny
        >>> tokenizer = load_tokenizer(save_tiny(tempfile.mkdtemp()))
        >>> len(tokenizer.encode("four").ids)
        4
    """
    import tokenizers

    path = pathlib.Path(path)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))


def _from_gguf(path: pathlib.Path):
    from tokenizers import Tokenizer, decoders, models, normalizers

    reader = open_gguf(path)
    fields = reader.fields
    if field(reader, "tokenizer.ggml.model") == "llama":
        return _spm_from_gguf(reader)
    keys = {key: f"tokenizer.ggml.{key}" for key in _GGUF_KEYS}
    if missing := sorted({*keys.values()} - {*fields}):
        raise ql.io.CheckpointError(f"{path} must have {', '.join(missing)}.")
    get = lambda key: fields[keys[key]].contents()
    kind, pre = get("model"), get("pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise ValueError(
            'The GGUF tokenizer must be "llama" or "gpt2" with a pre-tokenizer of '
            f"{tuple(PRE_TOKENIZERS)}. Got {(kind, pre)}. Use a folder with "
            "tokenizer.json."
        )
    _, normalizer, ignores_merges = PRE_TOKENIZERS[pre]
    tokens, kinds = get("tokens"), get("token_type")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges")]
    bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=ignores_merges)
    tokenizer = Tokenizer(bpe)
    if normalizer is not None:
        tokenizer.normalizer = getattr(normalizers, normalizer)()
    tokenizer.pre_tokenizer = make_pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    _add_tokens(tokenizer, tokens, kinds)
    _add_ends(tokenizer, reader, pre == "llama-bpe")
    return tokenizer


def _spm_from_gguf(reader: Any) -> Any:
    get = lambda key, default=None: field(reader, f"tokenizer.ggml.{key}", default)
    tokens, kinds, scores = (get(key) for key in ("tokens", "token_type", "scores"))
    sizes = [len(x or ()) for x in (tokens, kinds, scores)]
    if not sizes[0] or len(set(sizes)) > 1:
        raise ql.io.CheckpointError(
            f"tokens, token_type and scores must be as long as each other. Got {sizes}."
        )
    of = lambda *them: [t for t, k in zip(tokens, kinds, strict=True) if k in them]
    unknown = next(iter(of(UNKNOWN)), None)
    left_out = {*of(_SPECIAL, _USER_DEFINED, _UNUSED, UNKNOWN)}
    space = get("add_space_prefix", True)
    tokenizer = spm_tokenizer(tokens, scores, unknown, left_out, space)
    _add_tokens(tokenizer, tokens, kinds)
    _add_ends(tokenizer, reader, True)
    return tokenizer


def _add_tokens(tokenizer: Any, tokens: list[str], kinds: list[int]) -> None:
    from tokenizers import AddedToken

    def added(special: bool, *them: int) -> list:
        found = (t for t, k in zip(tokens, kinds, strict=True) if k in them)
        return [AddedToken(t, special=special, normalized=False) for t in found]

    tokenizer.add_special_tokens(added(True, _SPECIAL, UNKNOWN))
    tokenizer.add_tokens(added(False, _USER_DEFINED))


def _add_ends(tokenizer: Any, reader: Any, begins: bool) -> None:
    """Makes a tokenizer add the tokens around a text that llama.cpp adds."""
    from tokenizers import processors

    value = lambda key, default=None: field(reader, f"tokenizer.ggml.{key}", default)
    adds = {"bos": value("add_bos_token", begins)}
    adds["eos"] = value("add_eos_token", False)
    ids = {
        name: value(f"{name}_token_id") for name, is_added in adds.items() if is_added
    }
    tokens = {
        name: tokenizer.id_to_token(i) for name, i in ids.items() if i is not None
    }
    if tokens:
        pieces = [tokens.get("bos"), "$A", tokens.get("eos")]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[piece for piece in pieces if piece is not None],
            special_tokens=[(token, ids[name]) for name, token in tokens.items()],
        )


def make_pre_tokenizer(name: str) -> Any:
    """Returns the pre-tokenizer that llama.cpp calls by this name."""
    from tokenizers import Regex, pre_tokenizers

    expression = PRE_TOKENIZERS[name][0]
    if expression is None:
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        first = pre_tokenizers.Split(Regex(expression), "isolated")
    second = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=expression is None
    )
    return pre_tokenizers.Sequence([first, second])


def check_gguf_tokenizer(source: pathlib.Path) -> None:
    """Refuses a checkpoint whose tokenizer `write_gguf_tokenizer` does not write.

    Raises:
        ValueError: If its tokenizer is of another kind.
    """
    if source.suffix != ".gguf":
        raw = json.loads((source / "tokenizer.json").read_text("utf-8"))
        _find_scores(raw) if is_spm(raw) else _find_pre_tokenizer(raw)


def write_gguf_tokenizer(writer: Any, source: pathlib.Path, vocab_size: int) -> None:
    """Adds a checkpoint's tokenizer to a `gguf.GGUFWriter`.

    Args:
        writer: The writer.
        source: A `.gguf` file, whose tokenizer is copied; or a folder with
            `tokenizer.json`, which must be a byte-level BPE with a pre-tokenizer that
            we know.
        vocab_size: Rows of the embedding; those without a token get unused ones.

    Raises:
        ValueError: If the tokenizer is of another kind.
    """
    import gguf

    if source.suffix == ".gguf":
        for key, field in open_gguf(source).fields.items():
            if key.startswith("tokenizer."):
                kind, *inner = field.types
                inner = inner[-1] if inner else None
                writer.add_key_value(key, field.contents(), kind, inner)
        return
    raw = json.loads((source / "tokenizer.json").read_text("utf-8"))
    scores = _find_scores(raw) if is_spm(raw) else None
    pre = _find_pre_tokenizer(raw) if scores is None else "default"
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    added = {t["content"]: t for t in raw.get("added_tokens") or []}
    ids = raw["model"]["vocab"] | {name: t["id"] for name, t in added.items()}
    if (largest := max(ids.values())) >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be less than {vocab_size}. Got {largest}."
        )
    own = {} if scores is None else kinds_of(raw)
    for token, index in ids.items():
        special = added.get(token, {}).get("special")
        kinds[index] = _SPECIAL if special else _USER_DEFINED
        if token not in added or own.get(token) == UNKNOWN:
            kinds[index] = own.get(token, _NORMAL)
        tokens[index] = token
    writer.add_tokenizer_model("gpt2" if scores is None else "llama")
    writer.add_tokenizer_pre(pre)
    if scores is not None:
        writer.add_token_scores([scores.get(token, 0.0) for token in tokens])
        writer.add_add_space_prefix(adds_space(raw))
        for token, about in added.items():  # which are looked for before spaces change
            if about.get("normalized") and not about.get("special"):
                tokens[ids[token]] = token.replace(SPACE, " ")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    vocab = gguf.SpecialVocab(source, load_merges=scores is None, n_vocab=vocab_size)
    _find_ends(vocab, source)
    vocab.add_to_gguf(writer, quiet=True)


def _find_ends(vocab: Any, source: pathlib.Path) -> None:
    """Says which tokens are added around a text, where llama.cpp would guess.

    Raises:
        ValueError: If they are not those that it can add.
    """
    tokenizer = load_tokenizer(source)
    whole = tokenizer.encode("a").ids
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    at = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    ends = {"bos": whole[:at], "eos": whole[at + len(bare) :]}
    for name, found in ends.items():
        known = vocab.special_token_ids.get(name)
        if found not in ([], [known]):
            raise ValueError(
                f"a tokenizer in GGUF must add `{name}_token` to a text, or nothing. "
                f"Got the ids {found}; `{name}_token` has {known}."
            )
        vocab.add_special_token[name] = bool(found)


def _find_scores(raw: dict[str, Any]) -> dict[str, float]:
    try:
        return scores_of(raw)
    except ValueError as error:
        raise ValueError(f"a tokenizer in GGUF must be as llama.cpp's. {error}") from (
            error
        )


def _find_pre_tokenizer(raw: dict[str, Any]) -> str:
    """Returns llama.cpp's name of what a `tokenizer.json` splits text by."""
    model = raw.get("model") or {}
    got = (
        _without_offsets(raw.get("pre_tokenizer")),
        (raw.get("normalizer") or {}).get("type"),
        bool(model.get("ignore_merges")),
    )
    for name, (_, normalizer, ignores_merges) in PRE_TOKENIZERS.items():
        split = json.loads(make_pre_tokenizer(name).__getstate__())
        wanted = _without_offsets(split), normalizer, ignores_merges
        if model.get("type") == "BPE" and got == wanted:
            return name
    raise ValueError(
        "a tokenizer in GGUF must be SentencePiece's BPE, as Gemma's, or a byte-level "
        f"BPE that splits text as one of {tuple(PRE_TOKENIZERS)} do. Got "
        f"{model.get('type')!r} with {got}. Use "
        "tokenizer=False to write the model alone."
    )


def _without_offsets(split: Any) -> Any:
    """Leaves out of a pre-tokenizer what ids do not depend on."""
    if isinstance(split, dict):
        return {k: _without_offsets(v) for k, v in split.items() if k != "trim_offsets"}
    if isinstance(split, list):
        return [_without_offsets(v) for v in split]
    return split
