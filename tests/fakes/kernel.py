"""Linux with a Fibre Channel HBA, in a directory: what /sys shows, what a write to it does, and /dev/sgN.

A FakeKernel is the door that vhostfc/ports/kernel.py describes.  It behaves as the drivers do that its `style` names
(fcoe, lpfc, qla2xxx): their errnos, states, events and the order in which things appear.  A unit's node is one end of a
socket pair; at the other end struct sg_io_hdr is taken and given back, pointers and all, as the kernel does it.

Nothing is faster or slower than it says: `pace` is the time that a step of a login takes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from tests.fakes.array import FakeTarget
from vhostfc.fc.wwn import Wwn
from vhostfc.ports.fcevents import FcEvent, FcEventCode, Hint, Uevent
from vhostfc.ports.sysfs import Lun, Sysfs, scsi_lun

FABRIC_NAME = Wwn(0x1000_0000_0000_00FA)
DID_NO_CONNECT, DID_ERROR, DID_RESET, DID_TRANSPORT_DISRUPTED = 0x01, 0x07, 0x08, 0x0E
ENOTUNIQ = errno.ENOTUNIQ


class SgIoHdr(ctypes.Structure):
    """struct sg_io_hdr of scsi/sg.h."""

    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _gather(header: SgIoHdr) -> bytes:
    """Data-out, as the driver copies it during write(2)."""
    if not header.iovec_count:
        return ctypes.string_at(header.dxferp or 0, header.dxfer_len) if header.dxfer_len else b""
    pieces = (_Iovec * header.iovec_count).from_address(header.dxferp or 0)
    return b"".join(ctypes.string_at(piece.base, piece.length) for piece in pieces)


@dataclass(eq=False)
class _Command:
    header: SgIoHdr
    end: socket.socket
    number: int
    cdb: bytes
    data: bytes


@dataclass(eq=False)
class _Node:
    """A unit's /dev/sgN."""

    host: FakeHost
    target: FakeTarget
    number: int
    hctl: str
    ends: list[socket.socket] = field(default_factory=list)
    held: list[_Command] = field(default_factory=list)


@dataclass(eq=False)
class FakeHost:
    """A SCSI host of Fibre Channel: the HBA's own port, or a vport's."""

    name: str
    at: Path
    wwpn: Wwn
    wwnn: Wwn
    port_id: int
    parent: FakeHost | None = None
    vport: str = ""
    link: bool = True
    rports: dict[Wwn, str] = field(default_factory=dict)
    scopes: list[trio.CancelScope] = field(default_factory=list)

    @property
    def number(self) -> int:
        return int(self.name.removeprefix("host"))


