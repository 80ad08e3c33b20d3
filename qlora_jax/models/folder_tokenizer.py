"""Builds the tokenizer of a model's folder as transformers 5.24 does.

transformers takes `tokenizer.json` as it is for some values of `tokenizer_class` only.
For the others it keeps the vocabulary, the merges and the post-processor, and splits
text as the class does. It then adds the tokens that the other files name.
"""

import json
import pathlib
from typing import TYPE_CHECKING, Any

import qlora_jax as ql

from .gguf.spm import SPACE, split_as_gemma, spm_decoder
from .gguf.tokenizer_in import make_pre_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
NAMED += ("cls_token", "mask_token")
AS_IN_FILE = "PreTrainedTokenizerFast"
_ALIASES = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# The special tokens that a class has where the files do not name them.
_END = "<|endoftext|>"
_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)
_DEFAULTS: dict[str, Any] = {
    AS_IN_FILE: {},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {f"{x}_token": f"<{x}>" for x in "unk bos eos pad mask".split()},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    "GPT2Tokenizer": _GPT2 | {"pad_token": None},
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
}
# The class that transformers prefers for a `model_type`.
_REGISTERED: dict[Any, str] = dict.fromkeys(("mistral", "mixtral", "phi3"), AS_IN_FILE)
_REGISTERED |= dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer")
_REGISTERED |= dict.fromkeys(("qwen2", "qwen3", "qwen3_moe"), "Qwen2Tokenizer")
_REGISTERED |= {"olmoe": "GPTNeoXTokenizer"}
_EXTRA, _OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
# Settings that change tokens in transformers and are not supported.
_REFUSED = ("auto_map", "fast_tokenizer_files", "fix_mistral_regex", "init_inputs")
_REFUSED += ("model_specific_special_tokens", "post_processor", "tokenizer_object")
_REFUSED += ("trust_remote_code",)
_CLEANUP = "clean_up_tokenization_spaces"
_FORCED_CLEANUP = f"{_CLEANUP}_for_bpe_even_though_it_will_corrupt_output"


