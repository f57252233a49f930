"""The codec: golden bytes from the protocol's tables, round trips of everything, and what is refused."""

from __future__ import annotations

import struct
import uuid
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.vhost import messages as m
from vhostfc.vhost.features import OFFERED, OFFERED_PROTOCOL, Feature, ProtocolFeature, mask, names
from vhostfc.vhost.messages import Header, Packet, Payload, ProtocolError
from vhostfc.vhost.requests import (
    BACK_END,
    FRONT_END,
    MAX_PAYLOAD,
    AnyRequest,
    BackendRequest,
    Message,
    Request,
    check_size,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
    has_own_reply,
    row,
)


def packet(data: bytes, fds: int = 0) -> Packet:
    """Bytes as a socket would deliver them, with made-up descriptors."""
    return Packet(Header.unpack(data[:12]), data[12:], tuple(range(100, 100 + fds)))


def hexes(text: str) -> bytes:
    return bytes.fromhex(text.replace("|", ""))


# ------------------------------------------------------------------------------------------------ golden bytes

# name, request, payload, need_reply, bytes of a little-endian machine, descriptors
GOLDEN: list[tuple[AnyRequest, Payload, bool, str, int]] = [
    (Request.GET_FEATURES, m.Empty(), False, "01000000 01000000 00000000", 0),
    (Request.SET_FEATURES, m.U64(0x140000000), True, "02000000 09000000 08000000 | 00000040 01000000", 0),
    (
        Request.SET_MEM_TABLE,
        m.MemoryTable((m.Region(0, 0xA0000, 0x7F0000000000, 0),)),
        True,
        "05000000 09000000 28000000 | 01000000 00000000"
        "0000000000000000 00000a0000000000 00000000007f0000 0000000000000000",
        1,
    ),
    (Request.SET_LOG_BASE, m.Log(0x4000), False, "06000000 01000000 10000000 | 0040000000000000 0000000000000000", 1),
    (Request.SET_VRING_NUM, m.VringState(2, 128), False, "08000000 01000000 08000000 | 02000000 80000000", 0),
    (
        Request.SET_VRING_ADDR,
        m.VringAddr(2, 0, desc=0x1000, used=0x3000, avail=0x2000, log_guest_addr=0x3000),
        False,
        "09000000 01000000 28000000 | 02000000 00000000"
        "0010000000000000 0030000000000000 0020000000000000 0030000000000000",
        0,
    ),
    (Request.GET_VRING_BASE, m.VringState(1), False, "0b000000 01000000 08000000 | 01000000 00000000", 0),
    (Request.SET_VRING_KICK, m.VringFd.of(2), False, "0c000000 01000000 08000000 | 0200000000000000", 1),
    (Request.SET_VRING_CALL, m.VringFd.of(2, fd=False), False, "0d000000 01000000 08000000 | 0201000000000000", 0),
    (Request.IOTLB_MSG, m.Iotlb(0x1000, 0x2000, 0x3000, 3, 2), True,
     "16000000 09000000 20000000 | 0010000000000000 0020000000000000 0030000000000000 03 02 000000000000", 0),
    (Request.GET_CONFIG, m.Config(4, 0, b"\0\0"), False,
     "18000000 01000000 0e000000 | 04000000 02000000 00000000 0000", 0),
    (Request.GET_INFLIGHT_FD, m.Inflight(0, 0, 3, 128), False,
     "1f000000 01000000 18000000 | 0000000000000000 0000000000000000 0300 8000 00000000", 0),
    (Request.RESET_DEVICE, m.Empty(), False, "22000000 01000000 00000000", 0),
    (
        Request.ADD_MEM_REG,
        m.SingleRegion(0xC0000, 0x7FF40000, 0x7F00000C0000, 0xC0000),
        True,
        "25000000 09000000 28000000 | 0000000000000000"
        "00000c0000000000 0000f47f00000000 00000c00007f0000 00000c0000000000",
        1,
    ),
    (Request.GET_SHARED_OBJECT, m.SharedObject(uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")), False,
     "29000000 01000000 10000000 | 00112233445566778899aabbccddeeff", 0),
    (Request.SET_DEVICE_STATE_FD, m.DeviceState(1, 0), False,
     "2a000000 01000000 08000000 | 01000000 00000000", 1),
    (BackendRequest.CONFIG_CHANGE_MSG, m.Empty(), True, "02000000 09000000 00000000", 0),
    (BackendRequest.VRING_HOST_NOTIFIER_MSG, m.VringArea(2, 0x1000, 0), False,
     "03000000 01000000 18000000 | 0200000000000000 0010000000000000 0000000000000000", 1),
    (BackendRequest.SHMEM_MAP, m.MmapRequest(1, 2, 3, 4, 1), False,
     "09000000 01000000 28000000 | 01 00000000000000"
     "0200000000000000 0300000000000000 0400000000000000 0100000000000000", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "payload", "need_reply", "expected", "fds"), GOLDEN, ids=[row_[0].name for row_ in GOLDEN]
)
def test_requests_have_the_bytes_of_the_protocols_tables(
    request_: AnyRequest, payload: Payload, need_reply: bool, expected: str, fds: int
) -> None:
    data = encode_request(request_, payload, need_reply=need_reply)

    assert data == hexes(expected)
    assert decode_request(packet(data, fds), type(request_)) == Message(request_, payload, need_reply)


GOLDEN_REPLIES: list[tuple[AnyRequest, Payload, str, int]] = [
    (Request.GET_FEATURES, m.U64(0x140000000), "01000000 05000000 08000000 | 00000040 01000000", 0),
    (Request.SET_VRING_ENABLE, m.U64(0), "12000000 05000000 08000000 | 0000000000000000", 0),
    (Request.GET_VRING_BASE, m.VringState(2, 0x1234), "0b000000 05000000 08000000 | 02000000 34120000", 0),
    (Request.GET_CONFIG, m.Empty(), "18000000 05000000 00000000", 0),
    (Request.POSTCOPY_ADVISE, m.Empty(), "1c000000 05000000 00000000", 1),
    (Request.GET_INFLIGHT_FD, m.Inflight(0x2000, 0, 3, 128),
     "1f000000 05000000 18000000 | 0020000000000000 0000000000000000 0300 8000 00000000", 1),
    (Request.SET_MEM_TABLE, m.MemoryTable((m.Region(1, 2, 3, 4),)),
     "05000000 05000000 28000000 | 01000000 00000000"
     "0100000000000000 0200000000000000 0300000000000000 0400000000000000", 0),
    (BackendRequest.SHARED_OBJECT_LOOKUP, m.U64(1), "08000000 05000000 08000000 | 0100000000000000", 0),
]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "payload", "expected", "fds"), GOLDEN_REPLIES, ids=[row_[0].name for row_ in GOLDEN_REPLIES]
)
def test_replies_have_flags_5_and_repeat_the_request(
    request_: AnyRequest, payload: Payload, expected: str, fds: int
) -> None:
    data = encode_reply(request_, payload)

    assert data == hexes(expected)
    assert decode_reply(request_, packet(data, fds)) == payload