class FakeKernel:
    """See the head of the file."""

    def __init__(
        self,
        root: Path,
        nursery: trio.Nursery,
        *targets: FakeTarget,
        style: str = "fcoe",
        hosts: int = 1,
        max_vports: int = 255,
        pace: float = 0.01,
    ) -> None:
        self.root = root / "sys"
        self.style = style
        self.pace = pace
        self.targets = list(targets)
        #: What the switch says to a vport's login: accept, silent, no npiv, no resources, duplicate.
        self.verdict = "accept"
        #: The state that every login at one physical port ends with.
        self.refusing: dict[str, str] = {}
        #: The errno (or the short count, negative) that the next vport_create gives.
        self.next_create: int | None = None
        self.writes: list[tuple[str, str]] = []
        self.resets: list[tuple[str, int]] = []
        self.limit = 1310720
        self.locked = False
        #: Units answer when they are set running.
        self.recovered = trio.Event()
        self.recovered.set()
        self._nursery = nursery
        self._listeners: list[trio.MemorySendChannel[Hint]] = []
        self._events = 0
        self._sg = 0
        self._ids = 0
        self._serial = 0
        self.nodes: dict[str, _Node] = {}
        self.hosts: dict[str, FakeHost] = {}
        self._put(self.root / "bus/scsi/drivers_autoprobe", "0")
        for number in range(hosts):
            self._add_physical(number, max_vports)

    # ---------------------------------------------------------------- the door

    @property
    def sysfs(self) -> Sysfs:
        return Sysfs(self.root)

    async def write(self, path: Path, data: bytes) -> int:
        await trio.lowlevel.checkpoint()
        relative, text = str(path.relative_to(self.root)), data.decode().strip()
        if not path.exists():
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        self.writes.append((relative, text))
        if relative.endswith("/device/state") and not data.endswith(b"\n"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
        for pattern, method in self._FILES:
            match = re.fullmatch(pattern, relative)
            if match:
                return await method(self, text, *match.groups()) or len(data)
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    async def open_units(self, lun: Lun, count: int) -> tuple[list[int], int]:
        await trio.lowlevel.checkpoint()
        if self.locked:  # udev has not looked at it yet
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), lun.sg)
        node = self.nodes.get(lun.sg or "")
        if node is None:
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), lun.sg)
        fds = []
        for _ in range(count):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            ours.setblocking(False)
            theirs.setblocking(False)
            node.ends.append(ours)
            fds.append(theirs.detach())
            self._nursery.start_soon(self._serve, node, ours)
        return fds, self.limit

    async def reset(self, lun: Lun, level: int) -> None:
        await trio.lowlevel.checkpoint()
        self.resets.append((lun.hctl, level))
        if level & 0xFF != 1 and self.style == "fcoe":  # it has no handler for more than a device reset
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        for node in list(self.nodes.values()):
            same = (
                node.hctl == lun.hctl
                if level & 0xFF == 1
                else node.hctl.rpartition(":")[0] == lun.hctl.rpartition(":")[0]
            )
            if same:
                self._end_held(node, DID_RESET)

    @asynccontextmanager
    async def hints(self) -> AsyncIterator[trio.MemoryReceiveChannel[Hint]]:
        send, receive = trio.open_memory_channel[Hint](1000)
        self._listeners.append(send)
        try:
            yield receive
        finally:
            self._listeners.remove(send)

    # ---------------------------------------------------------------- for tests: the wire

    async def link_down(self, host: str = "host0") -> None:
        """The HBA's port loses its link: all that stands on it is blocked."""
        physical = self.hosts[host]
        physical.link = False
        self._set(physical.at / "fc_host" / host / "port_state", "Linkdown")
        self._fc_event(physical, FcEventCode.LINKDOWN, styles=("lpfc", "qla2xxx"))
        for vhost in self._vhosts(physical):
            self._state(vhost, "Linkdown")
            self._set(vhost.at / "fc_host" / vhost.name / "port_state", "Linkdown")
            for target in self.targets:
                self.lose(vhost, target)

    async def link_up(self, host: str = "host0") -> None:
        physical = self.hosts[host]
        physical.link = True
        self._set(physical.at / "fc_host" / host / "port_state", "Online")
        self._fc_event(physical, FcEventCode.LINKUP, styles=("lpfc", "qla2xxx"))
        for vhost in self._vhosts(physical):
            await self._log_in(vhost)

    def lose(self, vhost: FakeHost, target: FakeTarget) -> None:
        """A remote port is gone from a vport's view: blocked, until it is back or its timers fire."""
        rport = vhost.rports.get(target.wwpn)
        if rport is None or self._text(self._rport(vhost, rport) / "port_state") != "Online":
            return
        at = self._rport(vhost, rport)
        self._set(at / "port_state", "Blocked")
        for node in self._nodes(vhost, target):
            self._set(self._lun(node) / "state", "blocked")
            self._end_held(node, DID_ERROR if self.style == "fcoe" else DID_TRANSPORT_DISRUPTED)
        scope = trio.CancelScope()
        vhost.scopes.append(scope)
        self._nursery.start_soon(self._timers, vhost, target, scope)

    def back(self, vhost: FakeHost, target: FakeTarget) -> None:
        rport = vhost.rports[target.wwpn]
        for scope in vhost.scopes:
            scope.cancel()
        vhost.scopes.clear()
        self._set(self._rport(vhost, rport) / "port_state", "Online")
        self._set(self._rport(vhost, rport) / "port_id", f"0x{target.port_id:06x}")
        self._set(self._rport(vhost, rport) / "scsi_target_id", f"{self._target_id(vhost, rport)}")
        for node in self._nodes(vhost, target):
            self._set(self._lun(node) / "state", "running")
            held, node.held = node.held, []
            for command in held:
                self._run(node, command)
        self._scan(vhost, target)

    def rscn(self, host: str = "host0") -> None:
        """A state change notification, for drivers that pass it on."""
        for one in (self.hosts[host], *self._vhosts(self.hosts[host])):
            self._fc_event(one, FcEventCode.RSCN, b"\0\1\2\3", styles=("lpfc", "qla2xxx"))

    def attention(self, target: FakeTarget, what: str, number: int | None = None) -> None:
        """A command of somebody's has met this unit attention."""
        for node in self.nodes.values():
            if node.target is target and number in {None, node.number}:
                self._uevent("change", self._lun(node), "scsi", SDEV_UA=what)
                return

    def release(self, target: FakeTarget) -> None:
        """Run what was held."""
        for node in self.nodes.values():
            if node.target is target:
                held, node.held = node.held, []
                for command in held:
                    self._run(node, command, anyway=True)

    # ---------------------------------------------------------------- hosts and vports

    def _add_physical(self, number: int, max_vports: int) -> None:
        name = f"host{number}"
        wwn = 0x2100_0000_0000_0000 + number
        host = FakeHost(
            name, self.root / f"devices/pci0/{name}", Wwn(wwn), Wwn(wwn + 0x1_0000), 0x010200 + (number << 8)
        )
        self._add_host(host)
        at = host.at / "fc_host" / name
        for file, text in (
            ("max_npiv_vports", str(max_vports)),
            ("npiv_vports_inuse", "0"),
            ("vport_create", ""),
            ("vport_delete", ""),
            ("issue_lip", ""),
        ):
            self._put(at / file, text)

    def _add_host(self, host: FakeHost) -> None:
        self.hosts[host.name] = host
        kind = "NPort (fabric via point-to-point)" if self.style == "fcoe" or not host.parent else "NPIV VPORT"
        fc = {
            "port_name": f"0x{host.wwpn:x}",
            "node_name": f"0x{host.wwnn:x}",
            "fabric_name": f"0x{FABRIC_NAME:x}" if not host.parent else "0x0",
            "port_id": f"0x{host.port_id:06x}" if not host.parent else "0xffffffff",
            "port_type": kind,
            "port_state": "Online" if not host.parent else "Offline",
            "speed": "16 Gbit",
            "symbolic_name": "",
            "dev_loss_tmo": "60",
        }
        scsi = {"can_queue": "1024", "sg_tablesize": "128", "proc_name": self.style, "scan": "", "state": "running"}
        self._class(host.at, "fc_host", host.name, fc)
        self._class(host.at, "scsi_host", host.name, scsi)
        self._uevent("add", host.at / "scsi_host" / host.name, "scsi_host")
        self._uevent("add", host.at / "fc_host" / host.name, "fc_host")

    async def _create(self, text: str, _class: str, name: str) -> int | None:
        host = self.hosts[name]
        if self.next_create is not None:
            code, self.next_create = self.next_create, None
            self._vport_came_and_went(host)
            if code < 0:
                return -code
            raise OSError(code, os.strerror(code))
        if not re.fullmatch(r"[0-9a-fA-F]{16}:[0-9a-fA-F]{16}", text):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        inuse = host.at / "fc_host" / name / "npiv_vports_inuse"
        if int(self._text(inuse)) >= int(self._text(inuse.with_name("max_npiv_vports"))):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        wwpn, wwnn = (Wwn(int(part, 16)) for part in text.split(":"))
        if any(other.wwpn == wwpn for other in self.hosts.values()):
            self._vport_came_and_went(host)
            code = {"fcoe": errno.EINVAL, "lpfc": errno.ENOENT}.get(self.style, ENOTUNIQ)
            raise OSError(code, os.strerror(code))
        if self.style == "qla2xxx" and self.verdict == "no npiv":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self.make_vport(host, wwpn, wwnn)
        return None

    def make_vport(self, host: FakeHost, wwpn: Wwn, wwnn: Wwn, symbolic_name: str = "") -> FakeHost:
        """As vport_create does; also for vports that were there before."""
        serial = self._serial
        self._serial += 1
        vport = f"vport-{host.number}:0-{serial}"
        at = host.at / vport
        attributes = {
            "vport_state": "Initializing",
            "vport_last_state": "Unknown",
            "port_name": f"0x{wwpn:x}",
            "node_name": f"0x{wwnn:x}",
            "roles": "FCP Initiator",
            "vport_type": "NPIV VPORT",
            "symbolic_name": symbolic_name,
            "vport_disable": "",
            "vport_delete": "",
        }
        self._class(at, "fc_vports", vport, attributes)
        self._uevent("add", at / "fc_vports" / vport, "fc_vports")
        name = f"host{1 + max(one.number for one in self.hosts.values())}"
        self._ids += 1
        vhost = FakeHost(name, at / name, wwpn, wwnn, host.port_id + self._ids, host, vport)
        self._add_host(vhost)
        self._count(host, 1)
        if self.style == "fcoe":
            self._fc_event(vhost, FcEventCode.LIPRESET)
        self._nursery.start_soon(self._log_in, vhost)
        return vhost

    def _vport_came_and_went(self, host: FakeHost) -> None:
        at = host.at / f"vport-{host.number}:0-{self._serial}"
        self._serial += 1
        for action in ("add", "remove"):
            self._uevent(action, at / "fc_vports" / at.name, "fc_vports")

    def _count(self, host: FakeHost, by: int) -> None:
        inuse = host.at / "fc_host" / host.name / "npiv_vports_inuse"
        self._set(inuse, str(int(self._text(inuse)) + by))

    async def _log_in(self, vhost: FakeHost) -> None:
        assert vhost.parent
        await trio.sleep(self.pace)
        if self.hosts.get(vhost.name) is not vhost:
            return
        if not vhost.parent.link:
            self._state(vhost, "Linkdown")
            return
        refused = {
            "no npiv": "No Fabric Support",
            "no resources": "No Fabric Resources",
            "duplicate": "Fabric Rejected WWN",
            "silent": "Initializing",
        }
        if vhost.parent.name in self.refusing:
            self._state(vhost, self.refusing[vhost.parent.name])
            return
        if self.verdict != "accept":
            # libfc does not look at why it is refused: it goes on trying.
            known = self.style != "fcoe" or self.verdict == "no npiv"
            self._state(vhost, refused[self.verdict] if known else "Initializing")
            return
        fc = vhost.at / "fc_host" / vhost.name
        self._set(fc / "port_id", f"0x{vhost.port_id:06x}")
        self._set(fc / "port_state", "Online")
        self._set(fc / "fabric_name", f"0x{FABRIC_NAME:x}")
        self._state(vhost, "Active")
        await trio.sleep(self.pace)
        for target in reversed(self.targets):  # not in the order of the name server's list
            if target.zoned and self.hosts.get(vhost.name) is vhost:
                self._find(vhost, target)
                await trio.sleep(self.pace)

    def _find(self, vhost: FakeHost, target: FakeTarget) -> None:
        if target.wwpn in vhost.rports:
            self.back(vhost, target)
            return
        rport = f"rport-{vhost.number}:0-{len(vhost.rports)}"
        vhost.rports[target.wwpn] = rport
        attributes = {
            "port_name": f"0x{target.wwpn:x}",
            "node_name": f"0x{target.wwnn:x}",
            "port_id": f"0x{target.port_id:06x}",
            "port_state": "Online",
            "roles": "FCP Target",
            "scsi_target_id": f"{self._target_id(vhost, rport)}",
            "dev_loss_tmo": self._text(vhost.at / "fc_host" / vhost.name / "dev_loss_tmo"),
            "fast_io_fail_tmo": "off",
        }
        self._class(vhost.at / rport, "fc_remote_ports", rport, attributes)
        self._uevent("add", self._rport(vhost, rport), "fc_remote_ports")
        self._scan(vhost, target)

    async def _delete(self, text: str, _class: str, name: str) -> None:
        wwpn, wwnn = (int(part, 16) for part in text.split(":"))
        for vhost in self._vhosts(self.hosts[name]):
            if (vhost.wwpn, vhost.wwnn) == (wwpn, wwnn):
                await trio.sleep(self.pace)
                self.remove_vport(vhost)
                return
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def remove_vport(self, vhost: FakeHost) -> None:
        assert vhost.parent
        for node in [node for node in self.nodes.values() if node.host is vhost]:
            self._remove_node(node)
        for rport in vhost.rports.values():
            self._unclass("fc_remote_ports", rport)
        for scope in vhost.scopes:
            scope.cancel()
        self._unclass("fc_host", vhost.name)
        self._unclass("scsi_host", vhost.name)
        self._unclass("fc_vports", vhost.vport)
        shutil.rmtree(vhost.at.parent)
        del self.hosts[vhost.name]
        self._count(vhost.parent, -1)
        self._uevent("remove", vhost.at.parent / "fc_vports" / vhost.vport, "fc_vports")

    async def _disable(self, text: str, vport: str) -> None:
        vhost = next(one for one in self.hosts.values() if one.vport == vport)
        if text not in {"0", "1"}:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        disabled = self._text(vhost.at.parent / "fc_vports" / vport / "vport_state") == "Disabled"
        if disabled == (text == "1"):
            raise OSError(errno.EALREADY, os.strerror(errno.EALREADY))
        if text == "1":
            self._state(vhost, "Disabled")
            for target in self.targets:
                self.lose(vhost, target)
        else:
            self._state(vhost, "Initializing")
            self._nursery.start_soon(self._log_in, vhost)

    def _state(self, vhost: FakeHost, state: str) -> None:
        at = vhost.at.parent / "fc_vports" / vhost.vport
        self._set(at / "vport_last_state", self._text(at / "vport_state"))
        self._set(at / "vport_state", state)

    async def _symbolic(self, text: str, vport: str) -> None:
        self._set(self.root / "class/fc_vports" / vport / "symbolic_name", text)

    # ---------------------------------------------------------------- remote ports and units

    def _target_id(self, vhost: FakeHost, rport: str) -> int:
        return int(rport.rpartition("-")[2])

    def _rport(self, vhost: FakeHost, rport: str) -> Path:
        return vhost.at / rport / "fc_remote_ports" / rport

    def _lun(self, node: _Node) -> Path:
        rport = node.host.rports[node.target.wwpn]
        return node.host.at / rport / f"target{node.hctl.rpartition(':')[0]}" / node.hctl

    def _nodes(self, vhost: FakeHost, target: FakeTarget) -> list[_Node]:
        return [node for node in self.nodes.values() if node.host is vhost and node.target is target]

    def _vhosts(self, host: FakeHost) -> list[FakeHost]:
        return [one for one in self.hosts.values() if one.parent is host]

    async def _timer(self, text: str, rport: str, name: str) -> None:
        at = self.root / "class/fc_remote_ports" / rport
        if self._text(at / "port_state") in {"Blocked", "Not Present"}:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        after = {one: self._text(at / one) for one in ("dev_loss_tmo", "fast_io_fail_tmo")} | {name: text}
        fast = None if after["fast_io_fail_tmo"] == "off" else int(after["fast_io_fail_tmo"])
        loss = int(after["dev_loss_tmo"])
        if (fast is not None and fast >= loss) or (fast is None and loss > 600):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._set(at / name, text)

    async def _timers(self, vhost: FakeHost, target: FakeTarget, scope: trio.CancelScope) -> None:
        """fast_io_fail_tmo, then dev_loss_tmo."""
        rport = vhost.rports[target.wwpn]
        at = self._rport(vhost, rport)
        with scope:
            await trio.lowlevel.checkpoint()  # its host may have gone at once
            fast, loss = self._text(at / "fast_io_fail_tmo"), int(self._text(at / "dev_loss_tmo"))
            if fast != "off":
                await trio.sleep(int(fast))
                loss -= int(fast)
                for node in self._nodes(vhost, target):
                    self._set(self._lun(node) / "state", "transport-offline")
                    self._end_held(node, DID_NO_CONNECT)
            await trio.sleep(loss)
            for node in self._nodes(vhost, target):
                self._remove_node(node)
            self._set(at / "port_state", "Not Present")
            self._set(at / "port_id", "0xffffffff")

    async def _scan_file(self, text: str, name: str) -> None:
        match = re.fullmatch(r"(0|-) (\d+|-) (\d+|-)", text)
        if not match:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        await trio.sleep(self.pace)
        host = self.hosts[name]
        for target in self.targets:
            rport = host.rports.get(target.wwpn)
            if rport and match[2] in {"-", f"{self._target_id(host, rport)}"}:
                self._scan(host, target)

    def _scan(self, vhost: FakeHost, target: FakeTarget) -> None:
        """Units that are not there yet appear; none goes."""
        rport = vhost.rports[target.wwpn]
        if self._text(self._rport(vhost, rport) / "port_state") != "Online":
            return
        known = {node.number for node in self._nodes(vhost, target)}
        for number, unit in sorted(target.visible(vhost.wwpn).items()):
            if number in known:
                continue
            hctl = f"{vhost.number}:0:{self._target_id(vhost, rport)}:{int.from_bytes(scsi_lun(number)[:2], 'big')}"
            name = f"sg{self._sg}"
            self._sg += 1
            node = _Node(vhost, target, number, hctl)
            self.nodes[name] = node
            at = self._lun(node)
            for file, text in (("state", "running"), ("type", str(unit.type)), ("queue_depth", str(unit.queue_depth))):
                self._put(at / file, text)
            self._put(at / "delete", "")
            self._put(at / "rescan", "")
            (at / "vpd_pg83").write_bytes(unit.page_83)
            self._class(at, "scsi_device", hctl, {})
            self._uevent("add", at, "scsi")
            self._class(at, "scsi_generic", name, {})
            self._uevent("add", at / "scsi_generic" / name, "scsi_generic")
            if self._text(self.root / "bus/scsi/drivers_autoprobe") == "1":
                self.bind(hctl)

    async def _delete_unit(self, _text: str, hctl: str) -> None:
        self._remove_node(next(node for node in self.nodes.values() if node.hctl == hctl))

    async def _rescan_unit(self, _text: str, hctl: str) -> None:
        node = next(node for node in self.nodes.values() if node.hctl == hctl)
        unit = node.target.visible(node.host.wwpn).get(node.number)
        if unit is not None:
            (self._lun(node) / "vpd_pg83").write_bytes(unit.page_83)

    def bind(self, hctl: str, name: str = "sd") -> None:
        """A driver of the host's takes a unit."""
        driver = self.root / "bus/scsi/drivers" / name
        self._put(driver / "unbind", "")
        (self.root / "class/scsi_device" / hctl / "device/driver").symlink_to(driver)

    async def _unbind(self, text: str, name: str) -> None:
        link = self.root / "class/scsi_device" / text / "device/driver"
        if not link.is_symlink() or link.resolve().name != name:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        await self.recovered.wait()  # sd has it write its cache out
        link.unlink()

    async def _state_of_unit(self, text: str, hctl: str) -> None:
        at = self.root / "class/scsi_device" / hctl / "device/state"
        if text not in {"running", "offline"} or self._text(at) not in {"running", "offline"}:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        await self.recovered.wait()  # the kernel asks it who it is
        self._set(at, text)

    def _remove_node(self, node: _Node) -> None:
        name = next(name for name, one in self.nodes.items() if one is node)
        at = self._lun(node)
        self._end_held(node, DID_NO_CONNECT)
        del self.nodes[name]
        for end in node.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._unclass("scsi_generic", name)
        self._unclass("scsi_device", node.hctl)
        shutil.rmtree(at)
        self._uevent("remove", at / "scsi_generic" / name, "scsi_generic")
        self._uevent("remove", at, "scsi")

    # ---------------------------------------------------------------- /dev/sgN

    async def _serve(self, node: _Node, end: socket.socket) -> None:
        with end:
            while True:
                try:
                    await trio.lowlevel.wait_readable(end)
                    raw = end.recv(4096)
                except (OSError, trio.ClosedResourceError):
                    return
                if not raw:
                    return
                header = SgIoHdr.from_buffer_copy(raw)
                assert header.interface_id == ord("S")
                cdb = ctypes.string_at(header.cmdp or 0, header.cmd_len)
                data = _gather(header) if header.dxfer_direction == -2 else b""
                self._run(node, _Command(header, end, node.number, cdb, data))

    def _run(self, node: _Node, command: _Command, *, anyway: bool = False) -> None:
        unit = node.target.units.get(node.number)
        state = self._text(self._lun(node) / "state")
        if state == "blocked" or (unit is not None and unit.hold and not anyway):
            node.held.append(command)
            return
        if state != "running":
            self._finish(command, DID_NO_CONNECT)
            return
        done = node.target.run(node.host.wwpn, node.number, command.cdb, command.data)
        header = command.header
        header.status = done.status
        header.driver_status = 8 if done.status == 2 else 0
        header.sb_len_wr = min(len(done.sense), header.mx_sb_len)
        if header.sb_len_wr:
            ctypes.memmove(header.sbp or 0, done.sense, header.sb_len_wr)
        moved = 0 if done.status else len(command.data)
        if header.dxfer_direction == -3:
            moved = min(len(done.data), header.dxfer_len)
            if moved:
                ctypes.memmove(header.dxferp or 0, done.data, moved)
        header.resid = header.dxfer_len - moved
        self._finish(command, 0)

    def _finish(self, command: _Command, host_status: int) -> None:
        command.header.host_status = host_status
        if host_status:
            command.header.resid = command.header.dxfer_len
        with contextlib.suppress(OSError):
            command.end.send(bytes(command.header))

    def _end_held(self, node: _Node, host_status: int) -> None:
        held, node.held = node.held, []
        for command in held:
            self._finish(command, host_status)

    # ---------------------------------------------------------------- files and events

    async def _host_loss(self, text: str, name: str) -> None:
        self._set(self.root / "class/fc_host" / name / "dev_loss_tmo", text)

    async def _autoprobe(self, text: str) -> None:
        self._set(self.root / "bus/scsi/drivers_autoprobe", text)

    _FILES = (
        (r"class/(fc_host|scsi_host)/(host\d+)/vport_create", _create),
        (r"class/(fc_host|scsi_host)/(host\d+)/vport_delete", _delete),
        (r"class/fc_host/(host\d+)/dev_loss_tmo", _host_loss),
        (r"class/fc_vports/(vport-[\d:-]+)/symbolic_name", _symbolic),
        (r"class/fc_vports/(vport-[\d:-]+)/vport_disable", _disable),
        (r"class/fc_remote_ports/(rport-[\d:-]+)/(dev_loss_tmo|fast_io_fail_tmo)", _timer),
        (r"class/scsi_host/(host\d+)/scan", _scan_file),
        (r"class/scsi_device/(\d+:\d+:\d+:\d+)/device/delete", _delete_unit),
        (r"class/scsi_device/(\d+:\d+:\d+:\d+)/device/rescan", _rescan_unit),
        (r"class/scsi_device/(\d+:\d+:\d+:\d+)/device/state", _state_of_unit),
        (r"bus/scsi/drivers/(\w+)/unbind", _unbind),
        (r"bus/scsi/drivers_autoprobe", _autoprobe),
    )

    def _put(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._set(path, text)

    def _set(self, path: Path, text: str) -> None:
        path.write_text(text + "\n")

    def _text(self, path: Path) -> str:
        return path.read_text().strip()

    def _class(self, device: Path, name: str, member: str, attributes: dict[str, str]) -> None:
        at = device / name / member
        at.mkdir(parents=True)
        for file, text in attributes.items():
            self._put(at / file, text)
        (at / "device").symlink_to(device)
        entry = self.root / "class" / name / member
        entry.parent.mkdir(parents=True, exist_ok=True)
        entry.symlink_to(at)

    def _unclass(self, name: str, member: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.root / "class" / name / member).unlink()

    def _uevent(self, action: str, at: Path, subsystem: str, **properties: str) -> None:
        devpath = "/" + str(at.relative_to(self.root))
        self._tell(Uevent(action, devpath, subsystem, {"ACTION": action, "DEVPATH": devpath, **properties}))

    def _fc_event(self, host: FakeHost, code: int, data: bytes = b"", styles: tuple[str, ...] = ()) -> None:
        if styles and self.style not in styles:
            return
        self._events += 1
        self._tell(FcEvent(host.number, code, self._events, data))

    def _tell(self, hint: Hint) -> None:
        for listener in self._listeners:
            with contextlib.suppress(trio.WouldBlock):
                listener.send_nowait(hint)
