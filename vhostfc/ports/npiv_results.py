"""What has become of a command of a vport, in the seam's words; and what is answered where nobody can be asked.

The kernel's words are those of struct sg_io_hdr: host_status and driver_status besides the SCSI status.
"""

from __future__ import annotations

from vhostfc.ports import sg
from vhostfc.ports.base import Outcome, ScsiResult

INQUIRY, REPORT_LUNS = 0x12, 0xA0
#: ILLEGAL REQUEST, LOGICAL UNIT NOT SUPPORTED.
NO_SUCH_UNIT = bytes.fromhex("700005000000000a00000000250000000000")
#: ILLEGAL REQUEST, INVALID FIELD IN CDB.
INVALID_FIELD = bytes.fromhex("700005000000000a00000000240000000000")
#: Peripheral qualifier 3, device type 1Fh: no device can be here (SPC-5 6.6.2).
NOTHING_HERE = bytes([0x7F, 0, 6, 2, 31]) + bytes(31)
SAM_BUSY, SAM_RESERVATION_CONFLICT = 0x08, 0x18

#: host_status of struct sg_io_hdr, in the seam's words; what is not here is FAILED.
_OUTCOMES = {
    0x01: Outcome.PATH_LOST,  # DID_NO_CONNECT
    0x03: Outcome.TIMED_OUT,  # DID_TIME_OUT
    0x04: Outcome.NO_TARGET,  # DID_BAD_TARGET
    0x05: Outcome.GIVEN_UP,  # DID_ABORT
    0x08: Outcome.ABORTED,  # DID_RESET
    0x0E: Outcome.PATH_LOST,  # DID_TRANSPORT_DISRUPTED
    0x0F: Outcome.PATH_LOST,  # DID_TRANSPORT_FAILFAST
    0x10: Outcome.TARGET_FAILED,  # DID_TARGET_FAILURE, before Linux 5.17
    0x14: Outcome.PATH_LOST,  # DID_TRANSPORT_MARGINAL
}
#: What fcoe says of commands that were under way when the port was logged out, among other things.
_PARITY, _ERROR = 0x06, 0x07
_STATUSES = {
    0x02: SAM_BUSY,  # DID_BUS_BUSY
    0x0B: SAM_BUSY,  # DID_SOFT_ERROR
    0x0C: SAM_BUSY,  # DID_IMM_RETRY
    0x0D: SAM_BUSY,  # DID_REQUEUE
    0x11: SAM_RESERVATION_CONFLICT,  # DID_NEXUS_FAILURE, before Linux 5.17
}
#: driver_status, before Linux 5.14: DRIVER_TIMEOUT; and DRIVER_SENSE, which is no failure.  The high bits are advice.
_DRIVER_TIMEOUT, _DRIVER_SENSE, _DRIVER_MASK = 0x06, 0x08, 0x0F


def result_of(outcome: sg.SgOutcome, length: int, *, online: bool = True) -> ScsiResult:
    """The end of a command as the seam has it.  online: its remote port still is."""
    if outcome.host_status in _STATUSES:
        return ScsiResult(Outcome.COMPLETE, _STATUSES[outcome.host_status], residual=length)
    if outcome.host_status in {_PARITY, _ERROR} and not online:
        return ScsiResult(Outcome.PATH_LOST)
    if outcome.host_status:
        return ScsiResult(_OUTCOMES.get(outcome.host_status, Outcome.FAILED))
    driver = outcome.driver_status & _DRIVER_MASK
    if outcome.status == 0 and driver not in {0, _DRIVER_SENSE}:
        return ScsiResult(Outcome.TIMED_OUT if driver == _DRIVER_TIMEOUT else Outcome.FAILED)
    return ScsiResult(
        Outcome.COMPLETE, outcome.status, outcome.sense, data_in=outcome.data_in, residual=outcome.residual
    )


def clamped(page: bytes, blocks: int) -> bytes:
    """A Block Limits page (SBC-4 6.6.4) that allows no longer transfers than these; 0 says nothing, so it says ours."""
    maximum, optimal = (int.from_bytes(page[at : at + 4], "big") for at in (8, 12))
    maximum = min(maximum or blocks, blocks)
    return page[:8] + maximum.to_bytes(4, "big") + min(optimal, maximum).to_bytes(4, "big") + page[16:]


def nobody(cdb: bytes, room: int) -> ScsiResult:
    """What a target says for a LUN that it does not have, when no unit of it can be asked (SPC-5 6.6, 6.33)."""
    if cdb[0] not in {INQUIRY, REPORT_LUNS}:
        return ScsiResult(Outcome.COMPLETE, 2, NO_SUCH_UNIT, residual=room)
    if cdb[0] == INQUIRY:
        if cdb[1] & 1:
            return ScsiResult(Outcome.COMPLETE, 2, INVALID_FIELD, residual=room)
        data = NOTHING_HERE
        allocated = int.from_bytes(cdb[3:5], "big")
    else:
        data = bytes(8)
        allocated = int.from_bytes(cdb[6:10], "big")
    data = data[: min(allocated, room)]
    return ScsiResult(Outcome.COMPLETE, data_in=data, residual=room - len(data))
