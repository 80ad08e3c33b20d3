"""Fetches models and adapters from the Hugging Face hub."""

import pathlib

from ..files import Path

# Weights in safetensors, configs and tokenizers; no weights in other formats.
FILES = (
    "*.json",
    "*.jinja",
    "adapter_model*.safetensors",
    "adapters.safetensors",
    "gptq_model*.safetensors",
    "merges.txt",
    "model*.safetensors",
    "tokenizer.model",
)


def fetch(
    model: Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache: Path | None = None,
    offline: bool = False,
) -> pathlib.Path:
    """Returns a local folder or file for a model or an adapter.

    Downloads what is missing from the cache of `huggingface_hub`, whose settings hold:
    `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`.

    Args:
        model: A path, or the id of a repository: `"HuggingFaceTB/SmolLM2-135M"`.
        revision: A branch, a tag or a commit; `main` by default.
        token: A token for private repositories; by default that of the user's login.
        cache: The cache's folder; that of `huggingface_hub` by default.
        offline: Whether to use the cache only.

    Raises:
        FileNotFoundError: If there is no such path or repository, if it is private or
            gated and access is not granted, if the hub cannot be reached and the model
            is not cached, or if it has no weights in safetensors.

    Example:
        >>> import tempfile, qlora_jax as ql
        >>> folder = tempfile.mkdtemp()
        >>> str(ql.io.fetch(folder)) == folder
        True
    """
    path = pathlib.Path(model).expanduser()
    if path.exists():
        return path
    name = str(model)
    neither = f"`model` must be a path or a hub id. Got {name!r}, which is missing here"
    if name.count("/") != 1 or path.is_absolute() or path.suffix == ".gguf":
        raise FileNotFoundError(f"{neither}.")
    import huggingface_hub
    from huggingface_hub import errors

    try:
        found = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache,
            local_files_only=offline,
            allow_patterns=list(FILES),
        )
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{neither}.") from error
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: accept its terms on the hub, and log in (`hf auth "
            "login`) or give a `token`."
        ) from error
    except (OSError, errors.RevisionResolutionError) as error:
        raise FileNotFoundError(
            f"{neither}, and {name} could not be fetched: {error} Give a local path, "
            "or log in if it is private."
        ) from error
    folder = pathlib.Path(found)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{name} must hold its weights as safetensors files.")
    return folder
