"""Fuzzed: the codecs of Fibre Channel, from the frame to the bodies of the name server's accepts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from tests.fc import golden, pcap
from tests.fuzz.target import Cases, Packable, attempt, same
from vhostfc.fc import bls, ct, els, fcoe, fcp, fdmi, fip, ns
from vhostfc.fc.els import Els
from vhostfc.fc.frame import FcType, Frame, FrameError, RCtl
from vhostfc.fc.login import Login
from vhostfc.fc.sequence import DataBuffer, Reassembly, data_frames
from vhostfc.fc.wwn import Wwn

T = TypeVar("T")

ME, PEER = Wwn(0x5001_4380_0000_0002), Wwn(0x5006_0160_0000_0001)


def _codec(decode: Callable[[bytes], Packable]) -> Callable[[bytes], None]:
    """A decoder whose values can be packed."""

    def run(data: bytes) -> None:
        value = attempt(lambda: decode(data), FrameError)
        if value is not None:
            same(value, decode)

    return run


def _pair(decode: Callable[[bytes], T], encode: Callable[[T], bytes]) -> Callable[[bytes], None]:
    """A decoder and the encoder of what it gives."""

    def run(data: bytes) -> None:
        value = attempt(lambda: decode(data), FrameError)
        assert value is None or decode(encode(value)) == value

    return run


def linux() -> list[bytes]:
    """Frames of Linux: header and payload."""
    return list(golden.ALL.values())


# ---------------------------------------------------------------- header and sequences


def _reassembly(data: bytes) -> None:
    """Any frames: never more kept than the limit, and what comes out is what went in."""
    limit = 600
    reassembly, pieces = Reassembly(limit), bytearray()
    for at in range(0, len(data) - 3, 4):
        seq_id, seq_cnt, flags, length = data[at : at + 4]
        payload = bytes([flags]) * length
        frame = Frame(3, 0, 0, FcType.CT, 0x080000 if flags & 1 else 0, 0, 0, seq_id & 1, seq_cnt, payload=payload)
        try:
            whole = reassembly.add(frame)
        except FrameError:
            return
        pieces += payload
        assert len(pieces) <= limit
        if whole is not None:
            assert whole == pieces
            return


def _data_buffer(data: bytes) -> None:
    """Any pieces: never more kept than the command has room for, and every byte where its offset says."""
    length = 1000
    buffer, model = DataBuffer(length), bytearray()
    for at in range(0, len(data) - 3, 4):
        offset, size, value = int.from_bytes(data[at : at + 2], "big") % 1200, data[at + 2], data[at + 3]
        piece = bytes([value]) * size
        try:
            buffer.add(offset, piece)
        except FrameError:
            assert offset > len(model)
            return
        if offset <= len(model):
            model[offset : offset + size] = piece
            del model[length:]
        assert buffer.take() == model


def _cut(data: bytes) -> None:
    """Data is cut into frames and put together again, whatever the limit."""
    if len(data) < 3:
        return
    limit = max(4, int.from_bytes(data[:2], "big") % 2113 & ~3)
    template = Frame(RCtl.DATA_SOLICITED, 1, 2, FcType.FCP, 0, 3, 4, data[2])
    buffer = DataBuffer(len(data) - 3)
    frames = [Frame.unpack(frame.pack()) for frame in data_frames(template, data[3:], limit=limit)]
    for frame in frames:
        assert len(frame.payload) <= limit
        buffer.add(frame.parameter, frame.payload)
    assert buffer.take() == data[3:]
    assert [frame.ends_sequence for frame in frames] == [False] * (len(frames) - 1) + [True] * bool(frames)


def _frame_seeds() -> Iterator[tuple[str, bytes]]:
    for frame in linux():
        yield "frame", frame
    yield "reassembly", bytes([0, 0, 0, 40, 0, 1, 0, 40, 0, 2, 1, 40])
    yield "data", bytes([0, 0, 100, 1, 0, 100, 100, 2, 0, 50, 10, 3])
    yield "cut", bytes([2, 0, 7]) + bytes(range(256)) * 8


FRAME = Cases(
    {"frame": _codec(Frame.unpack), "reassembly": _reassembly, "data": _data_buffer, "cut": _cut}, _frame_seeds
)

# ---------------------------------------------------------------- link services


def _els_request(data: bytes) -> None:
    try:
        request = els.parse_request(data)
    except els.ElsError as error:  # and no other FrameError: each has an answer
        same(error.rejection, els.LsRjt.unpack)
        return
    same(request, els.parse_request)


def _els_reply(data: bytes) -> None:
    rejection = attempt(lambda: els.rejection(data), FrameError)
    if rejection is not None:
        same(rejection, els.LsRjt.unpack)
        assert str(rejection)


def _els_seeds() -> Iterator[tuple[str, bytes]]:
    page = els.PrliPage(8, els.PrliPage.ESTABLISH, els.FcpService.INITIATOR)
    requests: list[els.Request] = [
        Login.flogi(ME, ME),
        Login.fdisc(ME, ME),
        Login.plogi(ME, ME),
        els.Logo(0x010200, ME),
        els.Prli((page, page)),
        els.Prli((page,), Els.PRLO),
        els.Adisc(ME, ME, 0x010200),
        els.Rtv(),
        els.Rscn((els.RscnPage(0x010200), els.RscnPage(0x010000, els.AddressFormat.DOMAIN, 5))),
        els.Scr(),
        els.Rrq(0x010200, 1, 2),
        els.Rec(0x010200, 1, 2),
        els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY),
        els.Echo(b"echo"),
    ]
    for request in requests:
        yield "request", request.pack()
    yield "reply", els.LsRjt(els.Reason.LOGICAL_ERROR, els.Explanation.INVALID_PORT_NAME).pack()
    yield "reply", els.LS_ACC
    yield "login", Login.fabric_accept(PEER, PEER, r_a_tov=10000, e_d_tov=2000).pack()
    yield "rtv accept", els.RtvAcc(10000, 2000).pack()
    yield "rec accept", els.RecAcc(1, 2, 0x010200, 0x01FE01, 512, els.RecAcc.INITIATIVE).pack()
    yield "rnid accept", els.RnidAcc(ME, PEER).pack()
    yield "rnid accept", els.RnidAcc(ME, PEER, els.AssociatedType.HOST, 1, 2, b"vendor").pack()
    yield "ba_acc", bls.BaAcc(1, 2).pack()
    yield "ba_rjt", bls.BaRjt(bls.Reason.LOGICAL_ERROR).pack()
    for frame in map(Frame.unpack, linux()):
        if frame.type == FcType.ELS:
            yield "request" if frame.r_ctl == RCtl.ELS_REQUEST else "login", frame.payload


ELS = Cases(
    {
        "request": _els_request,
        "reply": _els_reply,
        "login": _codec(Login.unpack),
        "prli": _codec(els.Prli.unpack),
        "adisc": _codec(els.Adisc.unpack),
        "rtv accept": _codec(els.RtvAcc.unpack),
        "rec accept": _codec(els.RecAcc.unpack),
        "rnid accept": _codec(els.RnidAcc.unpack),
        "ba_acc": _codec(bls.BaAcc.unpack),
        "ba_rjt": _codec(bls.BaRjt.unpack),
    },
    _els_seeds,
)

# ---------------------------------------------------------------- common transport


def _ct_request(data: bytes) -> None:
    request = attempt(lambda: ns.parse_request(data), FrameError)
    if request is not None:
        same(request, ns.parse_request)


def _fdmi_request(data: bytes) -> None:
    def parse(payload: bytes) -> fdmi.Request:
        return fdmi.parse_request(ct.CtIu.unpack(payload))

    request = attempt(lambda: parse(data), FrameError)
    if request is not None:
        same(request, parse)


def _ct_seeds() -> Iterator[tuple[str, bytes]]:
    codes = ct.Ct
    requests: list[ns.Request] = [
        *(ns.ByPortId(code, 0x010200) for code in (codes.GA_NXT, codes.GPN_ID, codes.GFF_ID, codes.DA_ID)),
        *(ns.ByName(code, ME) for code in (codes.GID_PN, codes.GID_NN, codes.GSNN_NN)),
        *(ns.ByFc4Type(code, 8, 1, 2) for code in (codes.GID_FT, codes.GPN_FT, codes.GNN_FT)),
        ns.GidPt(),
        ns.GidFf(3),
        ns.RpnId(0x010200, ME),
        ns.RnnId(0x010200, ME),
        ns.RcsId(0x010200),
        ns.RptId(0x010200),
        ns.RftId(0x010200, frozenset({8, 0x20})),
        ns.RffId(0x010200, 2),
        ns.RspnId(0x010200, b"port"),
        ns.RsnnNn(ME, b"node"),
    ]
    for request in requests:
        yield "request", request.pack()
    yield "unit", ct.reject(ct.Reason.UNABLE_TO_PERFORM, ct.Explanation.DATABASE_EMPTY).pack()
    yield "ids", ns.pack_port_ids([1, 2, 3])
    yield "names", ns.pack_port_names([(1, ME), (2, PEER)])
    yield "features", ns.pack_features({8: 2, 0x28: 3})
    yield "symbolic", ns.pack_symbolic_name(b"name")
    yield "fdmi names", fdmi.pack_names((ME, PEER))
    attributes: dict[int, bytes] = {
        fdmi.HbaAttribute.MODEL: b"model".ljust(64, b"\0"),
        fdmi.HbaAttribute.MANUFACTURER: b"maker\0\0\0",
    }
    registrations: list[fdmi.Request] = [
        fdmi.RegisterHba(ME, (ME, PEER), attributes),
        fdmi.RegisterPort(ME, PEER, attributes),
        fdmi.RegisterAttributes(fdmi.Fdmi.RPA, ME, attributes),
        fdmi.RegisterAttributes(fdmi.Fdmi.RHAT, ME, attributes),
        *(fdmi.Simple(command, ME) for command in fdmi.Fdmi if command.name[0] in "GD"),
    ]
    for registration in registrations:
        yield "fdmi request", registration.pack()
    yield "entry", ns.PortEntry(1, ME, PEER, frozenset({8}), b"port", b"node").pack()


CT = Cases(
    {
        "request": _ct_request,
        "unit": _codec(ct.CtIu.unpack),
        "ids": _pair(ns.unpack_port_ids, ns.pack_port_ids),
        "names": _pair(ns.unpack_port_names, ns.pack_port_names),
        "features": _pair(ns.unpack_features, ns.pack_features),
        "symbolic": _pair(ns.unpack_symbolic_name, ns.pack_symbolic_name),
        "entry": _codec(ns.PortEntry.unpack),
        "fdmi request": _fdmi_request,
        "fdmi names": _pair(fdmi.unpack_names, fdmi.pack_names),
    },
    _ct_seeds,
)

# ---------------------------------------------------------------- FCP


def _fcp_seeds() -> Iterator[tuple[str, bytes]]:
    lun = bytes([0, 3, *bytes(6)])
    yield "cmnd", fcp.FcpCmnd(lun, b"\x28", 512, read=True).pack()
    yield "cmnd", fcp.FcpCmnd(lun, b"\x7f\0\0\0\0\0\0\x18\0\x0b" + bytes(22), 512, write=True, priority=3).pack()
    yield "cmnd", fcp.FcpCmnd(lun, b"\x53", 512, write=True, read=True, bidirectional_read_length=512).pack()
    yield "cmnd", fcp.FcpCmnd(lun, bytes(16), tm_flags=fcp.TmFlag.LOGICAL_UNIT_RESET).pack()
    yield "xfer_rdy", fcp.FcpXferRdy(0, 65536).pack()
    yield "rsp", fcp.FcpRsp(2, 512, bytes([0x70, 0, 5, *bytes(15)])).pack()
    yield "rsp", fcp.FcpRsp(code=fcp.ResponseCode.REJECTED, residual=-4).pack()


FCP = Cases(
    {
        "cmnd": _codec(fcp.FcpCmnd.unpack),
        "xfer_rdy": _codec(fcp.FcpXferRdy.unpack),
        "rsp": _codec(fcp.FcpRsp.unpack),
    },
    _fcp_seeds,
)

# ---------------------------------------------------------------- FCoE and FIP


def _pdu_of(data: bytes) -> None:
    """Whatever its delimiters say, an FC frame gets through."""
    frame = attempt(lambda: Frame.unpack(data), FrameError)
    if frame is not None:
        assert fcoe.decapsulate(fcoe.encapsulate(data)) == data


def _fcoe_seeds() -> Iterator[tuple[str, bytes]]:
    for frame in linux()[:8]:
        yield "pdu", fcoe.encapsulate(frame)
        yield "frame", frame
    seen = set()
    for packet in pcap.packets():
        ethernet = fcoe.Ethernet.unpack(packet)
        if ethernet.ethertype == fcoe.ETHERTYPE_FIP and ethernet.payload[2:6] not in seen:
            seen.add(ethernet.payload[2:6])
            yield "ethernet", packet
            yield "fip", ethernet.payload
    every = (
        fip.Priority(),
        fip.Mac(bytes(6)),
        fip.FcMap(fcoe.FC_MAP),
        fip.NameIdentifier(ME),
        fip.Fabric(ME, fcoe.FC_MAP, 1),
        fip.MaxFcoeSize(2158),
        fip.Encapsulated(fip.Encapsulated.FLOGI, golden.FLOGI),
        fip.VxPortId(bytes(6), 0x010200, ME),
        fip.KeepAlivePeriod(8000, no_keep_alives=True),
        fip.VendorId(bytes(8)),
        fip.Vlan(100),
    )
    yield "fip", fip.Fip(fip.Operation.VLAN_NOTIFICATION, fip.Flag.FPMA, every).pack()


FCOE = Cases(
    {
        "pdu": _pair(fcoe.decapsulate, fcoe.encapsulate),
        "frame": _pdu_of,
        "ethernet": _codec(fcoe.Ethernet.unpack),
        "fip": _codec(fip.Fip.unpack),
    },
    _fcoe_seeds,
)