def test_the_tables_name_every_request_of_both_directions() -> None:
    assert sorted(FRONT_END) == list(range(1, 46))
    assert sorted(BACK_END) == list(range(1, 11))


def test_which_requests_have_a_reply_of_their_own() -> None:
    own = {request.value for request in Request if has_own_reply(request)}

    assert own == {1, 6, 11, 15, 17, 22, 24, 26, 28, 29, 30, 31, 36, 40, 41, 42, 43, 44, 45}
    assert [request for request in BackendRequest if has_own_reply(request)] == [BackendRequest.SHARED_OBJECT_LOOKUP]


def test_an_inflight_payload_of_20_bytes_is_read_and_24_are_written() -> None:
    short = struct.pack("=QQHH", 1, 2, 3, 4)

    assert m.Inflight.unpack(short) == m.Inflight(1, 2, 3, 4)
    assert m.Inflight(1, 2, 3, 4).pack() == short + bytes(4)


# ------------------------------------------------------------------------------------------------ round trips

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
regions = st.builds(m.Region, u64, u64, u64, u64)

SHAPES: dict[type, st.SearchStrategy[Payload]] = {
    m.Empty: st.builds(m.Empty),
    m.U64: st.builds(m.U64, u64),
    m.VringState: st.builds(m.VringState, u32, u32),
    m.VringAddr: st.builds(m.VringAddr, u32, u32, u64, u64, u64, u64),
    m.VringFd: st.builds(lambda index, fd: m.VringFd.of(index, fd=fd), u8, st.booleans()),
    m.MemoryTable: st.builds(m.MemoryTable, st.lists(regions, max_size=8).map(tuple)),
    m.SingleRegion: st.builds(m.SingleRegion, u64, u64, u64, u64),
    m.Log: st.builds(m.Log, u64, u64),
    m.Inflight: st.builds(m.Inflight, u64, u64, u16, u16),
    m.Config: st.builds(m.Config, u32, u32, st.binary(max_size=256)),
    m.Iotlb: st.builds(m.Iotlb, u64, u64, u64, u8, u8),
    m.VringArea: st.builds(m.VringArea, u64, u64, u64),
    m.DeviceState: st.builds(m.DeviceState, u32, u32),
    m.SharedObject: st.builds(m.SharedObject, st.uuids()),
    m.MmapRequest: st.builds(m.MmapRequest, u8, u64, u64, u64, u64),
    m.ShmemConfig: st.builds(m.ShmemConfig, st.lists(u64, min_size=256, max_size=256).map(tuple)),
    m.Opaque: st.builds(m.Opaque, st.binary(max_size=600)),
}

