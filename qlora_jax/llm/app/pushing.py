"""Pushes folders and files to the Hugging Face hub."""

import pathlib


def push(name: str, path: pathlib.Path | None = None) -> str:
    """Uploads a folder or a file to a repository, and returns the repository's URL.

    If the repository does not exist, a private one is created. Without a path, nothing
    is uploaded.

    Raises:
        OSError: If the repository cannot be written.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(name, private=True, exist_ok=True)
        if path is not None and path.is_dir():
            api.upload_folder(repo_id=name, folder_path=path)
        elif path is not None:
            api.upload_file(repo_id=name, path_or_fileobj=path, path_in_repo=path.name)
    except Exception as error:  # from the network, the hub, or the client's own checks
        raise OSError(
            f"`push_to_hub` must name a repository that can be written. {name}: {error}"
            + f" The files that were not pushed are in {path}." * (path is not None)
        ) from error
    return str(url)


def check_base(trained_on: str, base_model: str | None = None) -> None:
    """Raises ValueError unless the hub has the base that an adapter was trained on.

    `base_model` is the base that the adapter's files name; by default `trained_on`.
    """
    if base_model not in (None, trained_on):
        problem = f"not on {base_model}"
    elif pathlib.Path(trained_on).exists():
        problem = "which is not on the hub"  # but, for example, a local copy
    else:
        return
    raise ValueError(
        "`model` must be a hub id with `push_to_hub`: the id of the weights that the "
        f"adapter is trained on. Got one that is trained on {trained_on}, {problem}."
    )
