"""Feature bits of the vhost-user protocol, and which of them this back end offers.

Two kinds: virtio feature bits (GET_FEATURES/SET_FEATURES; the guest's driver sees most of them) and
protocol feature bits (front end and back end only).  QEMU's vhost-user-scsi decides some virtio bits
alone, so a bit that was never offered may still arrive: session.py refuses what is not implemented.
"""

from __future__ import annotations

import enum


class Feature(enum.IntEnum):
    """Virtio feature bits by number (virtio 1.3, 5.6.3 and 6), and vhost's own 26 and 30."""

    SCSI_INOUT = 0
    SCSI_HOTPLUG = 1
    SCSI_CHANGE = 2
    SCSI_T10_PI = 3
    NOTIFY_ON_EMPTY = 24
    LOG_ALL = 26
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    NOTIFICATION_DATA = 38
    RING_RESET = 40


class ProtocolFeature(enum.IntEnum):
    """VHOST_USER_PROTOCOL_F_* by number."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CRYPTO_SESSION = 7
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19
    GET_VRING_BASE_INFLIGHT = 20
    GPA_ADDRESSES = 21
    SHMEM = 22
    GET_VRING_BASE_SKIP_DRAIN = 23


def mask(*bits: int) -> int:
    """The word with these bits set."""
    word = 0
    for bit in bits:
        word |= 1 << bit
    return word


def names(word: int, kind: type[Feature] | type[ProtocolFeature]) -> str:
    """The set bits of `word` for people: "RING_PACKED (34), bit 41"."""
    known = {member.value: member.name for member in kind}
    bits = [bit for bit in range(64) if word >> bit & 1]
    return ", ".join(f"{known[bit]} ({bit})" if bit in known else f"bit {bit}" for bit in bits)


#: What GET_FEATURES answers.
OFFERED = mask(
    Feature.SCSI_HOTPLUG,
    Feature.SCSI_CHANGE,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.PROTOCOL_FEATURES,
    Feature.VERSION_1,
    Feature.RING_PACKED,
)
#: QEMU gives ANY_LAYOUT to legacy drivers by itself; no layout is ever expected here, so it may come.
ACCEPTED = OFFERED | mask(Feature.ANY_LAYOUT)
#: What GET_PROTOCOL_FEATURES answers.
OFFERED_PROTOCOL = mask(
    ProtocolFeature.MQ,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
)
