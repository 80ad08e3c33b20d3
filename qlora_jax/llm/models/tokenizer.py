"""Reads the tokenizers and the chat templates of folders.

A folder's tokenizer is built in the same way as by transformers 5.24, which uses
`tokenizer.json` unchanged only for some values of `tokenizer_class`. For the others, it
takes the vocabulary, the merges and the post-processor from that file, and the class
determines how text is split. Then it adds the tokens that the other files define.
"""

import json
import pathlib
from typing import TYPE_CHECKING, Any

import qlora_jax as ql

from ..gguf.pre_tokenizers import make_pre_tokenizer
from ..reading import reading

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import Decoder

SPACE = "\u2581"  # how SentencePiece writes a space
# The keys of special tokens in `tokenizer_config.json`.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
NAMED += ("cls_token", "mask_token")
# The class that uses `tokenizer.json` unchanged, and its other names.
AS_IN_FILE = "PreTrainedTokenizerFast"
_ALIASES = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
# The special tokens of each class, where the files do not define them.
_END = "<|endoftext|>"
_GPT2 = dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)
_DEFAULTS: dict[str, dict[str, Any]] = {
    AS_IN_FILE: {},
    "LlamaTokenizer": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    "GemmaTokenizer": {f"{x}_token": f"<{x}>" for x in "unk bos eos pad mask".split()},
    "Qwen2Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    "Qwen3_5Tokenizer": dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END),
    "GPT2Tokenizer": _GPT2 | {"pad_token": None},
    "GPTNeoXTokenizer": _GPT2 | {"pad_token": "<|padding|>"},
}
# The values of `model_type` for which transformers prefers each class.
_MODEL_TYPES = {
    AS_IN_FILE: "mistral mixtral phi3 glm4 glm4_moe_lite granite ministral3 mistral3 "
    "olmo2 olmo3",
    "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text",
    "Qwen2Tokenizer": "qwen2 qwen2_moe qwen3 qwen3_moe qwen2_5_vl qwen3_vl",
    "Qwen3_5Tokenizer": "qwen3_5 qwen3_5_text qwen3_5_moe qwen3_5_moe_text",
    "GPT2Tokenizer": "starcoder2",
    "GPTNeoXTokenizer": "olmoe",
}
_REGISTERED = {x: name for name, text in _MODEL_TYPES.items() for x in text.split()}
_EXTRA, _OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
# Settings that change tokens in transformers and are not supported.
_UNSUPPORTED = ("auto_map", "fast_tokenizer_files", "fix_mistral_regex", "init_inputs")
_UNSUPPORTED += ("model_specific_special_tokens", "post_processor", "tokenizer_object")
_UNSUPPORTED += ("trust_remote_code",)
_CLEANUP = "clean_up_tokenization_spaces"
_FORCED_CLEANUP = f"{_CLEANUP}_for_bpe_even_though_it_will_corrupt_output"


def folder_templates(folder: pathlib.Path, settings: dict[str, Any]) -> dict[str, str]:
    """Returns the chat templates of a folder by name; the main one is "default".

    `settings` are the values in its `tokenizer_config.json`.
    """
    if (file := folder / "chat_template.jinja").exists():
        templates = {"default": read_text(file)}
        for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            templates[file.stem] = read_text(file)
        return templates
    template = settings.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    templates = {}
    for item in template if isinstance(template, list) else [None]:
        pair = isinstance(item, dict) and (item.get("name"), item.get("template"))
        if not pair or not all(isinstance(x, str) for x in pair):
            raise ValueError(
                "`chat_template` in tokenizer_config.json must be text, or a list of "
                f"objects with a name and a template. Got {template!r:.60}."
            )
        templates[pair[0]] = pair[1]
    return templates


