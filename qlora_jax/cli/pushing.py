"""Pushes folders and files to the Hugging Face hub."""

import pathlib

from ..models.download import PYPI


def push(name: str, path: pathlib.Path | None = None) -> str:
    """Uploads a folder or a file, or nothing, to a repository; returns its address.

    A repository that is not there is made, a private one.

    Raises:
        OSError: If it cannot be written.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        if path is not None and path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path)
        elif path is not None:
            api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # of the network, the hub, its checks
        raise OSError(
            f"`push_to_hub` must name a repository that can be written. {name}: {error}"
            + f" What was to be pushed is in {path}." * (path is not None)
        ) from error
    return str(url)


def check_base(trained_on: str, named: str | None = None) -> None:
    """Refuses an adapter that was trained on other weights than its files name."""
    if named not in (None, trained_on):
        problem = f"not on {named}"
    elif trained_on.startswith(PYPI) or pathlib.Path(trained_on).exists():
        problem = "which is not on the hub"
    else:
        return
    raise ValueError(
        "`model` must be a hub id with `push_to_hub`, that of the weights which the "
        f"adapter was trained on. It was trained on {trained_on}, {problem}."
    )