def read_text(path: pathlib.Path) -> str:
    """Returns the UTF-8 text of a file."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be text in UTF-8. {error}") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object of a file; an empty one if there is no file."""
    if not path.exists():
        return {}
    value = ql.io.parse_json(read_text(path).encode(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return value


class FolderTokenizer:
    """The special tokens of a folder, and how its tokenizer is built.

    Attributes:
        class_name: The class that transformers uses.
        special: The text of each special token by its name, such as `eos_token`.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads the settings, and `tokenizer.json` if there is one.

        Raises:
            ValueError: If a setting would change tokens and is not supported.
        """
        # 1. The settings and the class.
        file = folder / "tokenizer.json"
        self._text = read_text(file) if file.exists() else "{}"
        self._raw = json.loads(self._text)
        self._settings, model_named = _read_settings(folder)
        config = read_object(folder / "config.json")
        self.class_name = _find_class(self._settings, config, self._text)
        _check_settings(self._settings, self.class_name, self._raw.get("model") or {})
        # 2. The special tokens, with and without names.
        padding = self._raw.get("padding") or {}
        values = {"pad_token": padding.get("pad_token")} | _DEFAULTS[self.class_name]
        values |= self._settings
        named = {name: values.get(name) for name in NAMED} | model_named
        older_extra = self._settings.get(_OLDER_EXTRA)
        self._unnamed = self._settings.get(_EXTRA, older_extra) or []
        for token in [*named.values(), *self._unnamed]:
            if token is not None and not _is_token(token):
                raise ValueError(f"a special token must be text. Got {token!r:.40}.")
        # 3. The other added tokens. A special token has the flags that it has there.
        self._added = _read_added(folder, self._settings, self._raw)
        by_text = {str(token): token for token in self._added.values()}
        self._named = {k: by_text.get(str(x), x) for k, x in named.items() if x}
        self.special = {name: str(token) for name, token in self._named.items()}

    def build(self) -> "Tokenizer":
        """Returns the tokenizer."""
        from tokenizers import AddedToken, Tokenizer

        if not self._raw:
            raise ValueError("there must be a file tokenizer.json.")
        is_rebuilt = self.class_name != AS_IN_FILE
        tokenizer = self._rebuild() if is_rebuilt else Tokenizer.from_str(self._text)
        # Tokens of the vocabulary keep their ids. Others are numbered in this order.
        tokens: list[Any] = [self._added[index] for index in sorted(self._added)]
        texts = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        texts |= {str(token) for token in tokens}
        special = [*self._named.values(), *self._unnamed]
        tokens += [token for token in special if str(token) not in texts]
        if self.class_name == "Qwen2Tokenizer":
            tokens += map(str, special)  # once more, without their flags
        for i, token in enumerate(tokens):
            if isinstance(token, str):
                tokens[i] = AddedToken(token, special=True)
            elif token.content in self.special.values():
                token.special = True
        tokenizer.add_tokens(tokens)
        splits = bool(self._settings.get("split_special_tokens"))
        tokenizer.encode_special_tokens = splits
        return tokenizer

    def _rebuild(self) -> "Tokenizer":
        """Returns the file's vocabulary and merges, with the parts of the class."""
        from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

        name, space = self.class_name, self._settings.get("add_prefix_space")
        is_spm = name in ("LlamaTokenizer", "GemmaTokenizer")
        model = dict(self._raw["model"], dropout=None, ignore_merges=False)
        model |= {"fuse_unk": is_spm, "byte_fallback": is_spm, "unk_token": None}
        if name == "GemmaTokenizer":
            model["unk_token"] = self.special.get("unk_token")
        parts = ("normalizer", "pre_tokenizer", "decoder", "padding", "truncation")
        parts += ("post_processor",) * (name == "GPTNeoXTokenizer")
        raw = self._raw | dict.fromkeys(parts) | {"model": model, "added_tokens": []}
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        if name == "LlamaTokenizer":
            space = space is None or bool(space)
            scheme = "always" if self._settings.get("legacy") else "first"
            split = pre_tokenizers.Metaspace(SPACE, scheme if space else "never", False)
            tokenizer.pre_tokenizer = split
            tokenizer.decoder = spm_decoder(space)
        elif name == "GemmaTokenizer":
            split_as_gemma(tokenizer)
        else:
            split = pre_tokenizers.ByteLevel(add_prefix_space=bool(space))
            if name == "Qwen2Tokenizer":
                split = make_pre_tokenizer("qwen2", bool(space))
            if name != "GPT2Tokenizer":
                tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
        return tokenizer


def _is_token(value: Any) -> bool:
    from tokenizers import AddedToken

    return isinstance(value, str | AddedToken)


def _parse_tokens(value: Any) -> Any:
    """Makes an AddedToken of each object with a `content`."""
    from tokenizers import AddedToken

    if isinstance(value, list):
        return [_parse_tokens(x) for x in value]
    if not isinstance(value, dict):
        return value
    if "content" not in value:
        return {key: _parse_tokens(x) for key, x in value.items()}
    return AddedToken(**{k: x for k, x in value.items() if k not in ("__type", "id")})


def _read_settings(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings, and the special tokens of this model alone by name.

    Those are tokens such as `image_token`. `special_tokens_map.json` counts if the
    newer `added_tokens_decoder` is missing.
    """
    settings = _parse_tokens(read_object(folder / "tokenizer_config.json"))
    if _OLDER_EXTRA in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_OLDER_EXTRA)
    has_names = isinstance(settings.get(_EXTRA), dict)
    extra_names = settings.pop(_EXTRA) if has_names else {}
    if "added_tokens_decoder" not in settings:
        older = read_object(folder / "special_tokens_map.json")
        if _EXTRA in older:
            raise ValueError(
                f"`{_EXTRA}` must be in tokenizer_config.json, not in "
                "special_tokens_map.json."
            )
        flag = {"special": True}
        older = {k: x | flag if isinstance(x, dict) else x for k, x in older.items()}
        older = _parse_tokens(older)
        replaced = {k: older[k] for k in (*NAMED, _OLDER_EXTRA) if k in older}
        settings = older | settings | replaced
    ignored = (*NAMED, "add_bos_token", "add_eos_token")
    names = [k for k in settings if k.endswith("_token") and k not in ignored]
    named = {name: settings[name] for name in names if _is_token(settings[name])}
    return settings, named | extra_names


def _read_added(
    folder: pathlib.Path, settings: dict[str, Any], raw: dict[str, Any]
) -> dict[int, Any]:
    """Returns the added tokens by index: those of the newest source that there is."""
    from tokenizers import AddedToken

    if "added_tokens_decoder" in settings:
        decoder = settings["added_tokens_decoder"].items()
        return {int(index): token for index, token in decoder}
    special = {str(settings.get(name)) for name in NAMED}
    special |= {str(token) for token in settings.get(_EXTRA) or ()}
    added = {}
    for text, index in read_object(folder / "added_tokens.json").items():
        flags = {"special": text in special, "normalized": text not in special}
        added[index] = AddedToken(text, **flags)
    tokens = raw.get("added_tokens") or ()
    return added | {token["id"]: _parse_tokens(token) for token in tokens}


def _find_class(settings: dict[str, Any], config: dict[str, Any], text: str) -> str:
    """Returns the class that transformers' AutoTokenizer chooses."""
    kind = config.get("model_type")
    is_trusted = kind not in ("phi3", "qwen2")  # whether `tokenizer_class` counts
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    name = AS_IN_FILE if declared in _ALIASES else declared
    if name.removesuffix("Fast") == "LlamaTokenizer" and '"ByteLevel"' in text:
        name = AS_IN_FILE
        if is_trusted:
            return name
    registered = _REGISTERED.get(kind, name)
    if registered == AS_IN_FILE or not declared or not is_trusted:
        return registered
    return name if name == AS_IN_FILE else name.removesuffix("Fast")


def _check_settings(settings: dict[str, Any], name: str, model: dict[str, Any]) -> None:
    """Refuses the class and settings that change tokens and are not supported."""
    is_bpe = model.get("type", "BPE") == "BPE"
    refused = [key for key in _REFUSED if settings.get(key)]
    if settings.get(_CLEANUP) and (not is_bpe or settings.get(_FORCED_CLEANUP)):
        refused.append(_CLEANUP)  # changes decoded text
    if name not in _DEFAULTS or (name != AS_IN_FILE and not is_bpe):
        refused.append("tokenizer_class")
    if refused:
        names = " and ".join(f"`{key}`" for key in refused)
        values = {key: settings.get(key) for key in refused}
        raise ValueError(
            f"{names} in tokenizer_config.json would change tokens in a way that is "
            f"not supported. Got {values}. If tokenizer.json is right as it is, remove "
            f"{names}, or set `tokenizer_class` to {AS_IN_FILE}."
        )
