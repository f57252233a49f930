"""World Wide Names: the 64-bit names of nodes and ports (FC-FS-4 clause 15, Name_Identifier formats).

Administrators copy names from switches, arrays, /sys and spreadsheets, and every tool spells them
in its own way.  Any common spelling comes in; one comes out: lower case, with colons.
"""

from __future__ import annotations

import re
import secrets
from typing import Self

_SPELLINGS = (
    re.compile(r"(?:[0-9a-f]{2}([:.-]))(?:[0-9a-f]{2}\1){6}[0-9a-f]{2}"),
    re.compile(r"(?:[0-9a-f]{4}([:.-]))(?:[0-9a-f]{4}\1){2}[0-9a-f]{4}"),
    re.compile(r"(?:0x|naa\.|wwn\.|nwwn-|pwwn-)?[0-9a-f]{16}"),
)


class WwnError(ValueError):
    """The text is not a World Wide Name; the message says what was expected."""


class Wwn(int):
    """A World Wide Name.  An int, so that it sorts, hashes and packs; its str() is 50:01:43:80:12:34:56:78."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read any common spelling: 50:01:…, 5001-…, 0x5001…, naa.5001…, plain hex, upper or lower case.

        Raises WwnError when it is not one, or is zero (no name at all, FC-FS-4).
        """
        spelled = text.strip().lower()
        if not any(spelling.fullmatch(spelled) for spelling in _SPELLINGS):
            raise WwnError(
                f"{text!r} is not a World Wide Name: expected 16 hexadecimal digits, such as 50:01:43:80:12:34:56:78"
            )
        value = int(re.sub(r"^(0x|naa\.|wwn\.|[np]wwn-)|[:.-]", "", spelled), 16)
        if not value:
            raise WwnError(f"{text!r} is zero, which names nothing")
        return cls(value)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The name in 8 big-endian bytes of a frame."""
        return cls(int.from_bytes(data, "big"))

    def pack(self) -> bytes:
        return self.to_bytes(8, "big")

    @property
    def naa(self) -> int:
        """The Network Address Authority, the first hexadecimal digit: 1, 2, 5 and 6 are in use."""
        return self >> 60

    def __str__(self) -> str:
        return self.pack().hex(":")

    def __repr__(self) -> str:
        return f"Wwn({str(self)!r})"

    def __format__(self, spec: str) -> str:
        """The spelling, padded and so on; a spec for integers gives the number."""
        return super().__format__(spec) if spec[-1:] in {*"bcdnoxX_,"} else format(str(self), spec)


#: The IEEE company id of QEMU and KVM (00:1a:4a), which virtualization tools use for made-up names.
OUI_QEMU = 0x001A4A


def new_pair() -> tuple[Wwn, Wwn]:
    """A fresh (WWPN, WWNN): NAA 5, QEMU's company id, 35 random bits; the node name is the port name plus one."""
    value = 5 << 60 | OUI_QEMU << 36 | secrets.randbits(35) << 1
    return Wwn(value), Wwn(value | 1)