any_request: st.SearchStrategy[AnyRequest] = st.sampled_from([*Request, *BackendRequest])


@given(any_request, st.booleans(), st.data())
def test_what_one_side_encodes_the_other_decodes(request_: AnyRequest, need_reply: bool, data: st.DataObject) -> None:
    """The pair: the front end's encoders against the back end's decoders, and the way back."""
    spec = row(request_)
    payload = data.draw(SHAPES[spec.payload])
    count = payload.fd_count if payload.fd_count is not None else data.draw(st.integers(*spec.fds))
    asked = encode_request(request_, payload, need_reply=need_reply)

    message = decode_request(packet(asked, count), type(request_))

    assert message == Message(request_, payload, need_reply)
    assert len(asked) - 12 <= spec.payload.LONGEST <= MAX_PAYLOAD

    shapes = spec.reply or (m.U64, *([spec.postcopy_reply] if spec.postcopy_reply else []))
    answer = data.draw(st.sampled_from(shapes).flatmap(SHAPES.__getitem__))
    if answer != m.MemoryTable():  # nothing was asked, nothing is answered: eight zeros are the acknowledgement
        fds = data.draw(st.integers(*spec.reply_fds))
        assert decode_reply(message.request, packet(encode_reply(message.request, answer), fds)) == answer


@given(st.binary(max_size=80), st.integers(0, 3), st.sampled_from([Request, BackendRequest]))
def test_no_bytes_raise_anything_but_a_protocol_error(
    data: bytes, fds: int, kind: type[Request] | type[BackendRequest]
) -> None:
    complaints = [complaint(decode_request, packet(data, fds), kind)] if len(data) >= 12 else []
    for request in kind:
        as_request = encode_request(request)[:8] + struct.pack("=I", len(data)) + data
        as_reply = encode_reply(request, m.Empty())[:8] + struct.pack("=I", len(data)) + data
        complaints.append(complaint(decode_request, packet(as_request, fds), kind))
        complaints.append(complaint(decode_reply, request, packet(as_reply, fds)))

    assert all(text is None or (text and "\n" not in text) for text in complaints)


def complaint(decode: Callable[..., object], *arguments: object) -> str | None:
    try:
        decode(*arguments)
    except ProtocolError as error:
        return str(error)
    return None


# ------------------------------------------------------------------------------------------------ refusals


def refused(data: bytes, fds: int = 0) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode_request(packet(data, fds))
    return str(caught.value)


def test_a_short_header_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a header of 11 bytes, expected 12"):
        Header.unpack(bytes(11))


def test_a_short_payload_names_the_request_and_both_sizes() -> None:
    assert refused(struct.pack("=IIII", 8, 1, 4, 0)) == "SET_VRING_NUM: a payload of 4 bytes, expected 8"


def test_a_payload_where_there_should_be_none_is_refused() -> None:
    assert refused(struct.pack("=IIII", 1, 1, 4, 0)) == "GET_FEATURES: a payload of 4 bytes, expected 0"


def test_an_unknown_request_is_named_by_its_number() -> None:
    assert refused(struct.pack("=III", 46, 1, 0)) == "request 46: unknown request"
    assert refused(struct.pack("=III", 0, 1, 0)) == "request 0: unknown request"


def test_a_wrong_version_a_reply_and_unknown_flags_are_refused() -> None:
    assert refused(struct.pack("=III", 1, 2, 0)) == "GET_FEATURES: protocol version 2, expected 1"
    assert refused(struct.pack("=III", 1, 5, 0)) == "GET_FEATURES: flags 0x5, expected 0x1 or 0x9"
    assert refused(struct.pack("=III", 1, 0x11, 0)) == "GET_FEATURES: flags 0x11, expected 0x1 or 0x9"


