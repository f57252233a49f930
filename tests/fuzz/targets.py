"""All that is fuzzed, by name.  Imported under the fuzzer's instrumentation, so nothing else imports what is in it."""

from __future__ import annotations

from tests.fuzz import adapter, doors, frames, messages
from tests.fuzz.target import Target

ALL: dict[str, Target] = {
    target.name: target
    for target in (
        frames.FRAME.target("frame"),
        frames.ELS.target("els"),
        frames.CT.target("ct"),
        frames.FCP.target("fcp"),
        frames.FCOE.target("fcoe"),
        messages.VHOST.target("vhost"),
        messages.VIRTIO.target("virtio"),
        messages.LINK.target("link"),
        doors.SWITCH,
        doors.FORWARDER,
        adapter.N_PORT,
        adapter.SESSION,
    )
}
