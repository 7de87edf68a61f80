"""The values of a GGUF's metadata, as the bytes that they are in the file, and a cursor through a header."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # struct formats
U16, U32, I32, STRING, ARRAY = 2, 4, 5, 8, 9
WHOLE = "BbHhIiQq"
MOST = 256 << 20  # bytes of a header; those of vocabularies of a million tokens have 30 MB
CHUNK = 1 << 20  # bytes of a header that are read at a time


@dataclass(frozen=True)
class Field:
    """A value of the metadata: the number of its type, and its bytes as they stand in the file."""

    kind: int
    raw: bytes

    @property
    def value(self) -> Any:
        """The value as Python's; of an array, a list."""
        return Cursor.over(self.raw).decoded(self.kind)

    @classmethod
    def text(cls, text: str) -> "Field":
        """A string."""
        content = text.encode("utf-8", "backslashreplace")  # names of files may hold any byte
        return cls(STRING, struct.pack("<Q", len(content)) + content)

    @classmethod
    def number(cls, kind: int, number: int) -> "Field":
        """A whole number of the type `kind`."""
        return cls(kind, struct.pack(f"<{NUMBERS[kind]}", number))


class Cursor:
    """Moves through the bytes of a header, of which it reads as many as are needed, `size` at most."""

    def __init__(self, read: Callable[[int], bytes], size: int) -> None:
        self.at, self.size = 0, size
        self._read, self._held = read, bytearray()

    @classmethod
    def over(cls, content: bytes) -> "Cursor":
        """A cursor over bytes that are in memory."""
        cursor = cls(lambda _: b"", len(content))
        cursor._held += content
        return cursor

    def taken(self, count: int) -> bytes:
        """The next bytes."""
        self._hold(count)
        self.at += count
        return bytes(self._held[self.at - count : self.at])

    def unpacked(self, form: str) -> Any:
        """The next number of a struct format."""
        return struct.unpack(f"<{form}", self.taken(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        """The next string. Raises ValueError if it is not UTF-8."""
        return self.taken(self.unpacked("Q")).decode()

    def skipped(self, kind: int) -> bytes:
        """The bytes of the next value of a type; the elements of an array are not looked at."""
        start = self.at
        self._skip(kind, 1)
        return bytes(self._held[start : self.at])

    def decoded(self, kind: int) -> Any:
        """The next value of a type."""
        if kind == STRING:
            return self.taken(self.unpacked("Q")).decode("utf-8", "replace")
        if kind == ARRAY:
            inner, count = self.unpacked("I"), self.unpacked("Q")
            return [self.decoded(inner) for _ in range(count)]
        return self.unpacked(NUMBERS[kind])

    def _skip(self, kind: int, count: int, within: bool = False) -> None:
        if kind in NUMBERS:
            self._hold(size := count * struct.calcsize(f"<{NUMBERS[kind]}"))
            self.at += size
        elif kind == STRING:
            length_of = struct.Struct("<Q").unpack_from
            for _ in range(count):  # of a vocabulary hundreds of thousands
                if self.at + 8 > len(self._held):
                    self._hold(8)
                self.at += 8 + length_of(self._held, self.at)[0]
            self._hold(0)
        elif kind == ARRAY and not within:
            inner, size = self.unpacked("I"), self.unpacked("Q")
            self._skip(inner, size, within=True)
        else:
            raise ValueError("an array holds arrays" if kind == ARRAY else f"a value has the type {kind}")

    def _hold(self, count: int) -> None:
        """Reads on until `count` bytes after this place are held. Raises ValueError where the file ends before."""
        if self.at + count > self.size:
            raise ValueError("it ends within its header")
        if self.at + count > MOST:
            raise ValueError(f"its header is longer than {MOST >> 20} MiB")
        while len(self._held) < self.at + count:
            piece = self._read(max(CHUNK, self.at + count - len(self._held)))
            if not piece:
                raise ValueError("it ends within its header")
            self._held += piece
