"""Checks the header of a GGUF file before a library reads the file, because that library trusts the header.

Every count is checked against the bytes that are left, and every size of the model against what the file can hold, so
that a bad header cannot make the library allocate all memory.
"""

import math
import struct
from pathlib import Path
from typing import BinaryIO

from lorainit.config.errors import UnsupportedModel

MAX_KEYS = 10_000  # the largest headers have some 60 of their own
MAX_STRING = 1 << 20  # a chat template has some 20 KB
MAX_ELEMENTS = 1 << 22  # of arrays, all together: a vocabulary of 2.6e5 and its merges have 8e5
MAX_TENSORS = 1_000_000
MAX_DIMENSIONS = 4  # GGML's own bound
_VERSIONS = (2, 3)
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
# The most elements that a byte of any of GGML's formats holds (1.5 bits each), rounded up.
_ELEMENTS_PER_BYTE = 8
_MAX_SIDE = 10**9


def check_header(path: Path) -> None:
    """Check the header of a GGUF file.

    Raises:
        UnsupportedModel: the header is wrong; the message says how.
    """
    try:
        with path.open("rb") as stream:
            _Walk(stream, path.stat().st_size).header()
    except _Broken as error:
        raise UnsupportedModel(f"{path.name} is not a whole GGUF file: {error}.", param="model") from error


class _Broken(Exception):
    """What is wrong, as the rest of a sentence."""


class _Walk:
    """A position in a file of known size."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self.stream, self.size, self.elements = stream, size, 0
        self.layers = self.tensors = 0

    def header(self) -> None:
        """Walk over everything before the weights."""
        if self._bytes(4) != b"GGUF":
            raise _Broken("it does not begin with GGUF")
        if (version := self._number("<I")) not in _VERSIONS:
            raise _Broken(f"version {version} is none of those that are read")
        self.tensors, keys = self._number("<Q"), self._number("<Q")
        if self.tensors > MAX_TENSORS or keys > MAX_KEYS:
            raise _Broken(f"{self.tensors} tensors and {keys} keys are more than a model has")
        for _ in range(keys):
            self._key()
        if self.layers > self.tensors:
            raise _Broken(f"it has {self.layers} layers, and {self.tensors} tensors")
        ends = [self._tensor() for _ in range(self.tensors)]
        if max(ends, default=0) > self.size - self.stream.tell():
            raise _Broken("its tensors reach beyond its end")

    def _key(self) -> None:
        name, kind = self._text(), self._number("<I")
        if kind == _ARRAY:
            self._array()
        elif kind == _STRING:
            self._text()
        elif kind in _INTEGERS:
            self._size(name, self._number(_INTEGERS[kind]))
        else:
            self._skip(self._width(kind))

    def _size(self, name: str, value: int) -> None:
        if name.endswith(".block_count"):
            self.layers = max(self.layers, value)
        elif name.endswith(("_length", "_count", "vocab_size")) and not 0 <= value <= _MAX_SIDE:
            raise _Broken(f"{name} is {value}")

    def _array(self) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        self.elements += count
        if self.elements > MAX_ELEMENTS:
            raise _Broken(f"its lists have more than {MAX_ELEMENTS} entries")
        if kind == _STRING:
            for _ in range(count):
                self._text()
        else:
            self._skip(count * self._width(kind))  # a list of lists has no width, and no known file has one

    def _tensor(self) -> int:
        """The smallest possible end of this tensor, in bytes from the first tensor."""
        name, dimensions = self._text(), self._number("<I")
        if dimensions > MAX_DIMENSIONS:
            raise _Broken(f"{name[:120]} has {dimensions} dimensions")
        shape = [self._number("<Q") for _ in range(dimensions)]
        _, offset = self._number("<I"), self._number("<Q")
        return int(offset + math.prod(shape) // _ELEMENTS_PER_BYTE)

    # --- bytes -----------------------------------------------------------------------------------

    def _text(self) -> str:
        length = self._number("<Q")
        if length > MAX_STRING:
            raise _Broken(f"a text of {length} bytes is in its header")
        return self._bytes(length).decode("utf-8", "replace")

    def _number(self, form: str) -> int:
        value: int = struct.unpack(form, self._bytes(struct.calcsize(form)))[0]
        return value

    def _bytes(self, count: int) -> bytes:
        found = self.stream.read(count)
        if len(found) < count:
            raise _Broken("it ends in the middle of its header")
        return found

    def _skip(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise _Broken("it ends in the middle of its header")
        self.stream.seek(count, 1)

    def _width(self, kind: int) -> int:
        if kind not in _BYTES:
            raise _Broken(f"its header has a value of the unknown type {kind}")
        return _BYTES[kind]
