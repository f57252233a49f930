"""A ring as the vhost-user protocol knows it: its state table, its set-up, and what memory it needs.

Started/stopped and enabled/disabled are independent, so there are four states.  SET_VRING_KICK starts,
GET_VRING_BASE stops, SET_VRING_ENABLE toggles; the enable flag survives a stop, and a ring that was
never configured may be enabled (SeaBIOS sets up only the first request ring, QEMU enables all).

    IDLE    stopped, disabled        ARMED   stopped, enabled
    PAUSED  started, disabled        RUNNING started, enabled
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vhostfc.vhost.messages import ProtocolError, VringAddr

MAX_SIZE = 32768


class RingState(enum.Enum):
    IDLE = enum.auto()
    ARMED = enum.auto()
    PAUSED = enum.auto()
    RUNNING = enum.auto()


class RingEvent(enum.Enum):
    KICK = enum.auto()
    BASE = enum.auto()
    ENABLE = enum.auto()
    DISABLE = enum.auto()
    RESET = enum.auto()


TRANSITIONS: Mapping[RingState, Mapping[RingEvent, RingState]] = {
    RingState.IDLE: {
        RingEvent.KICK: RingState.PAUSED,
        RingEvent.BASE: RingState.IDLE,
        RingEvent.ENABLE: RingState.ARMED,
        RingEvent.DISABLE: RingState.IDLE,
        RingEvent.RESET: RingState.IDLE,
    },
    RingState.ARMED: {
        RingEvent.KICK: RingState.RUNNING,
        RingEvent.BASE: RingState.ARMED,
        RingEvent.ENABLE: RingState.ARMED,
        RingEvent.DISABLE: RingState.IDLE,
        RingEvent.RESET: RingState.IDLE,
    },
    RingState.PAUSED: {
        RingEvent.KICK: RingState.PAUSED,
        RingEvent.BASE: RingState.IDLE,
        RingEvent.ENABLE: RingState.RUNNING,
        RingEvent.DISABLE: RingState.PAUSED,
        RingEvent.RESET: RingState.IDLE,
    },
    RingState.RUNNING: {
        RingEvent.KICK: RingState.RUNNING,
        RingEvent.BASE: RingState.ARMED,
        RingEvent.ENABLE: RingState.RUNNING,
        RingEvent.DISABLE: RingState.PAUSED,
        RingEvent.RESET: RingState.IDLE,
    },
}
STARTED = frozenset({RingState.PAUSED, RingState.RUNNING})
ENABLED = frozenset({RingState.ARMED, RingState.RUNNING})


@dataclass(slots=True)
class Vring:
    """One ring.  size 0 and addresses None: not configured.  base: next avail index.  fds: -1 is none."""

    index: int
    state: RingState = RingState.IDLE
    size: int = 0
    addresses: VringAddr | None = None
    base: int = 0
    kick_fd: int = -1
    call_fd: int = -1
    err_fd: int = -1

    @property
    def started(self) -> bool:
        return self.state in STARTED

    @property
    def enabled(self) -> bool:
        return self.state in ENABLED

    def move(self, event: RingEvent) -> None:
        self.state = TRANSITIONS[self.state][event]

    def must_be_stopped(self) -> None:
        if self.started:
            raise ProtocolError(f"ring {self.index} is running")

    def set_size(self, size: int, *, packed: bool = False) -> None:
        """A packed ring's size need not be a power of two (virtio 1.3, 2.8.10.1)."""
        self.must_be_stopped()
        if packed:
            if not 0 < size <= MAX_SIZE:
                raise ProtocolError(f"packed ring {self.index} with {size} entries, expected 1 to {MAX_SIZE}")
        elif not 0 < size <= MAX_SIZE or size & size - 1:
            raise ProtocolError(f"ring {self.index} with {size} entries, expected a power of two up to {MAX_SIZE}")
        self.size = size

    def set_base(self, base: int, *, packed: bool = False) -> None:
        """A packed ring's base has both indices with their wrap counters in 32 bits."""
        self.must_be_stopped()
        if base > 0xFFFF and not packed:
            raise ProtocolError(f"ring {self.index} at {base:#x}, the index of a split ring has 16 bits")
        self.base = base

    def set_addresses(self, addresses: VringAddr) -> None:
        """A running ring may only be told what it knows: front ends repeat the addresses to change flags."""
        if addresses.flags:
            raise ProtocolError(f"ring {self.index} with flags {addresses.flags:#x}, but LOG_ALL was not negotiated")
        if addresses.desc % 16 or addresses.avail % 2 or addresses.used % 4:
            raise ProtocolError(
                f"ring {self.index} is misaligned: descriptors {addresses.desc:#x}, available {addresses.avail:#x}, "
                f"used {addresses.used:#x}"
            )
        if self.started and self.addresses is not None and not self.addresses.same_place(addresses):
            raise ProtocolError(f"ring {self.index} is running and cannot move")
        self.addresses = addresses

    def parts(self, *, packed: bool = False) -> Iterator[tuple[str, int, int]]:
        """(name, user address, bytes) of each part, event index words included.  Nothing when not configured."""
        if self.size and self.addresses is not None and packed:
            yield "descriptor ring", self.addresses.desc, 16 * self.size
            yield "driver event suppression area", self.addresses.avail, 4
            yield "device event suppression area", self.addresses.used, 4
        elif self.size and self.addresses is not None:
            yield "descriptor table", self.addresses.desc, 16 * self.size
            yield "available ring", self.addresses.avail, 6 + 2 * self.size
            yield "used ring", self.addresses.used, 6 + 8 * self.size

    def forget(self) -> None:
        """Back to what a new device has; call and err descriptors stay (front ends send them only once)."""
        self.move(RingEvent.RESET)
        self.size = self.base = 0
        self.addresses = None
