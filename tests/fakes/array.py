"""An array as a host's HBA sees it: target ports with small disks, which answer CDBs.

A unit answers what the port under test needs to see; `script` answers out of the ordinary, `held` keeps commands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.fc.tiny import BLOCK, INVALID_FIELD, INVALID_LUN, INVALID_OPCODE, Done, page_83
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.sysfs import scsi_lun


@dataclass(eq=False)
class FakeUnit:
    """A disk, or whatever type says.  seen: CDBs, in order."""

    data: bytearray
    name: bytes = b"disk"
    type: int = 0
    queue_depth: int = 32
    hold: bool = False
    script: Callable[[bytes], Done | None] = lambda _cdb: None
    seen: list[bytes] = field(default_factory=list)
    max_blocks: int = 0

    @property
    def page_83(self) -> bytes:
        return page_83(self.name)

    def run(self, cdb: bytes, data: bytes) -> Done:
        self.seen.append(cdb)
        done = self.script(cdb)
        if done is not None:
            return done
        start, blocks = int.from_bytes(cdb[2:6], "big") * BLOCK, int.from_bytes(cdb[7:9], "big")
        end = start + blocks * BLOCK
        match cdb[0]:
            case 0x00 | 0x35:
                return Done()
            case 0x12 if cdb[1] & 1:
                return self._page(cdb)
            case 0x12:
                data = bytes([self.type, 0, 6, 0x12, 31, 0, 0, 2]) + b"VHOSTFC FAKE            0001"
                return Done(data=data[: int.from_bytes(cdb[3:5], "big")])
            case 0x25:
                return Done(data=(len(self.data) // BLOCK - 1).to_bytes(4, "big") + BLOCK.to_bytes(4, "big"))
            case 0x28:
                return Done(data=bytes(self.data[start:end]))
            case 0x2A:
                self.data[start:end] = data
                return Done()
        return Done(2, sense=INVALID_OPCODE)

    def _page(self, cdb: bytes) -> Done:
        match cdb[2]:
            case 0x83:
                return Done(data=self.page_83)
            case 0xB0:
                limits = bytearray(64)
                limits[:4] = b"\0\xb0\0\x3c"
                limits[8:12] = self.max_blocks.to_bytes(4, "big")
                limits[12:16] = self.max_blocks.to_bytes(4, "big")
                return Done(data=bytes(limits))
        return Done(2, sense=INVALID_FIELD)


@dataclass(eq=False)
class FakeTarget:
    """A target port.  allow: LUN masking by initiator, None for everybody."""

    wwpn: Wwn
    port_id: int
    units: dict[int, FakeUnit]
    zoned: bool = True
    allow: dict[int, set[Wwn]] = field(default_factory=dict)

    @property
    def wwnn(self) -> Wwn:
        return Wwn(self.wwpn + 1)

    def visible(self, initiator: Wwn) -> dict[int, FakeUnit]:
        return {
            number: unit
            for number, unit in self.units.items()
            if number not in self.allow or initiator in self.allow[number]
        }

    def run(self, initiator: Wwn, number: int, cdb: bytes, data: bytes) -> Done:
        visible = self.visible(initiator)
        if cdb[0] == 0xA0:
            luns = b"".join(scsi_lun(one) for one in sorted(visible))
            answer = len(luns).to_bytes(4, "big") + bytes(4) + luns
            return Done(data=answer[: int.from_bytes(cdb[6:10], "big")])
        unit = visible.get(number)
        if unit is None and cdb[0] == 0x12:  # peripheral qualifier 3: no device can be here (SPC-5 6.6.2)
            return Done(data=(bytes([0x7F, 0, 6, 2, 31]) + bytes(31))[: int.from_bytes(cdb[3:5], "big")])
        return Done(2, sense=INVALID_LUN) if unit is None else unit.run(cdb, data)
