"""Service parameters of FLOGI, FDISC and PLOGI, and of the LS_ACC to each (FC-LS-3 6.6).

One layout of 116 bytes serves all of them; what some words mean depends on who sends it to whom:
an N_Port tells another its limits (PLOGI), and the fabric tells an N_Port its timers (LS_ACC to FLOGI).
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Self

from vhostfc.fc.frame import MAX_PAYLOAD, FrameError
from vhostfc.fc.wwn import Wwn

_LOGIN = struct.Struct("!B3xBBHHHII8s8s32xHHHHHHHH16x16x")
LENGTH = _LOGIN.size
#: The shortest receive data field that FC-FS allows.
MIN_PAYLOAD = 256
#: PLOGI word 2: 255 concurrent sequences, relative offset for every information category.
_PLOGI_WORD_2 = 0x00FF001F
_CLASS_3 = 0x8800  # valid, sequential delivery


class Feature(enum.IntFlag):
    """Common features (FC-LS-3 6.6.2.4), the bits that matter to class 3 fabrics."""

    MULTIPLE_IDS = 0x8000  # in FLOGI: NPIV wanted
    CLEAN_ADDRESS = 0x8000  # in LS_ACC to FLOGI: the address was not another's a moment ago
    CONTINUOUS_OFFSET = 0x8000  # in PLOGI: relative offset grows continuously
    NPIV = 0x2000  # in LS_ACC to FLOGI: the fabric assigns several N_Port_IDs
    F_PORT = 0x1000  # sent by a fabric; else the peer is an N_Port, point to point
    NANOSECONDS = 0x0400  # E_D_TOV is in nanoseconds, not milliseconds


@dataclass(frozen=True, slots=True)
class Login:
    """command: ELS command code (FLOGI, FDISC, PLOGI or LS_ACC).  Times in milliseconds.

    word2: R_A_TOV in an LS_ACC from the fabric; concurrent sequences and relative offset in PLOGI.
    """

    command: int
    wwpn: Wwn
    wwnn: Wwn
    features: int = 0
    receive_size: int = MAX_PAYLOAD
    bb_credit: int = 10
    word2: int = 0
    e_d_tov: int = 0
    class3_options: int = _CLASS_3
    class3_receive_size: int = 0
    class3_sequences: int = 0
    class3_open_sequences: int = 0
    version: int = 0x20

    @classmethod
    def flogi(cls, wwpn: Wwn, wwnn: Wwn) -> Self:
        return cls(0x04, wwpn, wwnn, features=Feature.MULTIPLE_IDS)

    @classmethod
    def fdisc(cls, wwpn: Wwn, wwnn: Wwn) -> Self:
        return cls(0x51, wwpn, wwnn)

    @classmethod
    def plogi(cls, wwpn: Wwn, wwnn: Wwn, *, accept: bool = False, e_d_tov: int = 2000) -> Self:
        """PLOGI, or the LS_ACC to one."""
        return cls(
            0x02 if accept else 0x03,
            wwpn,
            wwnn,
            features=Feature.CONTINUOUS_OFFSET,
            word2=_PLOGI_WORD_2,
            e_d_tov=e_d_tov,
            class3_receive_size=MAX_PAYLOAD,
            class3_sequences=255,
            class3_open_sequences=1,
        )

    @classmethod
    def fabric_accept(cls, port_name: Wwn, fabric_name: Wwn, *, r_a_tov: int, e_d_tov: int) -> Self:
        """LS_ACC to FLOGI and FDISC.  port_name: the F_Port's."""
        return cls(
            0x02,
            port_name,
            fabric_name,
            features=Feature.CLEAN_ADDRESS | Feature.NPIV | Feature.F_PORT,
            word2=r_a_tov,
            e_d_tov=e_d_tov,
            class3_sequences=255,
            class3_open_sequences=1,
        )

    def pack(self) -> bytes:
        return _LOGIN.pack(
            self.command,
            self.version,
            self.version,
            self.bb_credit,
            self.features,
            self.receive_size,
            self.word2,
            self.e_d_tov,
            self.wwpn.pack(),
            self.wwnn.pack(),
            self.class3_options,
            0,
            0,
            self.class3_receive_size,
            self.class3_sequences,
            0,
            self.class3_open_sequences,
            0,
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Self:
        """Raises FrameError when the payload is too short to be a login.  What class 3 has no use for is ignored."""
        if len(payload) < LENGTH:
            raise FrameError(f"a login of {len(payload)} bytes, {LENGTH} are the least")
        (
            command,
            version,
            _,
            bb_credit,
            features,
            receive_size,
            word2,
            e_d_tov,
            wwpn,
            wwnn,
            options,
            _,
            _,
            class3_size,
            sequences,
            _,
            open_sequences,
            _,
        ) = _LOGIN.unpack_from(payload)
        return cls(
            command=command,
            wwpn=Wwn.unpack(wwpn),
            wwnn=Wwn.unpack(wwnn),
            features=features,
            receive_size=receive_size & 0x0FFF,
            bb_credit=bb_credit,
            word2=word2,
            e_d_tov=e_d_tov,
            class3_options=options,
            class3_receive_size=class3_size,
            class3_sequences=sequences,
            class3_open_sequences=open_sequences,
            version=version,
        )

    @property
    def r_a_tov_seconds(self) -> float:
        """In an LS_ACC from the fabric."""
        return self.word2 / 1000

    @property
    def e_d_tov_seconds(self) -> float:
        return self.e_d_tov / (1e9 if self.features & Feature.NANOSECONDS else 1000)

    @property
    def payload_size(self) -> int:
        """The longest payload that the sender takes in class 3: the smaller of its two words, a multiple of 4."""
        sizes = [size for size in (self.receive_size, self.class3_receive_size & 0x0FFF) if size]
        return min([*sizes, MAX_PAYLOAD]) & ~3
