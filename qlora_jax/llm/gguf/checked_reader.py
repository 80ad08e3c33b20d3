"""Reads the header of a GGUF file, and checks every size in it."""

import math
import struct
from typing import Any

import gguf
import numpy as np
from numpy.typing import DTypeLike

_STRING, _ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY
_TRUNCATED = "The file ends too early."


class Reader(gguf.GGUFReader):
    """The reader of the gguf package, with checks of sizes and counts.

    Every read moves forward in the file or raises an error, so that a corrupt count
    cannot make the reader go on after the end of the file.
    """

    # The package sets `data` to a memmap, whose slices take three times as long as
    # those of a plain array.
    data = property(lambda self: self._data, lambda self, x: self._set_data(x))

    def _set_data(self, data: np.memmap) -> None:
        self._data = np.asarray(data)

    def _get(self, offset: int, dtype: DTypeLike, count: int = 1, *args, **kwargs):
        values = super()._get(offset, dtype, count, *args, **kwargs)
        if len(values) != count:
            raise ValueError(_TRUNCATED)
        return values

    def _get_field_parts(self, orig_offs: int, raw_type: int):
        if raw_type == _ARRAY:
            return self._read_array(orig_offs)
        size, parts, indices, types = super()._get_field_parts(orig_offs, raw_type)
        if raw_type == _STRING:
            parts[-1].tobytes().decode("utf-8")  # raises if it is not UTF-8
        return size, parts, indices, types

    def _read_array(self, start: int) -> tuple[int, list, list[int], list]:
        """Reads an array at once; the package reads it item by item.

        Returns its number of bytes, its parts, the indices of the parts that contain
        items, and its types.
        """
        # The header: the type of the items in 4 bytes, and their number in 8.
        raw_type, count = self._get(start, np.uint32), self._get(start + 4, np.uint64)
        item_type = gguf.GGUFValueType(raw_type[0])
        parts, types = [raw_type, count], [_ARRAY, item_type]
        if item_type == _STRING:
            items, end = self._read_strings(start + 12, int(count[0]))
            indices = [*range(2, 2 + len(items))]
            return end - start, parts + items, indices, types
        values = self._get(start + 12, self.gguf_scalar_to_np[item_type], count[0])
        return 12 + values.nbytes, [*parts, values], [2], types

    def _read_strings(self, offset: int, count: int) -> tuple[list[memoryview], int]:
        """Returns strings, and the offset of their end."""
        data, strings = self._data.data, []
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", data, offset)
            text = data[offset + 8 : offset + 8 + size]
            if len(text) != size:
                raise ValueError(_TRUNCATED)
            str(text, "utf-8")  # raises if it is not UTF-8
            strings.append(text)
            offset += 8 + size
        return strings, offset

    def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
        for field in fields:
            *_, shape, raw_type, offset = (part.tolist() for part in field.parts)
            tensor_type = gguf.GGMLQuantizationType(*raw_type)
            block, block_bytes = gguf.GGML_QUANT_SIZES[tensor_type]
            count = math.prod(shape)
            if not 1 <= len(shape) <= 4 or not count or shape[0] % block:
                raise ValueError(
                    f"Tensor shape {shape} is invalid for blocks of {block}."
                )
            end = int(start_offs) + offset[0] + count // block * block_bytes
            if offset[0] % self.alignment or end > len(self._data):
                raise ValueError("A tensor lies outside the file, or is misaligned.")
        super()._build_tensors(int(start_offs), fields)
