"""Sequences: cutting data into frames, and putting frames together again (FC-FS-4 clause 18 and 19).

SEQ_CNT counts the frames of a sequence from 0 and wraps at 65536; the last frame has END_SEQUENCE.
With RELATIVE_OFFSET, PARAMETER says where the payload belongs.  The links that we know keep the
order of frames, so a sequence with a hole in it is one that lost frames, and is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator

from vhostfc.fc.frame import F_CTL_REPLY, MAX_PAYLOAD, FCtl, FcType, Frame, FrameError, RCtl

#: FCP_DATA is cut at whole 512-byte blocks: the largest payload of 2112 bytes that holds them.
MAX_DATA = 2048


def data_payload(receive_size: int) -> int:
    """How much FCP_DATA to put into a frame for a receiver that takes receive_size bytes (>= 256)."""
    return receive_size & ~511 if receive_size >= 512 else receive_size & ~3


def data_frames(
    template: Frame,
    data: bytes | memoryview,
    offset: int = 0,
    *,
    limit: int = MAX_DATA,
    end_f_ctl: int = FCtl(0),
) -> Iterator[Frame]:
    """One sequence of FCP_DATA.

    template: addresses, identifiers, SEQ_ID and the F_CTL that all frames share (EXCHANGE_RESPONDER from
    a target).  offset: of data[0] in the command's buffer.  limit: bytes in a frame.  end_f_ctl: what the
    last frame has besides END_SEQUENCE (SEQUENCE_INITIATIVE from an initiator).  No data, no frame.
    """
    view = memoryview(data)
    for count, start in enumerate(range(0, len(view), limit)):
        chunk = view[start : start + limit]
        last = start + limit >= len(view)
        yield Frame(
            RCtl.DATA_SOLICITED,
            template.d_id,
            template.s_id,
            FcType.FCP,
            template.f_ctl | FCtl.RELATIVE_OFFSET | ((FCtl.END_SEQUENCE | end_f_ctl) if last else 0),
            template.ox_id,
            template.rx_id,
            template.seq_id,
            count & 0xFFFF,
            (offset + start) & 0xFFFFFFFF,
            bytes(chunk),
        )


def target_data(
    cmnd: Frame, data: bytes, *, rx_id: int, seq_id: int, offset: int = 0, limit: int = MAX_DATA
) -> Iterator[Frame]:
    """The data of a read, from the target, as one sequence in the exchange of this FCP_CMND."""
    template = Frame(
        RCtl.DATA_SOLICITED, cmnd.s_id, cmnd.d_id, FcType.FCP, FCtl.EXCHANGE_RESPONDER, cmnd.ox_id, rx_id, seq_id
    )
    return data_frames(template, data, offset, limit=limit)


def initiator_data(
    xfer_rdy: Frame, data: bytes | memoryview, offset: int, *, seq_id: int, limit: int = MAX_DATA
) -> Iterator[Frame]:
    """The burst that this FCP_XFER_RDY asks for; data: just the burst."""
    template = Frame(
        RCtl.DATA_SOLICITED, xfer_rdy.s_id, xfer_rdy.d_id, FcType.FCP, 0, xfer_rdy.ox_id, xfer_rdy.rx_id, seq_id
    )
    return data_frames(template, data, offset, limit=limit, end_f_ctl=FCtl.SEQUENCE_INITIATIVE)


def ct_reply(
    request: Frame, payload: bytes, *, rx_id: int = 0xFFFF, seq_id: int = 0, limit: int = 2048
) -> Iterator[Frame]:
    """A CT_IU in reply to a request, in as many frames as it takes."""
    starts = range(0, len(payload), limit)
    for count, start in enumerate(starts):
        last = start + limit >= len(payload)
        yield Frame(
            RCtl.DATA_SOLICITED_CONTROL,
            request.s_id,
            request.d_id,
            FcType.CT,
            F_CTL_REPLY if last else FCtl.EXCHANGE_RESPONDER | FCtl.LAST_SEQUENCE,
            request.ox_id,
            rx_id,
            seq_id,
            count & 0xFFFF,
            payload=payload[start : start + limit],
        )


class Reassembly:
    """Puts the payloads of one sequence together: for a CT_IU or an ELS of several frames.

    The frames of a sequence arrive in order or not at all.
    """

    def __init__(self, limit: int) -> None:
        """limit: the most bytes that are kept."""
        self._limit = limit
        self._seq_id: int | None = None
        self._next = 0
        self._data = bytearray()

    def add(self, frame: Frame) -> bytes | None:
        """The whole payload with the last frame, else None.  Raises FrameError for a hole, or beyond the limit."""
        if frame.seq_cnt == 0 and self._seq_id is None:
            self._seq_id = frame.seq_id
        if frame.seq_id != self._seq_id or frame.seq_cnt != self._next & 0xFFFF:
            raise FrameError(f"frame {frame.seq_id}/{frame.seq_cnt} where {self._seq_id}/{self._next} was due")
        self._next += 1
        self._data += frame.payload
        if len(self._data) > self._limit:
            raise FrameError(f"a sequence of more than {self._limit} bytes")
        return bytes(self._data) if frame.ends_sequence else None


class DataBuffer:
    """The data of a command as FCP_DATA brings it, each piece at its offset; bounded by the command's length.

    Bytes beyond the bound are counted as arrived and dropped: the residual tells of them.
    """

    def __init__(self, length: int) -> None:
        self._data = bytearray()
        self._length = length
        self.received = 0

    def add(self, offset: int, payload: bytes) -> None:
        """Raises FrameError for a piece that leaves a hole: frames were lost, or come out of order."""
        if offset > len(self._data) and len(self._data) < self._length:
            raise FrameError(f"data at offset {offset} where {len(self._data)} was due")
        self.received = max(self.received, offset + len(payload))
        room = max(0, self._length - offset)
        self._data[offset : offset + min(room, len(payload))] = payload[:room]

    def take(self) -> bytes:
        return bytes(self._data)


assert MAX_DATA <= MAX_PAYLOAD
