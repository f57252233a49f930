"""Fuzzed: an adapter's two doors: its N_Port's, where a fabric may say anything, and a vhost-user session's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from tests.fabric.san import wwpn
from tests.fc.conftest import Pair
from tests.fc.tiny import lun
from tests.fuzz.frames import linux
from tests.fuzz.target import Target, attempt, script, steps, whole
from vhostfc.fc import ct, els, ns
from vhostfc.fc.frame import FcType, Frame, RCtl, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.nport import LocalState
from vhostfc.vhost import effects
from vhostfc.vhost import messages as m
from vhostfc.vhost.messages import Header, Packet, ProtocolError
from vhostfc.vhost.requests import FRONT_END, Request, check_size, encode_request
from vhostfc.vhost.session import Session

# ---------------------------------------------------------------- an N_Port


def _nport(data: bytes) -> None:
    """A fabric that says anything at all, and then one that behaves: the port logs in and carries a command."""
    pair = Pair()
    port = pair.port
    pair.up()
    if data[:1] > b"\x80":
        pair.array.hold = True
        port.start_command(pair.remote, lun(0), bytes(16), pair.now, timeout=5)
    for step in steps(data[1:]):
        match step.what % 5:
            case 0:
                port.receive(step.data, pair.now)
            case 1 | 2:  # for this port; an answer to what it asked last
                raw = bytearray(whole(step.data))
                raw[1:4] = port.port_id.to_bytes(3, "big")
                if step.what % 5 == 2 and pair.sent:
                    raw[5:8] = pair.sent[-1].d_id.to_bytes(3, "big")
                    raw[16:18] = pair.sent[-1].ox_id.to_bytes(2, "big")
                port.receive(bytes(raw), pair.now)
            case 3:
                pair.advance(len(step.data) / 8)
            case _:
                port.rescan(pair.now)
        if len(step.data) % 3:
            pair.settle()
        else:  # what it said goes nowhere
            pair.sent += [Frame.unpack(frame) for frame in port.take_frames()]
            pair.events += port.take_events()
        assert port._wire.in_use <= 4096
        assert len(port._discovery._pages) <= 256
        assert len(pair.events) < 8192
    pair.array.hold = False
    port.link_down(pair.now)
    assert not port._wire.in_use
    assert not port._initiator.commands
    pair.take_events()
    pair.up()
    pair.advance(60)
    assert port.state is LocalState.READY
    assert pair.run(0, b"\x28\0\0\0\0\0\0\0\x01\0", data_in_length=512).status == 0


def _nport_seeds() -> Iterator[bytes]:
    rscn = els.Rscn((els.RscnPage(0x01FE01), els.RscnPage(0, els.AddressFormat.FABRIC)))
    name = wwpn(8)
    told: list[els.Request] = [rscn, els.Logo(0x01FE01, name), Login.plogi(name, name), els.Rtv(), els.Echo(b"echo")]
    for request in told:
        frame = els_request(0x01FE01, 0, 0x77, request.pack()).pack()
        yield b"\0" + script((1, frame))
        yield b"\xff" + script((1, frame), (3, bytes(40)))
    answers = [els.LS_ACC, els.LsRjt(9).pack(), Login.plogi(name, name, accept=True).pack()]
    answers += [ct.accept(ns.pack_port_names([(0x01FE02, name)])).pack(), ct.reject(9, 7).pack()]
    for payload in answers:
        for r_ctl, kind in ((RCtl.ELS_REPLY, FcType.ELS), (RCtl.DATA_SOLICITED_CONTROL, FcType.CT)):
            frame = Frame(r_ctl, 0, 0, kind, 0x990000, 0, payload=payload).pack()
            yield b"\0" + script((4, b"123"), (2, frame), (3, bytes(80)))
    for frame in linux():
        yield b"\xff" + script((1, frame), (2, frame))


# ---------------------------------------------------------------- a vhost-user session


def _session(data: bytes) -> None:
    """A front end that says anything: every descriptor that it hands over is closed once, and none is lent after."""
    session = Session()
    fds = iter(range(1000, 1 << 20))
    given: set[int] = set()
    closed: set[int] = set()

    def carry_out(todo: Iterator[effects.Effect]) -> None:
        for effect in todo:
            match effect:
                case effects.Close(gone):
                    assert not closed & set(gone)
                    closed.update(gone)
                case effects.StopRing(index):
                    session.ring_stopped(index, 7)
                case effects.StartRing() as start:
                    assert 0 < start.size <= 32768
                    lent = {start.kick_fd, start.call_fd, start.err_fd} - {-1}
                    assert lent <= given - closed
                case effects.SetMemory(regions):
                    assert {one.fd for one in regions} - {-1} <= given - closed
                    assert len(regions) <= 509
                case effects.Refuse(text):
                    assert text
                    assert "\n" not in text

    for step in steps(data):
        if len(step.data) < Header.SIZE:
            continue
        header = Header.unpack(step.data[: Header.SIZE])
        if step.what & 0x80:  # as it should be
            header = dataclasses.replace(header, flags=m.VERSION, size=len(step.data) - Header.SIZE)
        if attempt(lambda: check_size(header), ProtocolError) is None:  # noqa: B023  called here
            continue
        came = tuple(next(fds) for _ in range(step.what % 9))
        given.update(came)
        carry_out(session.receive(Packet(header, step.data[Header.SIZE :], came)))
    carry_out(session.close())
    assert closed == given


def _session_seeds() -> Iterator[bytes]:
    region = m.Region(0, 1 << 30, 1 << 40, 0)
    at = region.user_addr
    start: list[tuple[int, bytes]] = [
        (0x80, encode_request(Request.SET_OWNER)),
        (0x80, encode_request(Request.SET_PROTOCOL_FEATURES, m.U64((1 << 32) - 1))),
        (0x80, encode_request(Request.SET_FEATURES, m.U64(1 << 32 | 1 << 30 | 1 << 28 | 1 << 29))),
        (0x81, encode_request(Request.SET_MEM_TABLE, m.MemoryTable((region,)))),
        (0x80, encode_request(Request.SET_VRING_NUM, m.VringState(0, 128))),
        (0x80, encode_request(Request.SET_VRING_BASE, m.VringState(0, 0))),
        (0x80, encode_request(Request.SET_VRING_ADDR, m.VringAddr(0, 0, at, at + 0x4000, at + 0x2000))),
        (0x81, encode_request(Request.SET_VRING_CALL, m.VringFd.of(0))),
        (0x81, encode_request(Request.SET_VRING_KICK, m.VringFd.of(0))),
        (0x80, encode_request(Request.SET_VRING_ENABLE, m.VringState(0, 1))),
        (0x80, encode_request(Request.GET_VRING_BASE, m.VringState(0))),
        (0x80, encode_request(Request.RESET_DEVICE)),
    ]
    yield script(*start)
    yield script(*start, *start[3:])
    for request, row in FRONT_END.items():
        size = {m.MemoryTable: 8, m.Config: 12, m.Opaque: 0}.get(row.payload, row.payload.LONGEST)
        yield script(*start[:4], (0x80 | row.fds[0], Header(request, 1, size).pack() + bytes(size)), start[-1])


N_PORT = Target("nport", _nport, _nport_seeds)
SESSION = Target("session", _session, _session_seeds)
