"""Tensors that are read or computed when their values are needed."""

import dataclasses
import math
import operator
import pathlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from .files import CheckpointError


class TensorLike(Protocol):
    """An array, or an object that `numpy.asarray` converts to one."""

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def dtype(self) -> Any: ...  # noqa: D102


class SliceableTensor(TensorLike, Protocol):
    """An array, or a tensor in a file that is read when it is indexed by slices."""

    def __getitem__(self, index: Any, /) -> Any: ...


class File:
    """An open file that several tensors share."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._file = path.open("rb", buffering=0)
        # The file is closed when its last tensor is deleted.
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        self.size = self._file.seek(0, 2)

    def read_into(self, buffer: memoryview, start: int) -> None:
        """Fills `buffer` with the bytes of the file from `start` on."""
        # Threads share the file's position, so another seek must not come in between.
        with self._lock:
            self._file.seek(start)
            while buffer:
                # An unbuffered read may return fewer bytes than requested.
                count = self._file.readinto(buffer)
                if not count:
                    message = f"{self.path} is too short: it ends inside a tensor."
                    raise CheckpointError(message)
                buffer = buffer[count:]


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor in a file. Indexing it with slices reads a part as a NumPy array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    _file: File
    _start: int  # the offset of the first value in the file, in bytes

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: Any) -> np.ndarray:
        return self._read(_ranges_of(index, self.shape))

    def reshape(self, *shape: int) -> "LazyTensor":
        """Returns the same bytes as a tensor of another shape, without reading them.

        Args:
            *shape: The new shape, with the same number of values; -1 is not inferred.

        Raises:
            ValueError: If the number of values differs, or a size is negative.
        """
        is_shape = all(n >= 0 for n in shape)
        if not is_shape or math.prod(shape) != math.prod(self.shape):
            raise ValueError(
                f"a tensor of shape {self.shape} must keep its number of values. Got "
                f"shape {shape}."
            )
        return dataclasses.replace(self, shape=shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a tensor in a file cannot be an array without a copy.")
        return np.asarray(self[...], dtype)

    def _read(self, ranges: Sequence[range]) -> np.ndarray:
        shape, itemsize = tuple(len(r) for r in ranges), self.dtype.itemsize
        # JAX's CPU backend copies arrays that do not begin at a multiple of 64 bytes.
        buffer = np.empty(math.prod(shape) * itemsize + 64, np.uint8)
        buffer = buffer[-buffer.ctypes.data % 64 :][: math.prod(shape) * itemsize]
        # `axis` is the last axis of which only a part is read. The values from there on
        # are contiguous in the file: one run for each index of the axes before.
        cut_axes = [axis for axis, n in enumerate(self.shape) if shape[axis] != n]
        axis = cut_axes[-1] if cut_axes else 0
        run_size = math.prod(shape[axis:]) * itemsize
        first = [r.start for r in ranges]
        # `ravel_multi_index` rejects the start of a part that is empty.
        outer_indices = np.ndindex(*shape[:axis]) if buffer.size else ()
        for i, outer in enumerate(outer_indices):
            index = [*map(operator.add, first, outer), *first[axis:]]
            offset = int(np.ravel_multi_index(index, self.shape)) if index else 0
            run = buffer[i * run_size : (i + 1) * run_size].data
            self._file.read_into(run, self._start + offset * itemsize)
        return buffer.view(self.dtype).reshape(shape)


def _ranges_of(index: Any, shape: tuple[int, ...]) -> list[range]:
    """Returns the indices along each axis that slices, or `...`, select."""
    slices = index if isinstance(index, tuple) else (index,)
    if len(slices) == 1 and slices[0] is ...:
        slices = ()
    if not all(isinstance(i, slice) for i in slices) or len(slices) > len(shape):
        raise TypeError(f"a tensor must be indexed by slices. Got {slices}.")
    slices = slices + (slice(None),) * (len(shape) - len(slices))
    ranges = [range(n)[i] for n, i in zip(shape, slices, strict=True)]
    if any(r.step != 1 for r in ranges):
        raise ValueError(f"slices must have step 1. Got {slices}.")
    return ranges


@dataclass(frozen=True, eq=False)
class DeferredTensor:
    """A tensor whose values `compute` returns when they are needed."""

    dtype: Any
    shape: tuple[int, ...]
    compute: Callable[[], ArrayLike]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.compute(), dtype)


@dataclass(frozen=True, eq=False)
class LazyMatrix:
    """A matrix that is computed from a file, one slice at a time."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[slice, slice], Any]  # its slices have a start and a larger stop

    def __getitem__(self, index: Any) -> np.ndarray:
        ranges = _ranges_of(index, self.shape)
        shape = tuple(map(len, ranges))
        if 0 in shape:  # `read` need not support empty slices, such as `x[3:1]`
            return np.empty(shape, self.dtype)
        return np.asarray(self.read(*(slice(r.start, r.stop) for r in ranges)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:, :], dtype)


def transposed(x: SliceableTensor) -> LazyMatrix:
    """Returns the transpose of a matrix, which is read when it is sliced."""
    shape = tuple(x.shape[::-1])
    return LazyMatrix(x.dtype, shape, lambda rows, columns: x[columns, rows].T)


def matrix_in_stack(stack: SliceableTensor, index: int) -> LazyMatrix:
    """Returns one matrix of a stack, which is read when it is sliced."""
    # Lazy tensors can be indexed only by slices.
    entry = slice(index, index + 1)
    shape = stack.shape[1:]
    return LazyMatrix(stack.dtype, shape, lambda *part: stack[entry, *part][0])


def equal_parts(x: SliceableTensor, count: int) -> list[LazyMatrix]:
    """Returns `count` parts of a matrix with equally many rows, read when sliced."""
    size = x.shape[0] // count

    def part_from(start: int) -> LazyMatrix:
        def read(rows: slice, columns: slice) -> Any:
            return x[start + rows.start : start + rows.stop, columns]

        return LazyMatrix(x.dtype, (size, *x.shape[1:]), read)

    return [part_from(size * i) for i in range(count)]


@dataclass(frozen=True, eq=False, repr=False)
class Tensors(Mapping[str, LazyTensor]):
    """The tensors of a file or a folder by name, as `open_safetensors` returns them."""

    _tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    folder: pathlib.Path | None = None

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def with_tensors(self, tensors: Mapping[str, Any]) -> "Tensors":
        """Returns other tensors, with the metadata and the folder of these."""
        return dataclasses.replace(self, _tensors=tensors)
