"""Fetches models and adapters from the Hugging Face hub."""

import pathlib

from ..files import Path

# The files to download: safetensors, configs and tokenizers. Repositories often hold
# the same weights in other formats too, which are large and are not needed.
FILES = [
    "*.json",
    "*.jinja",
    "adapter_model*.safetensors",
    "merges.txt",
    "model*.safetensors",
    "sentencepiece.bpe.model",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
]


def fetch(
    model: Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache: Path | None = None,
    offline: bool = False,
) -> pathlib.Path:
    """Returns a local folder or file for a model or an adapter.

    Downloads the files that the cache of `huggingface_hub` lacks. Its settings apply:
    `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`, `HF_ENDPOINT`.

    Args:
        model: A path, or the id of a repository: `"HuggingFaceTB/SmolLM2-135M"`, or
            `"gpt2"`.
        revision: A branch, a tag or a commit of a repository; `main` by default.
        token: A token for private repositories; by default, that of the user's login.
        cache: The folder of the cache; by default, that of `huggingface_hub`.
        offline: Whether to use only the cache.

    Raises:
        FileNotFoundError: If the path or repository does not exist, if access to a
            private or gated repository is not granted, if the hub cannot be reached and
            the model is not cached, or if it has no weights in safetensors.
        ValueError: If `model` is a path that exists, and `revision` is not None.

    Example:
        >>> import tempfile, qlora_jax as ql
        >>> folder = tempfile.mkdtemp()
        >>> str(ql.io.fetch(folder)) == folder
        True
    """
    name, path = str(model), pathlib.Path(model).expanduser()
    # pathlib takes "" for the current folder.
    if name and path.exists():
        if revision is not None:
            raise ValueError(
                f"`revision` must be left out for the path {name!r}. Got {revision!r}."
            )
        return path
    problem = f"`model` must be a path or a hub id. Got {name!r}. This path is missing"
    # Ids have one part, as "gpt2", or two. "folder/model.gguf" is meant as a path.
    is_file = path.suffix in (".gguf", ".safetensors")
    if not name or name.count("/") > 1 or path.is_absolute() or is_file:
        raise FileNotFoundError(f"{problem}.")
    # Imported here, because the import is slow and local paths do not need it.
    import huggingface_hub
    from huggingface_hub import errors

    try:
        downloaded = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=cache,
            local_files_only=offline,
            allow_patterns=FILES,
        )
    except errors.HFValidationError as error:
        raise FileNotFoundError(f"{problem}.") from error
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{name} is gated: accept its terms on the hub, and log in (`hf auth "
            "login`) or pass a `token`."
        ) from error
    except (OSError, errors.RevisionResolutionError) as error:
        raise FileNotFoundError(
            f"{problem}, and {name} could not be fetched: {error} Pass a local path, "
            "or log in if the repository is private."
        ) from error
    folder = pathlib.Path(downloaded)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{name} must have weights as safetensors files.")
    return folder