def test_the_descriptors_must_be_as_many_as_the_request_calls_for() -> None:
    kick = encode_request(Request.SET_VRING_KICK, m.VringFd.of(0))
    poll = encode_request(Request.SET_VRING_KICK, m.VringFd.of(0, fd=False))
    table = encode_request(Request.SET_MEM_TABLE, m.MemoryTable((m.Region(0, 1, 0, 0), m.Region(1, 1, 1, 0))))
    remove = encode_request(Request.REM_MEM_REG, m.SingleRegion(0, 1, 0, 0))

    assert refused(kick) == "SET_VRING_KICK: 0 file descriptors, expected 1"
    assert refused(kick, 2) == "SET_VRING_KICK: 2 file descriptors, expected 1"
    assert refused(poll, 1) == "SET_VRING_KICK: 1 file descriptors, expected 0"
    assert refused(table, 1) == "SET_MEM_TABLE: 1 file descriptors, expected 2"
    assert refused(remove, 2) == "REM_MEM_REG: 2 file descriptors, expected 0 or 1"
    assert refused(encode_request(Request.SET_OWNER), 1) == "SET_OWNER: 1 file descriptors, expected 0"
    assert decode_request(packet(remove, 1)).request is Request.REM_MEM_REG


def test_a_memory_table_of_nine_regions_or_of_a_wrong_size_is_refused() -> None:
    nine = struct.pack("=IIIII", 5, 1, 8 + 9 * 32, 9, 0) + bytes(9 * 32)
    lying = struct.pack("=IIIII", 5, 1, 8 + 32, 2, 0) + bytes(32)

    assert refused(nine, 8) == "SET_MEM_TABLE: 9 regions, at most 8 are allowed"
    assert refused(lying, 2) == "SET_MEM_TABLE: a payload of 40 bytes, expected 72"


def test_unknown_bits_beside_a_ring_index_are_refused() -> None:
    assert refused(struct.pack("=IIIQ", 12, 1, 8, 0x200)) == "SET_VRING_KICK: unknown bits in 0x200"


def test_configuration_space_is_bounded() -> None:
    assert refused(struct.pack("=IIIIII", 25, 1, 12, 0, 257, 0)).startswith("SET_CONFIG: 257 bytes of configuration")


def test_a_header_that_announces_gigabytes_is_refused_before_its_payload_is_read() -> None:
    with pytest.raises(ProtocolError, match="SET_CONFIG: a payload of 4294967295 bytes, far too long"):
        check_size(Header(Request.SET_CONFIG, 1, 2**32 - 1))

    assert check_size(Header(Request.SET_CONFIG, 1, MAX_PAYLOAD)).size == MAX_PAYLOAD


def test_a_reply_must_answer_what_was_asked() -> None:
    def refused_reply(request: AnyRequest, data: bytes, fds: int = 0) -> str:
        with pytest.raises(ProtocolError) as caught:
            decode_reply(request, packet(data, fds))
        return str(caught.value)

    features = encode_reply(Request.GET_FEATURES, m.U64(1))
    assert refused_reply(Request.GET_QUEUE_NUM, features) == ("reply to GET_QUEUE_NUM: it answers GET_FEATURES instead")
    assert refused_reply(Request.GET_FEATURES, encode_request(Request.GET_FEATURES)) == (
        "reply to GET_FEATURES: the reply flag is missing"
    )
    assert refused_reply(Request.GET_FEATURES, struct.pack("=IIIQ", 1, 0xD, 8, 0)).startswith(
        "reply to GET_FEATURES: flags 0xd"
    )
    assert refused_reply(Request.GET_FEATURES, features, 1) == ("reply to GET_FEATURES: 1 file descriptors, expected 0")
    assert refused_reply(Request.POSTCOPY_ADVISE, encode_reply(Request.POSTCOPY_ADVISE, m.Empty())) == (
        "reply to POSTCOPY_ADVISE: 0 file descriptors, expected 1"
    )


def test_shared_memory_regions_must_be_as_many_as_announced() -> None:
    sizes = m.ShmemConfig((0, 4096))

    assert m.ShmemConfig.unpack(sizes.pack()).sizes[:3] == (0, 4096, 0)
    with pytest.raises(ProtocolError, match="2 shared memory regions announced, 1 given"):
        m.ShmemConfig.unpack(struct.pack("=I", 2) + sizes.pack()[4:])


# ------------------------------------------------------------------------------------------------ features


def test_exactly_what_is_implemented_is_offered() -> None:
    assert mask(1, 2, 28, 29, 30, 32, 34) == OFFERED
    assert mask(0, 3, 13, 15) == OFFERED_PROTOCOL


def test_bits_are_named_for_people() -> None:
    assert names(mask(34, 41), Feature) == "RING_PACKED (34), bit 41"
    assert names(mask(0, 12), ProtocolFeature) == "MQ (0), INFLIGHT_SHMFD (12)"
