"""Checks that a file is whole GGUF before the `gguf` package reads it.

That package trusts the counts in a file: a broken one can make it loop or take memory
without end. Here each step moves on in the file, or is refused.
"""

import math
import mmap
import pathlib
import struct

import qlora_jax as ql

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = "general.alignment"


def check_gguf(path: pathlib.Path) -> None:
    """Reads through the header of a GGUF file.

    Raises:
        CheckpointError: If the file is no GGUF of version 2 or 3, or its metadata or
            tensors do not fit in it, or have one name twice.
    """
    if not path.is_file():
        raise ql.io.CheckpointError(f"{path} must be a file.")
    try:
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            _Header(data).check()
    except (ValueError, struct.error) as error:  # an empty file cannot be mapped
        raise ql.io.CheckpointError(f"{path} must be a whole GGUF file. {error}") from (
            error
        )


class _Header:
    """A place in a file, which only moves on."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at, self.alignment = data, 0, 32

    def check(self) -> None:
        """Goes through metadata and tensors."""
        if self.take("4s") != b"GGUF":
            raise ValueError("It does not start with GGUF.")
        if (version := self.take("I")) not in (2, 3):
            raise ValueError(f"Its version is {version}.")
        tensors, fields = self.take("Q"), self.take("Q")
        self.names(fields, self.field)
        places: list[tuple[int, int]] = []
        self.names(tensors, lambda name: places.append(self.tensor()))
        start = -(-self.at // self.alignment) * self.alignment
        for offset, size in places:
            if offset % self.alignment or start + offset + size > len(self.data):
                raise ValueError("A tensor is not in it.")

    def names(self, count: int, then) -> None:
        """Reads `count` names, each with what `then` reads; refuses one twice."""
        seen: set[bytes] = set()
        for _ in range(count):
            name = self.string()
            if name in seen:
                raise ValueError(f"It has {name[:100]!r} twice.")
            seen.add(name)
            then(name)

    def take(self, kind: str):
        """Returns the next value; `struct.error` at the end of the file."""
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def skip(self, size: int) -> int:
        """Moves on; returns where it was."""
        start = self.at
        if size > len(self.data) - start:
            raise ValueError("It ends too early.")
        self.at += size
        return start

    def string(self) -> bytes:
        """Returns the next string."""
        start = self.skip(self.take("Q"))
        return self.data[start : self.at]

    def field(self, name: bytes) -> None:
        """Reads the value of a key."""
        kind = self.take("I")
        if name == _ALIGNMENT.encode():
            if kind != 4 or not 1 <= (value := self.take("I")) <= 1 << 16:
                raise ValueError("Its alignment is no small integer.")
            self.alignment = value
        else:
            self.value(kind)

    def value(self, kind: int, depth: int = 0) -> None:
        """Reads a value of a kind."""
        if kind in _SIZES:
            self.skip(_SIZES[kind])
        elif kind == _STRING:
            self.string().decode("utf-8")
        elif kind == _ARRAY and not depth:
            inner, count = self.take("I"), self.take("Q")
            if inner in _SIZES:
                self.skip(_SIZES[inner] * count)
                return
            for _ in range(count):
                self.value(inner, depth + 1)
        else:
            raise ValueError(f"It has a value of kind {kind}.")

    def tensor(self) -> tuple[int, int]:
        """Returns offset and bytes of a tensor."""
        import gguf

        count = self.take("I")
        if not 1 <= count <= 4:
            raise ValueError(f"A tensor has {count} axes.")
        shape = [self.take("Q") for _ in range(count)]
        kind, offset = self.take("I"), self.take("Q")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if shape[0] % block or not math.prod(shape):
            raise ValueError(f"A tensor has shape {shape} in blocks of {block}.")
        return offset, math.prod(shape) // block * size
