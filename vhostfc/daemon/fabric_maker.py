"""Makes units of what a configuration says: opens the medium, finds what was kept for it, and gives it its names.

A file or a device keeps its unit's NAA designator and serial number over restarts, moves to another LUN and
more paths: they derive from the fabric's name and the path.  Memory is another disk whenever it begins
empty, so its name is drawn by lot and kept with it (fabric_store).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import structlog
import trio

from vhostfc.config import TargetConfig, UnitConfig
from vhostfc.daemon import media
from vhostfc.daemon.fabric_kept import KeptReservations
from vhostfc.daemon.fabric_store import Store
from vhostfc.daemon.fabric_units import Key, Served
from vhostfc.daemon.fencing import Fence, Numbers, Opening
from vhostfc.daemon.medium import Medium
from vhostfc.errors import VhostfcError
from vhostfc.fabric.link import MediumKind
from vhostfc.fc.wwn import OUI_QEMU, Wwn
from vhostfc.scsi.inquiry import Identity
from vhostfc.scsi.server import Inventory
from vhostfc.scsi.unit import LogicalUnit

#: What a file or a device is to the kernel: a word, and two numbers.
What = tuple[str, int, int]


def key(target: TargetConfig, unit: UnitConfig) -> Key:
    """A file and a device are what they are wherever they are listed; memory and null belong to their home's LUN."""
    if unit.file is not None:
        return ("file", str(unit.file))
    if unit.block is not None:
        return ("block", str(unit.block))
    wwpn, lun = unit.home or (target.wwpn, unit.lun)
    return ("null" if unit.null else "memory", f"{wwpn.pack().hex()}-{lun}")


def _naa(seed: bytes) -> bytes:
    """NAA 6, IEEE Registered Extended (SPC-4 7.8.6.6.5): QEMU's company id and 100 bits."""
    bits = int.from_bytes(hashlib.sha256(seed).digest()[:16], "big") >> 28
    return (6 << 124 | OUI_QEMU << 100 | bits).to_bytes(16, "big")


