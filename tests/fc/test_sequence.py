"""Cutting data into frames, and putting frames together."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fc import golden
from vhostfc.fc import ct, ns
from vhostfc.fc.frame import FCtl, Frame, FrameError
from vhostfc.fc.sequence import DataBuffer, Reassembly, ct_reply, data_payload, initiator_data, target_data
from vhostfc.fc.wwn import Wwn

CMND = Frame.unpack(golden.INQUIRY)


def test_the_data_of_a_write_as_linux_sends_it() -> None:
    xfer_rdy = Frame.unpack(golden.XFER_RDY)
    frames = list(initiator_data(xfer_rdy, bytes(2560), 0, seq_id=1))

    assert [frame.pack() for frame in frames] == [header + bytes(length) for header, length in golden.WRITE_DATA]


@given(st.binary(max_size=9000), st.sampled_from([512, 1024, 2048]), st.integers(0, 1 << 20))
def test_data_arrives_as_it_was_sent(data: bytes, limit: int, offset: int) -> None:
    buffer = DataBuffer(len(data))
    frames = list(target_data(CMND, data, rx_id=1, seq_id=2, offset=offset, limit=limit))
    for count, frame in enumerate(frames):
        assert frame.seq_cnt == count
        assert frame.ends_sequence == (frame is frames[-1])
        assert frame.f_ctl & FCtl.RELATIVE_OFFSET
        assert len(frame.payload) <= limit
        buffer.add(frame.parameter - offset, frame.payload)

    assert buffer.take() == data
    assert buffer.received == len(data)


def test_a_lost_frame_is_noticed() -> None:
    frames = list(target_data(CMND, bytes(4096), rx_id=1, seq_id=2, limit=1024))
    buffer = DataBuffer(4096)
    buffer.add(frames[0].parameter, frames[0].payload)

    with pytest.raises(FrameError, match="2048 where 1024 was due"):
        buffer.add(frames[2].parameter, frames[2].payload)


def test_more_data_than_there_is_room_for_is_counted_and_dropped() -> None:
    buffer = DataBuffer(5)
    buffer.add(0, b"abcd")
    buffer.add(4, b"efgh")
    buffer.add(8, b"ijkl")

    assert buffer.take() == b"abcde"
    assert buffer.received == 12


def test_a_long_list_travels_in_many_frames() -> None:
    ports = [(number, Wwn(number)) for number in range(1, 300)]
    payload = ct.accept(ns.pack_port_names(ports)).pack()
    frames = list(ct_reply(CMND, payload))
    assert len(frames) == 3
    assert [frame.ends_sequence for frame in frames] == [False, False, True]

    whole = Reassembly(1 << 16)
    parts = [whole.add(frame) for frame in frames]

    assert parts == [None, None, payload]
    assert ns.unpack_port_names(ct.CtIu.unpack(payload).body) == ports


def test_a_sequence_with_a_hole_is_refused() -> None:
    frames = list(ct_reply(CMND, random.Random(1).randbytes(5000)))
    whole = Reassembly(1 << 16)
    whole.add(frames[0])

    with pytest.raises(FrameError, match="0/2 where 0/1"):
        whole.add(frames[2])


def test_a_sequence_is_not_put_together_for_ever() -> None:
    frames = list(ct_reply(CMND, bytes(5000)))
    whole = Reassembly(3000)
    whole.add(frames[0])

    with pytest.raises(FrameError, match="3000"):
        whole.add(frames[1])


@pytest.mark.parametrize(("size", "payload"), [(2112, 2048), (1452, 1024), (512, 512), (258, 256)])
def test_data_goes_in_whole_blocks(size: int, payload: int) -> None:
    assert data_payload(size) == payload
