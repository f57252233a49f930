"""virtio-scsi's structures: golden bytes, both sides of each, and what cannot be read."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostfc.virtio.scsi import (
    EVENTS_MISSED,
    REPORT_LUNS_WELL_KNOWN,
    AsyncNotification,
    CommandRequest,
    CommandResponse,
    ControlType,
    DeviceConfig,
    Event,
    EventType,
    Feature,
    LunAddress,
    Queue,
    ResetReason,
    Response,
    TaskAttribute,
    TaskManagementRequest,
    TmfSubtype,
    cdb_of,
    decode_async_answer,
    decode_control,
    decode_lun,
    encode_async_answer,
    encode_event_lun,
    encode_lun,
)

u8, u16, u32, u64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
targets = st.integers(0, 255)
luns = st.integers(0, 16383)
fields = st.binary(min_size=8, max_size=8)


def linux_event_lun(field: bytes) -> int:
    """How Linux reads an event's LUN (drivers/scsi/virtio_scsi.c, virtscsi_handle_transport_reset)."""
    return field[2] << 8 | field[3]


# ------------------------------------------------------------------------------------------------ LUN field


@given(targets, luns)
def test_a_lun_is_read_as_it_was_written_by_either_method(target: int, lun: int) -> None:
    assert decode_lun(encode_lun(target, lun)) == LunAddress(target, lun)
    assert decode_lun(encode_event_lun(target, lun)) == LunAddress(target, lun)


def test_luns_as_drivers_write_them() -> None:
    assert encode_lun(0, 0).hex() == "0100400000000000"
    assert encode_lun(5, 300).hex() == "0105412c00000000"
    assert decode_lun(bytes.fromhex("0105000700000000")) == LunAddress(5, 7)


@given(targets, luns)
def test_an_events_lun_is_what_linux_calls_the_unit(target: int, lun: int) -> None:
    """Below 256 the LUN itself; above, 16384 + LUN, which is how Linux numbers a flat LUN from REPORT LUNS."""
    assert linux_event_lun(encode_event_lun(target, lun)) == (lun if lun < 256 else 16384 + lun)


def test_fields_that_name_no_target_and_luns_that_are_not_single_level() -> None:
    assert decode_lun(bytes(8)) is None
    assert decode_lun(bytes.fromhex("0205400000000000")) is None
    assert decode_lun(REPORT_LUNS_WELL_KNOWN) is None
    assert decode_lun(b"\1") is None
    assert decode_lun(bytes.fromhex("0105800000000000")) == LunAddress(5, None)  # logical unit addressing
    assert decode_lun(bytes.fromhex("0105c10100000000")) == LunAddress(5, None)  # extended
    assert decode_lun(bytes.fromhex("0105010000000000")) == LunAddress(5, None)  # peripheral, but on bus 1


# ------------------------------------------------------------------------------------------------ configuration


def test_the_configuration_that_qemu_shows() -> None:
    data = DeviceConfig(num_queues=4).pack()

    assert data == bytes.fromhex("04000000 7e000000 ffff0000 80000000 10000000 60000000 20000000 0000 ff00 ff3f0000")
    assert len(data) == 36
    assert DeviceConfig.unpack(data) == DeviceConfig(num_queues=4)
    with pytest.raises(struct.error):
        DeviceConfig.unpack(data[:35])


def test_numbers_of_the_standard() -> None:
    assert [*Feature] == [0, 1, 2, 3]
    assert [*Queue] == [0, 1, 2]
    assert [*TaskAttribute] == [0, 1, 2, 3]
    assert [*Response] == list(range(13))
    assert Response(0).name == "OK"
    assert Response.FUNCTION_COMPLETE.value == 0
    assert [*TmfSubtype] == list(range(8))


# ------------------------------------------------------------------------------------------------ commands


def test_a_command_header_byte_by_byte() -> None:
    header = CommandRequest(
        encode_lun(1, 2),
        0x1122334455667788,
        bytes([0x28, 0, 0, 0, 0, 9, 0, 0, 1, 0]),
        TaskAttribute.ORDERED,
        priority=3,
        crn=7,
    ).pack()

    assert header == bytes.fromhex("0101400200000000 8877665544332211 01 03 07 28000000000900000100") + bytes(22)
    assert len(header) == CommandRequest.SIZE == 51
    assert CommandRequest.unpack(header[:50]) is None


@given(st.builds(CommandRequest, fields, u64, st.binary(min_size=32, max_size=32), u8, u8, u8), st.binary(max_size=9))
def test_a_device_reads_the_command_that_a_driver_wrote(request_: CommandRequest, data_out: bytes) -> None:
    assert CommandRequest.unpack(request_.pack() + data_out) == request_