class Maker:
    """Makes Served units of configurations."""

    def __init__(
        self,
        *,
        fabric: Wwn,
        inventory: Inventory,
        store: Store,
        kept: KeptReservations,
        timeout: float,
        nursery: trio.Nursery,
        publish: Callable[[str, dict[str, object]], None],
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.timeout = timeout
        self._publish = publish
        self._fabric = fabric
        self._inventory = inventory
        self._store = store
        self._kept = kept
        self._nursery = nursery
        self._log = log
        self._numbers = Numbers()

    def make(self, target: TargetConfig, config: UnitConfig, taken: dict[What, str]) -> Served:
        """Raises VhostfcError, which names the path: it cannot be opened, or is one of these already.

        taken: see taken_by(); what this unit takes is put there.
        """
        unit_key = key(target, config)
        medium, naa = self._open(unit_key, config)
        try:
            self._check_distinct(medium, taken)
            state = self._kept.load(naa)
            note = self._kept.note(naa)
            unit = self.unit(medium, naa, target.wwnn, config.physical_block_size)
            self._kept.set_mode(naa, unit.mode)
        except VhostfcError:
            medium.close()
            raise
        unit.reservations.state = state
        if note is not None:
            unit.sanitizing.found(note)
            if unit.sanitizing.failed and (operation := unit.sanitizing.operation) is not None:
                name = operation.name
                self._log.warning(f"a {name} has failed; the unit is closed until another succeeds", unit=medium.name)
        fence = Fence(
            medium,
            name=medium.name,
            timeout=self.timeout,
            numbers=self._numbers,
            nursery=self._nursery,
            publish=self._publish,
            log=self._log,
        )
        keep, keep_note = partial(self._kept.save, naa), partial(self._kept.keep_note, naa)
        journal = self._kept.journal(naa)
        return Served(unit_key, medium, unit, fence, keep, keep_note, journal, self._nursery, self._log)

    def unit(self, medium: Medium, naa: bytes, node: Wwn, physical: int | None) -> LogicalUnit:
        """The device server of a medium; what ports lead to it is known when it is placed.

        physical: bytes in a physical block.  None: a file's pages have 4096 bytes, writes of whole ones need not
        read first; memory has none but its blocks.
        """
        backed = medium.kind in {MediumKind.FILE, MediumKind.DIRECT}
        physical = physical or (4096 if backed else medium.block_size)
        identity = Identity(
            serial=naa.hex()[7:],
            naa=(naa,),
            node=node.pack(),
            block_size=medium.block_size,
            physical_exponent=(physical // medium.block_size).bit_length() - 1,
            thin=not medium.is_device,
            write_cache=backed,
            read_only=medium.read_only,
        )
        return LogicalUnit(identity, medium.blocks, self._inventory)

    def keep(self, served: Served) -> None:
        """The unit is in use from now on: its memory shall outlive us."""
        if served.key[0] == "memory":
            medium = served.medium
            self._store.put(served.key[1], served.unit.identity.naa[0], medium.fd, medium.latch_fd)

    def remove(self, served: Served) -> None:
        """The unit is not configured any more; its fence is empty."""
        if served.key[0] == "memory":
            self._store.remove(served.key[1], served.unit.identity.naa[0])
            self._kept.forget(served.unit.identity.naa[0])
        served.close()

    def _open(self, unit_key: Key, config: UnitConfig) -> tuple[Medium, bytes]:
        kind, where = unit_key
        seed = self._fabric.pack() + "\0".join(unit_key).encode(errors="surrogateescape")
        match kind:
            case "file":
                return (
                    media.file(
                        Path(where),
                        config.size,
                        block_size=config.block_size,
                        direct=config.cache == "none",
                        read_only=config.read_only,
                    ),
                    _naa(seed),
                )
            case "block":
                return (
                    media.block(
                        Path(where),
                        block_size=config.block_size,
                        direct=config.cache == "none",
                        read_only=config.read_only,
                    ),
                    _naa(seed),
                )
            case "null":
                assert config.size is not None
                medium = media.null(config.size, block_size=config.block_size, name=f"null {where}")
                medium.read_only = config.read_only
                return medium, _naa(seed)
        return self._memory(where, config)

    def _memory(self, where: str, config: UnitConfig) -> tuple[Medium, bytes]:
        assert config.size is not None
        kept = self._store.take(where, config.size)
        naa, fd = kept or (_naa(secrets.token_bytes(32)), None)
        latch_fd = self._store.take_latch(naa)
        try:
            medium = media.memory(
                config.size, block_size=config.block_size, name=f"memory {where}", fd=fd, latch_fd=latch_fd
            )
        except OSError as error:
            raise VhostfcError(f"no memory for a unit of {config.size} bytes: {error.strerror}") from None
        medium.read_only = config.read_only
        return medium, naa

    @staticmethod
    def _check_distinct(medium: Medium, taken: dict[What, str]) -> None:
        """One file under two paths would be two disks that know nothing of each other."""
        for what in _what(medium):
            other = taken.setdefault(what, medium.name)
            if other != medium.name:
                raise VhostfcError(f"{medium.name}: is the same as {other}, which is a unit already")

    def going(self, wwpn: Wwn) -> list[Opening]:
        """The openings of this initiator port that are over, and whose adapters may still have the medium."""
        return list(self._numbers.going.get(wwpn, ()))


def _what(medium: Medium) -> list[What]:
    """What a file or a device is, whatever its path."""
    if medium.kind not in {MediumKind.FILE, MediumKind.DIRECT}:
        return []
    state = os.fstat(medium.fd)
    file = ("file", state.st_dev, state.st_ino)
    return [file, ("device", 0, state.st_rdev)] if medium.is_device else [file]


def taken_by(served: Iterable[Served]) -> dict[What, str]:
    """The files and devices that are units already, for Maker.make()."""
    return {what: one.medium.name for one in served for what in _what(one.medium)}
