"""Fuzzed: the codecs of what is not Fibre Channel: vhost-user, virtio-scsi, the link to the adapters, captures."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Protocol, Self

from tests.fuzz.frames import linux
from tests.fuzz.target import Cases, attempt, same
from vhostfc.fabric import link, pcapng
from vhostfc.vhost import messages as m
from vhostfc.vhost.messages import Header, Packet, ProtocolError
from vhostfc.vhost.requests import (
    BACK_END,
    FRONT_END,
    AnyRequest,
    BackendRequest,
    Request,
    check_size,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from vhostfc.virtio import scsi

# ---------------------------------------------------------------- vhost-user


def _packet(data: bytes) -> Packet | None:
    """A first byte that says how many descriptors come along, a header, a payload."""
    header = attempt(lambda: check_size(Header.unpack(data[1:13])), ProtocolError)
    return Packet(header, data[13:], tuple(range(data[0] % 10))) if header else None


def _request(kind: type[Request] | type[BackendRequest]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        packet = _packet(data)
        message = attempt(lambda: decode_request(packet, kind), ProtocolError) if packet else None
        if message is not None and packet is not None:
            again = encode_request(message.request, message.payload, need_reply=message.need_reply)
            assert decode_request(Packet(Header.unpack(again[:12]), again[12:], packet.fds), kind) == message

    return run


def _reply(data: bytes) -> None:
    packet = _packet(data)
    if packet is None:
        return
    for request in (*FRONT_END, *BACK_END):
        if request == packet.header.request:
            asked = request
            payload = attempt(lambda: decode_reply(_request_of(asked), packet), ProtocolError)  # noqa: B023  called here
            if payload is not None:
                again = encode_reply(_request_of(asked), payload)
                reread = Packet(Header.unpack(again[:12]), again[12:], packet.fds)
                assert decode_reply(_request_of(asked), reread) == payload


def _request_of(request: int) -> AnyRequest:
    assert isinstance(request, Request | BackendRequest)
    return request


def _vhost_seeds() -> Iterator[tuple[str, bytes]]:
    """Every request with a payload of zeros of a length that fits."""
    shortest = {m.MemoryTable: 8, m.Config: 12, m.Opaque: 0}
    for name, table in (("request", FRONT_END), ("back end's request", BACK_END)):
        for request, row in table.items():
            size = shortest.get(row.payload, row.payload.LONGEST)
            data = Header(request, m.VERSION, size).pack() + bytes(size)
            yield name, bytes([row.fds[0] or row.payload is m.VringFd]) + data
    for request, row in FRONT_END.items():
        for shape in row.reply or (m.U64,):
            size = shortest.get(shape, shape.LONGEST)
            data = Header(request, m.VERSION | m.FLAG_REPLY, size).pack() + bytes(size)
            yield "reply", bytes([row.reply_fds[0]]) + data
    regions = m.MemoryTable((m.Region(0, 1 << 30, 1 << 40, 0), m.Region(4 << 30, 1 << 30, 1 << 41, 1 << 30)))
    yield "request", b"\2" + encode_request(Request.SET_MEM_TABLE, regions)
    yield "request", b"\0" + encode_request(Request.SET_CONFIG, m.Config(0, 0, bytes(36)), need_reply=True)


VHOST = Cases(
    {"request": _request(Request), "back end's request": _request(BackendRequest), "reply": _reply}, _vhost_seeds
)

# ---------------------------------------------------------------- virtio-scsi


class _Structure(Protocol):
    def pack(self) -> bytes: ...

    @classmethod
    def unpack(cls, data: bytes) -> Self | None: ...


def _structure(kind: type[_Structure]) -> Callable[[bytes], None]:
    """What a driver gets wrong is None here, never an error."""

    def run(data: bytes) -> None:
        value = kind.unpack(data)
        assert value is None or kind.unpack(value.pack()) == value

    return run


def _control(data: bytes) -> None:
    request = scsi.decode_control(data)
    if request is not None:
        assert scsi.decode_control(request.pack()) == request
        _lun(request.lun)


def _lun(data: bytes) -> None:
    address = scsi.decode_lun(data)
    if address is not None and address.lun is not None:
        assert scsi.decode_lun(scsi.encode_lun(address.target, address.lun)) == address


def _cdb(data: bytes) -> None:
    field = data[: scsi.CDB_SIZE].ljust(scsi.CDB_SIZE, b"\0")
    cdb = scsi.cdb_of(field)
    assert 16 <= len(cdb) <= scsi.CDB_SIZE
    assert field.startswith(cdb)


def _answer(data: bytes) -> None:
    answer = scsi.decode_async_answer(data)
    assert answer is None or scsi.decode_async_answer(scsi.encode_async_answer(*answer)) == answer


def _device_config(data: bytes) -> None:
    config = attempt(lambda: scsi.DeviceConfig.unpack(data), struct.error)
    if config is not None:
        same(config, scsi.DeviceConfig.unpack)


def _virtio_seeds() -> Iterator[tuple[str, bytes]]:
    lun = scsi.encode_lun(0, 300)
    yield "command", scsi.CommandRequest(lun, 7, b"\x28".ljust(32, b"\0")).pack()
    yield "response", scsi.CommandResponse(status=2, sense=bytes(18), residual=4).pack()
    yield "control", scsi.TaskManagementRequest(scsi.TmfSubtype.ABORT_TASK, lun, 7).pack()
    yield "control", scsi.AsyncNotification(scsi.ControlType.AN_QUERY, lun, 1).pack()
    yield "event", scsi.Event.param_change(0, 300, 0x2A, 9, missed=True).pack()
    yield "configuration", scsi.DeviceConfig().pack()
    yield "lun", lun
    yield "cdb", b"\x7f\0\0\0\0\0\0\x18\0\x0b" + bytes(22)
    yield "answer", scsi.encode_async_answer(1, 0)


VIRTIO = Cases(
    {
        "command": _structure(scsi.CommandRequest),
        "response": _structure(scsi.CommandResponse),
        "event": _structure(scsi.Event),
        "control": _control,
        "lun": _lun,
        "cdb": _cdb,
        "answer": _answer,
        "configuration": _device_config,
    },
    _virtio_seeds,
)

# ---------------------------------------------------------------- the link, and captures


def _link(data: bytes) -> None:
    message = attempt(lambda: link.decode(data), link.LinkError)
    if message is None:
        return
    assert 0 <= link.fd_count(message) <= link.MAX_FDS
    again = link.decode(link.encode(message))
    match message, again:
        case (link.Hello(name), link.Hello(cut)) | (link.Note(name), link.Note(cut)):
            assert name.startswith(cut)
            assert cut == name or len(cut.encode()) > 1020
        case _:
            assert again == message


def _capture(data: bytes) -> None:
    """What is written is whole blocks, whatever the frames and the texts are."""
    text = data[:40].decode("utf-8", errors="surrogateescape")
    section = pcapng.Section(text)
    record = pcapng.Record(len(data), pcapng.Interface(text[:20], text[20:]), data[40:], text)
    written = section.header() + section.packet(record) + section.packet(record) + section.statistics(0, 1)
    kinds, at = [], 0
    while at < len(written):
        kind, length = struct.unpack_from("<II", written, at)
        assert length >= 12
        assert length % 4 == 0
        assert struct.unpack_from("<I", written, at + length - 4)[0] == length
        kinds.append(kind)
        at += length
    assert (at, kinds) == (len(written), [0x0A0D0D0A, 1, 6, 6, 5])


def _link_seeds() -> Iterator[tuple[str, bytes]]:
    mask = b"\xff" * 32
    messages: list[link.Message] = [
        link.Hello("vm1"),
        link.Frame(linux()[0]),
        link.Open(1, 0x010200, 0x01FE01, bytes(8)),
        link.Route(1, 2, 3, mask, link.InFlight.RESET, medium=link.MediumKind.FILE, block_size=512, blocks=8),
        link.Route(1 << 31, 2, 3, gone=True, read_only=True),
        link.RouteAck(1),
        link.Close(2),
        link.Note("who holds it: é"),
        link.LatchStuck(2, 3),
    ]
    for message in messages:
        yield "link", link.encode(message)
    yield "capture", b"a text of forty bytes, with all its bits" + linux()[0]


LINK = Cases({"link": _link, "capture": _capture}, _link_seeds)