def test_a_response_byte_by_byte() -> None:
    response = CommandResponse(
        status=2, sense=bytes([0x70, 0, 5]), residual=0x200, status_qualifier=0x0102, response=Response.OK
    ).pack()

    assert response == bytes.fromhex("03000000 00020000 0201 02 00 700005") + bytes(93)
    assert len(response) == CommandResponse.SIZE == 108


@given(st.builds(CommandResponse, u8, u8, st.binary(max_size=96), u32, u16))
def test_a_driver_reads_the_response_that_a_device_wrote(response: CommandResponse) -> None:
    assert CommandResponse.unpack(response.pack() + b"data") == response


def test_sense_is_cut_at_96_bytes_and_never_believed_beyond() -> None:
    long = CommandResponse(sense=bytes(range(120))).pack()

    assert long[:4] == bytes([96, 0, 0, 0])
    assert len(long) == 108
    assert CommandResponse.unpack(bytes([97]) + long[1:]) is None
    assert CommandResponse.unpack(long[:107]) is None


# ------------------------------------------------------------------------------------------------ control queue


def test_a_logical_unit_reset_as_linux_sends_it() -> None:
    data = bytes.fromhex("00000000 05000000 0100400000000000 0000000000000000")

    assert decode_control(data) == TaskManagementRequest(TmfSubtype.LOGICAL_UNIT_RESET, encode_lun(0, 0))
    assert TaskManagementRequest(TmfSubtype.LOGICAL_UNIT_RESET, encode_lun(0, 0)).pack() == data


def test_a_subscription_byte_by_byte() -> None:
    data = bytes.fromhex("02000000 0101400000000000 10000000")

    assert decode_control(data) == AsyncNotification(ControlType.AN_SUBSCRIBE, encode_lun(1, 0), 16)
    assert encode_async_answer(16, Response.BAD_TARGET) == bytes.fromhex("10000000 03")
    assert decode_async_answer(bytes.fromhex("10000000 03")) == (16, Response.BAD_TARGET)
    assert decode_async_answer(bytes(4)) is None


@given(
    st.builds(TaskManagementRequest, u32, fields, u64)
    | st.builds(AsyncNotification, st.sampled_from([ControlType.AN_QUERY, ControlType.AN_SUBSCRIBE]), fields, u32)
)
def test_a_device_reads_the_control_request_that_a_driver_wrote(
    request_: TaskManagementRequest | AsyncNotification,
) -> None:
    data = request_.pack()

    assert decode_control(data + b"more") == request_
    assert decode_control(data[:-1]) is None


@given(st.binary(max_size=40))
def test_no_control_bytes_raise(data: bytes) -> None:
    request = decode_control(data)

    assert request is None or data.startswith(request.pack())


def test_an_unknown_control_type_is_none() -> None:
    assert decode_control(struct.pack("<I", 3) + bytes(60)) is None


# ------------------------------------------------------------------------------------------------ event queue


def test_events_byte_by_byte() -> None:
    added = Event.transport_reset(5, 7, ResetReason.RESCAN)
    grown = Event.param_change(0, 300, 0x2A, 0x09, missed=True)

    assert added.pack() == bytes.fromhex("01000000 0105000700000000 01000000")
    assert grown.pack() == bytes.fromhex("03000080 0100412c00000000 2a090000")
    assert Event(missed=True).pack() == struct.pack("<I", EVENTS_MISSED) + bytes(12)
    assert Event.unpack(grown.pack()[:15]) is None


@given(st.builds(Event, st.sampled_from(EventType), fields, u32, st.booleans()))
def test_a_driver_reads_the_event_that_a_device_wrote(event: Event) -> None:
    assert Event.unpack(event.pack()) == event


def test_the_cdb_in_its_field() -> None:
    """LIO refuses a TEST UNIT READY in 32 bytes, and rightly."""
    assert cdb_of(bytes(32)) == bytes(16)
    assert cdb_of(b"\x12\0\0\0\x24" + bytes(27)) == b"\x12\0\0\0\x24" + bytes(11)
    read_32 = b"\x7f" + bytes(6) + b"\x18\0\x09" + bytes(22)
    assert cdb_of(read_32) == read_32
    assert cdb_of(b"\x7f" + bytes(6) + b"\x0c" + bytes(24)) == b"\x7f" + bytes(6) + b"\x0c" + bytes(12)
    assert cdb_of(b"\xc1" + bytes(30) + b"\x01") == b"\xc1" + bytes(30) + b"\x01"
