"""FDMI as libfc writes it, field by field, and what is no FDMI."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.fc import ct, fdmi, ns
from vhostfc.fc.ct import CtError, CtIu, Reason
from vhostfc.fc.fdmi import Explanation, Fdmi, HbaAttribute, PortAttribute
from vhostfc.fc.frame import FrameError
from vhostfc.fc.wwn import Wwn

PORT = Wwn(0x2000_5254_0012_3456)
#: libfc's HBA attributes and how long it makes each; its port attributes.
HBA_LENGTHS = {1: 8, 2: 64, 3: 64, **dict.fromkeys(range(4, 11), 256), 11: 4}
PORT_LENGTHS = {1: 32, 2: 4, 3: 4, 4: 4, 5: 256, 6: 256}


def preamble(command: int) -> bytes:
    """Revision 1, GS_Type FAh, GS_Subtype 10h."""
    return bytes([1, 0, 0, 0, 0xFA, 0x10, 0, 0]) + struct.pack("!H", command) + bytes(6)


def block(lengths: dict[int, int]) -> bytes:
    entries = b"".join(struct.pack("!HH", t, 4 + n) + b"text".ljust(n, b"\0") for t, n in lengths.items())
    return struct.pack("!I", len(lengths)) + entries


RHBA = preamble(0x0200) + PORT.pack() + struct.pack("!I", 1) + PORT.pack() + block(HBA_LENGTHS)
RPA = preamble(0x0211) + PORT.pack() + block(PORT_LENGTHS)


def parse(payload: bytes) -> fdmi.Request:
    return fdmi.parse_request(CtIu.unpack(payload))


def test_what_libfc_registers() -> None:
    hba = parse(RHBA)
    assert isinstance(hba, fdmi.RegisterHba)
    assert (hba.hba, hba.ports, len(hba.attributes)) == (PORT, (PORT,), 11)
    assert fdmi.text(hba.attributes[HbaAttribute.MANUFACTURER]) == "text"
    assert hba.pack() == RHBA
    port = parse(RPA)
    assert isinstance(port, fdmi.RegisterAttributes)
    assert (port.command, port.name) == (Fdmi.RPA, PORT)
    assert len(port.attributes[PortAttribute.HOST_NAME]) == 256
    assert port.pack() == RPA


@pytest.mark.parametrize("command", [Fdmi.DHBA, Fdmi.DPRT])
def test_what_libfc_takes_back(command: Fdmi) -> None:
    payload = preamble(command) + PORT.pack()
    assert parse(payload) == fdmi.Simple(command, PORT)
    assert parse(payload).pack() == payload


@pytest.mark.parametrize(
    ("payload", "reason", "explanation"),
    [
        (RHBA[:60], Reason.UNABLE_TO_PERFORM, Explanation.INVALID_HBA_BLOCK_LENGTH),
        (RHBA[:30], Reason.INVALID_SIZE, 0),
        (RPA[:-1], Reason.UNABLE_TO_PERFORM, Explanation.INVALID_PORT_BLOCK_LENGTH),
        (
            RPA[:24] + struct.pack("!IHHHH", 2, 1, 4, 1, 4),
            Reason.UNABLE_TO_PERFORM,
            Explanation.MULTIPLE_PORT_ATTRIBUTES,
        ),
        (RPA[:24] + struct.pack("!IHH", 1, 1, 3), Reason.UNABLE_TO_PERFORM, Explanation.INVALID_PORT_BLOCK_LENGTH),
        (RPA[:24] + struct.pack("!I", 65), Reason.UNABLE_TO_PERFORM, Explanation.INVALID_PORT_BLOCK_LENGTH),
        (preamble(0x0310), Reason.INVALID_SIZE, 0),
        (preamble(0x0210) + PORT.pack(), Reason.INVALID_SIZE, 0),
        (preamble(0x0120) + PORT.pack(), Reason.NOT_SUPPORTED, 0),
        (ns.ByFc4Type(ct.Ct.GPN_FT).pack(), Reason.NOT_SUPPORTED, 0),
    ],
)
def test_what_is_no_request(payload: bytes, reason: int, explanation: int) -> None:
    with pytest.raises(CtError) as caught:
        parse(payload)
    assert (caught.value.reason, caught.value.explanation) == (reason, explanation)


names = st.integers(0, 2**64 - 1).map(Wwn)
attributes = st.dictionaries(st.integers(0, 0xFFFF), st.binary(max_size=40), max_size=9)
requests = st.one_of(
    st.builds(fdmi.Simple, st.just(Fdmi.GRHL)),
    st.builds(fdmi.Simple, st.sampled_from([c for c in Fdmi if c.name[0] in "GD" and c is not Fdmi.GRHL]), names),
    st.builds(fdmi.RegisterHba, names, st.lists(names, max_size=5).map(tuple), attributes),
    st.builds(fdmi.RegisterPort, names, names, attributes),
    st.builds(fdmi.RegisterAttributes, st.sampled_from([Fdmi.RHAT, Fdmi.RPA]), names, attributes),
)


@given(requests)
def test_requests_round_trip(request: fdmi.Request) -> None:
    assert parse(request.pack()) == request


@given(st.lists(names, max_size=9))
def test_lists_of_names_round_trip(list_: list[Wwn]) -> None:
    assert fdmi.unpack_names(fdmi.pack_names(list_)) == tuple(list_)


@pytest.mark.parametrize("data", [b"", b"\0\0\0\2" + bytes(15), b"\xff\xff\xff\xff" + bytes(64)])
def test_a_list_that_is_shorter_than_it_says(data: bytes) -> None:
    with pytest.raises(FrameError):
        fdmi.unpack_names(data)


def test_text_ends_at_the_first_nul() -> None:
    assert fdmi.text(b"Intel Corporation\0\0rest") == "Intel Corporation"
    assert fdmi.text(b"\xff\xfeabc ") == "\ufffd\ufffdabc"
