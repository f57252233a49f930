"""A disk with two target ports and several initiators that make persistent reservations on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.scsi.conftest import Target, describe, target
from vhostfc.scsi.task import Nexus, ScsiResult

TEST_UNIT_READY = "00 00 00 00 00 00"
KEYS, RESERVATION, CAPABILITIES, FULL_STATUS = range(4)
REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, IGNORE, MOVE = range(8)
WE, EA, WERO, EARO, WEAR, EAAR = 1, 3, 5, 6, 7, 8
TYPES = (WE, EA, WERO, EARO, WEAR, EAAR)


def transport_id(letter: str) -> bytes:
    """SPC-4 7.6.4.2: the TransportID of the initiator port 50:01:43:80:00:00:00:<letter>."""
    return bytes(8) + bytes.fromhex("50014380000000") + letter.encode() + bytes(8)


def nexus(name: str) -> Nexus:
    """ "A2": initiator A through target port 2."""
    return Nexus(transport_id(name[0]), int(name[1]))


def name(one: Nexus) -> str:
    return f"{chr(one.initiator[15])}{one.port}"


@dataclass
class Cluster:
    """Nexuses by name.  Commands return "good", "conflict" or a sense like "5/26/00"."""

    names: tuple[str, ...] = ("A1", "A2", "B1", "C1")
    target: Target = field(default_factory=lambda: target(attach=False))

    def __post_init__(self) -> None:
        for one in (*self.names, "Z1"):
            self.target.unit.attach(nexus(one))
        self.attentions()

    def send(self, who: str, cdb: str | bytes, data: bytes = b"") -> str:
        return verdict(self.target.send(cdb, data, nexus=nexus(who)))

    def out(
        self,
        who: str,
        action: int,
        key: int = 0,
        new: int = 0,
        kind: int = 0,
        *,
        scope: int = 0,
        aptpl: bool = False,
        all_tg_pt: bool = False,
        others: str | None = None,
    ) -> str:
        """A PERSISTENT RESERVE OUT; others: initiators for SPEC_I_PT."""
        data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes(4)
        data += bytes([(others is not None) << 3 | all_tg_pt << 2 | aptpl, 0, 0, 0])
        if others is not None:
            ids = b"".join(transport_id(letter) for letter in others)
            data += len(ids).to_bytes(4, "big") + ids
        return self.raw(who, action, data, scope << 4 | kind)

    def move(
        self,
        who: str,
        key: int,
        new: int,
        to: str,
        *,
        port: int | None = None,
        unreg: bool = False,
        aptpl: bool = False,
    ) -> str:
        data = key.to_bytes(8, "big") + new.to_bytes(8, "big") + bytes([0, unreg << 1 | aptpl])
        data += (int(to[1]) if port is None else port).to_bytes(2, "big") + (24).to_bytes(4, "big")
        return self.raw(who, MOVE, data + transport_id(to[0]))

    def raw(self, who: str, action: int, data: bytes, typed: int = 0, length: int | None = None) -> str:
        size = len(data) if length is None else length
        return self.send(who, bytes([0x5F, action, typed, 0, 0, *size.to_bytes(4, "big"), 0]), data)

    def read(self, action: int, who: str = "Z1", room: int = 4096) -> bytes:
        """A PERSISTENT RESERVE IN, by an onlooker."""
        while who == "Z1" and self.send(who, TEST_UNIT_READY) != "good":
            pass
        return self.target.good(bytes([0x5E, action, 0, 0, 0, 0, 0, *room.to_bytes(2, "big"), 0]), nexus=nexus(who))

    def registered(self) -> dict[str, int]:
        """Names and keys as READ FULL STATUS tells them."""
        data = self.read(FULL_STATUS)
        assert int.from_bytes(data[4:8], "big") == len(data) - 8
        result = {}
        for at in range(8, len(data), 48):
            one = data[at : at + 48]
            assert int.from_bytes(one[20:24], "big") == 24
            found = name(Nexus(one[24:], int.from_bytes(one[18:20], "big")))
            result[found] = int.from_bytes(one[:8], "big")
        return result

    def attentions(self) -> dict[str, list[str]]:
        """What is pending for whom, all of it, which clears it."""
        result = {}
        for one in self.names:
            told = []
            while (answer := self.send(one, TEST_UNIT_READY)) != "good":
                told.append(answer.removeprefix("6/"))
            if told:
                result[one] = told
        return result

    def may(self, who: str) -> str:
        """ "rw", "r" or "": what this nexus can do with the medium; the fast path's verdict must say the same."""
        read = self.send(who, "28 00 00000000 00 0001 00")
        write = self.send(who, "2a 00 00000000 00 0001 00", bytes(512))
        flush = self.send(who, "35 00 00000000 00 0000 00")
        assert write == flush
        assert {read, write} <= {"good", "conflict"}
        result = "r" * (read == "good") + "w" * (write == "good")
        mask = int.from_bytes(self.target.unit.verdict(nexus(who)), "little")
        for opcodes, allowed in (((0x08, 0x28, 0xA8, 0x88), read), ((0x0A, 0x2A, 0xAA, 0x8A, 0x35, 0x91), write)):
            assert {mask >> opcode & 1 for opcode in opcodes} == {allowed == "good"}
        return result


def verdict(result: ScsiResult) -> str:
    if result.status == 0x18:
        assert not result.sense
        assert not result.data_in
        return "conflict"
    if result.status == 0x02:
        return describe(result.sense)
    assert result.status == 0
    return "good"