def read_text(path: pathlib.Path) -> str:
    """Returns the UTF-8 text of a file."""
    if not path.is_file():
        raise ValueError(f"{path} must be a file.")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text. {error}") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or an empty one if there is no file."""
    if not path.exists():
        return {}
    value = ql.io.parse_json(read_text(path).encode(), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object.")
    return value


class FolderTokenizer:
    """Finds the special tokens of a folder, and builds its tokenizer.

    Attributes:
        class_name: The tokenizer class that transformers uses.
        special: The text of each special token by its name, such as `eos_token`.
    """

    def __init__(self, folder: pathlib.Path):
        """Reads the settings, and `tokenizer.json` if there is one.

        Raises:
            ValueError: If a setting would change tokens and is not supported.
        """
        # 1. The settings and the class.
        self._file = file = folder / "tokenizer.json"
        self._text = read_text(file) if file.exists() else "{}"
        try:
            self._raw = json.loads(self._text)
        except ValueError as error:
            raise ValueError(f"{file} must be JSON. {error}") from error
        if not isinstance(self._raw, dict):
            raise ValueError(f"{file} must contain a JSON object.")
        self._settings, extra_named = _read_settings(folder)
        config = read_object(folder / "config.json")
        self.class_name = _find_class(self._settings, config, self._text)
        _check_settings(self._settings, self.class_name, self._raw.get("model") or {})
        # 2. The special tokens, with and without names. Settings override the defaults
        # of the class.
        padding = self._raw.get("padding") or {}
        values = {"pad_token": padding.get("pad_token")} | _DEFAULTS[self.class_name]
        values |= self._settings
        named = {name: values.get(name) for name in NAMED} | extra_named
        older_extra = self._settings.get(_OLDER_EXTRA)
        self._unnamed = self._settings.get(_EXTRA, older_extra) or []
        if not isinstance(self._unnamed, list):
            # If it were text, its characters would become tokens.
            raise ValueError(
                f"`{_EXTRA}` must be a list or an object. Got {self._unnamed!r:.60}."
            )
        for token in [*named.values(), *self._unnamed]:
            if token is not None and not _is_token(token):
                raise ValueError(f"a special token must be text. Got {token!r:.40}.")
        # 3. The added tokens. If a special token is also in this list, the flags of the
        # added token are the ones that count.
        self._added = _read_added(folder, self._settings, self._raw)
        by_text = {str(token): token for token in self._added.values()}
        self._named = {k: by_text.get(str(x), x) for k, x in named.items() if x}
        self.special = {name: str(token) for name, token in self._named.items()}

    def build(self) -> "Tokenizer":
        """Returns the tokenizer."""
        from tokenizers import AddedToken, Tokenizer

        if not self._raw:
            raise ValueError(f"{self._file} must exist, and contain a tokenizer.")
        is_rebuilt = self.class_name != AS_IN_FILE
        with reading(self._file):
            tokenizer = (
                self._rebuild() if is_rebuilt else Tokenizer.from_str(self._text)
            )
        # Tokens in the vocabulary keep their ids. The others get the next ids, in the
        # order of this list.
        tokens: list[str | AddedToken] = [x for _, x in sorted(self._added.items())]
        texts = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
        texts |= {str(token) for token in tokens}
        special = [*self._named.values(), *self._unnamed]
        tokens += [token for token in special if str(token) not in texts]
        if self.class_name == "Qwen2Tokenizer":
            # This class adds its special tokens once more, without their flags.
            tokens += map(str, special)
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
        """Builds the tokenizer from the file's vocabulary and merges, and the class."""
        from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

        name, prefix_space = self.class_name, self._settings.get("add_prefix_space")
        # 1. Keep the file's model and, except in GPT-NeoX, its post-processor. Drop the
        # other parts.
        is_spm = name in ("LlamaTokenizer", "GemmaTokenizer")
        model = dict(self._raw["model"], dropout=None, ignore_merges=False)
        model |= {"fuse_unk": is_spm, "byte_fallback": is_spm, "unk_token": None}
        if name == "GemmaTokenizer":
            model["unk_token"] = self.special.get("unk_token")
        dropped = ["normalizer", "pre_tokenizer", "decoder", "padding", "truncation"]
        if name == "GPTNeoXTokenizer":
            dropped.append("post_processor")
        raw = self._raw | dict.fromkeys(dropped) | {"model": model, "added_tokens": []}
        tokenizer = Tokenizer.from_str(json.dumps(raw))
        # 2. Add the parts that the class defines.
        if name == "LlamaTokenizer":
            has_prefix = prefix_space is None or bool(prefix_space)
            scheme = "always" if self._settings.get("legacy") else "first"
            scheme = scheme if has_prefix else "never"
            split = pre_tokenizers.Metaspace(SPACE, scheme, split=False)
            tokenizer.pre_tokenizer = split
            tokenizer.decoder = spm_decoder(has_prefix)
        elif name == "GemmaTokenizer":
            split_as_gemma(tokenizer)
        else:
            has_prefix = bool(prefix_space)
            split = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
            if name == "Qwen2Tokenizer":
                split = make_pre_tokenizer("qwen2", has_prefix)
            elif name == "Qwen3_5Tokenizer":
                split = make_pre_tokenizer("qwen35", has_prefix)
            if name != "GPT2Tokenizer":
                tokenizer.normalizer = normalizers.NFC()
            tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
        return tokenizer


def _is_token(value: object) -> bool:
    from tokenizers import AddedToken

    return isinstance(value, str | AddedToken)


def _parse_tokens(value: Any) -> Any:
    """Returns a JSON value with an AddedToken for each object that has a `content`."""
    from tokenizers import AddedToken

    if isinstance(value, list):
        return [_parse_tokens(x) for x in value]
    if not isinstance(value, dict):
        return value
    if "content" not in value:
        return {key: _parse_tokens(x) for key, x in value.items()}
    return AddedToken(**{k: x for k, x in value.items() if k not in ("__type", "id")})


def _read_settings(folder: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the settings, and this model's additional special tokens by name.

    An example of such a token is `image_token`. `special_tokens_map.json` is read only
    if there is no `added_tokens_decoder`, which is newer.
    """
    settings = _parse_tokens(read_object(folder / "tokenizer_config.json"))
    if _OLDER_EXTRA in settings and not settings.get(_EXTRA):
        settings[_EXTRA] = settings.pop(_OLDER_EXTRA)
    has_names = isinstance(settings.get(_EXTRA), dict)
    extra_named = settings.pop(_EXTRA) if has_names else {}
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
        # The newer file overrides the older one, except for special tokens.
        overriding = {k: older[k] for k in (*NAMED, _OLDER_EXTRA) if k in older}
        settings = older | settings | overriding
    ignored = (*NAMED, "add_bos_token", "add_eos_token")
    names = [k for k in settings if k.endswith("_token") and k not in ignored]
    named = {name: settings[name] for name in names if _is_token(settings[name])}
    return settings, named | extra_named


def _read_added(
    folder: pathlib.Path, settings: dict[str, Any], raw: dict[str, Any]
) -> "dict[int, AddedToken]":
    """Returns the added tokens by id, from `added_tokens_decoder` if present."""
    from tokenizers import AddedToken

    if (key := "added_tokens_decoder") in settings:
        by_id = settings[key]
        is_valid = isinstance(by_id, dict) and all(
            index.isdecimal() and isinstance(token, AddedToken)
            for index, token in by_id.items()
        )
        if not is_valid:
            raise ValueError(
                f"`{key}` must have an object with `content` for each id. Got "
                f"{by_id!r:.60}."
            )
        return {int(index): token for index, token in by_id.items()}
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
    model_type = config.get("model_type") or ""
    # transformers ignores the declared class of these models.
    untrusted = ("phi3", "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text")
    is_trusted = model_type not in untrusted
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    name = AS_IN_FILE if declared in _ALIASES else declared
    # LlamaTokenizer is SentencePiece's BPE. Some files declare this class although the
    # tokenizer is a byte-level BPE, which this class cannot be. The file is then used
    # unchanged, unless transformers prefers a class for the type of the model, and
    # ignores the declared one.
    if name.removesuffix("Fast") == "LlamaTokenizer" and '"ByteLevel"' in text:
        name = AS_IN_FILE
        if is_trusted:
            return name
    registered = _REGISTERED.get(model_type, name)
    # A declared class counts only if it is trusted, and if transformers would not use
    # the file unchanged for this type of model.
    if registered == AS_IN_FILE or not declared or not is_trusted:
        return registered
    # "Fast" is a suffix of the other classes, but a part of this class's name.
    return name if name == AS_IN_FILE else name.removesuffix("Fast")


def _check_settings(settings: dict[str, Any], name: str, model: dict[str, Any]) -> None:
    """Rejects classes and settings that change tokens and are not supported."""
    is_bpe = model.get("type", "BPE") == "BPE"
    rejected = [key for key in _UNSUPPORTED if settings.get(key)]
    if settings.get(_CLEANUP) and (not is_bpe or settings.get(_FORCED_CLEANUP)):
        rejected.append(_CLEANUP)  # changes decoded text
    if name not in _DEFAULTS or (name != AS_IN_FILE and not is_bpe):
        rejected.append("tokenizer_class")
    if rejected:
        names = " and ".join(f"`{key}`" for key in rejected)
        values = {key: settings.get(key) for key in rejected}
        raise ValueError(
            f"{names} in tokenizer_config.json would change tokens in a way that is "
            f"not supported. Got {values}. If tokenizer.json is correct, remove "
            f"{names}, or set `tokenizer_class` to {AS_IN_FILE}."
        )


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
