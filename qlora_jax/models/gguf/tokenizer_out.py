"""Writes a checkpoint's tokenizer into a GGUF file."""

import json
import pathlib
from typing import Any

import gguf

from ..folder_tokenizer import AS_IN_FILE, NAMED, FolderTokenizer, read_object
from ..tokenizer import folder_templates, load_tokenizer
from .open_file import open_gguf
from .spm import SPACE, UNKNOWN, adds_space, is_spm, kinds_of, scores_of
from .tokenizer_in import (
    NORMAL,
    PRE_TOKENIZERS,
    SPECIAL,
    UNUSED,
    USER_DEFINED,
    make_pre_tokenizer,
)


def check_gguf_tokenizer(source: pathlib.Path) -> None:
    """Refuses a checkpoint whose tokenizer `write_gguf_tokenizer` does not write."""
    if source.suffix != ".gguf":
        raw = _read_tokenizer(FolderTokenizer(source))
        _find_scores(raw) if is_spm(raw) else _find_pre_tokenizer(raw)


def _read_tokenizer(files: FolderTokenizer) -> dict[str, Any]:
    """Returns the `tokenizer.json` of the tokenizer that training uses."""
    tokenizer, reason = files.build(), None
    if files.class_name == "LlamaTokenizer":
        reason = (
            "`tokenizer_class` in tokenizer_config.json must not be LlamaTokenizer: "
            "unlike it, llama.cpp puts a space before each part of a text between "
            f"special tokens. Set it to {AS_IN_FILE} before training to train with "
            "llama.cpp's tokens,"
        )
    elif tokenizer.encode_special_tokens:
        reason = "`split_special_tokens` in tokenizer_config.json must be false,"
    if reason:
        raise ValueError(f"{reason} or use tokenizer=False to write the model alone.")
    return json.loads(tokenizer.to_str())


def write_gguf_tokenizer(writer: Any, source: pathlib.Path, vocab_size: int) -> None:
    """Adds a tokenizer; embedding rows without a token get unused ones."""
    if source.suffix == ".gguf":
        for key, field in open_gguf(source).fields.items():
            if key.startswith("tokenizer."):
                kind, *inner = field.types
                inner = inner[-1] if inner else None
                writer.add_key_value(key, field.contents(), kind, inner)
        return
    files = FolderTokenizer(source)
    raw = _read_tokenizer(files)
    scores = _find_scores(raw) if is_spm(raw) else None
    pre = _find_pre_tokenizer(raw) if scores is None else "default"
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    kinds = [UNUSED] * vocab_size
    added = {t["content"]: t for t in raw.get("added_tokens") or []}
    ids = raw["model"]["vocab"] | {name: t["id"] for name, t in added.items()}
    if (largest := max(ids.values())) >= vocab_size:
        raise ValueError(
            f"the tokenizer's ids must be less than {vocab_size}. Got {largest}."
        )
    own = {} if scores is None else kinds_of(raw)
    for token, index in ids.items():
        special = added.get(token, {}).get("special")
        kinds[index] = SPECIAL if special else USER_DEFINED
        if token not in added or own.get(token) == UNKNOWN:
            kinds[index] = own.get(token, NORMAL)
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
    for name in NAMED:  # gguf-py knows the special tokens of one file alone
        index = ids.get(files.special.get(name, ""))
        if index is not None:
            vocab.special_token_ids[name.removesuffix("_token")] = index
    _find_ends(vocab, source)
    # gguf-py prefers older files, and reads no template without them.
    templates = folder_templates(source, read_object(source / "tokenizer_config.json"))
    vocab.chat_template = [{"name": k, "template": x} for k, x in templates.items()]
    vocab.add_to_gguf(writer, quiet=True)


def _find_ends(vocab: Any, source: pathlib.Path) -> None:
    """Sets which tokens are added around a text, where llama.cpp would guess."""
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
        message = f"a tokenizer in GGUF must be as llama.cpp's. {error}"
        raise ValueError(message) from error


def _find_pre_tokenizer(raw: dict[str, Any]) -> str:
    """Returns llama.cpp's name of the pre-tokenizer of a `tokenizer.json`."""
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
    """Drops the settings of a pre-tokenizer that do not change ids."""
    if isinstance(split, dict):
        return {k: _without_offsets(v) for k, v in split.items() if k != "trim_offsets"}
    if isinstance(split, list):
        return [_without_offsets(v) for v in split]
    return split
