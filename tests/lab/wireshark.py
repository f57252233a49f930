"""What Wireshark's dissectors make of a capture, and whether its reading is ours.

tshark judges frames that we did not all make ourselves; `differences()` holds what it reads against what our own
codecs read in the same bytes.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.fc.pcap import packets
from vhostfc.fc.ct import CtIu
from vhostfc.fc.els import Els
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, FcpXferRdy
from vhostfc.fc.frame import FcType, Frame, RCtl
from vhostfc.fc.login import Login

#: Between fields of a packet, and between values of a field: neither is in any text of ours.
_FIELD, _VALUE = "\x1f", "\x1e"
FAULTS = ("_ws.malformed", "_ws.expert.severity", "_ws.expert.message")
#: Expert severities (epan/proto.h): error and warning; a comment of ours is an expert's word too.
_SEVERE = {"8388608", "6291456"}

_NO_REQUEST = "No record of Exchange. Unable to decode ACC"

Packet = dict[str, str]
#: What differences() compares.
COMPARED = (
    *("fc.r_ctl", "fc.d_id", "fc.s_id", "fc.type", "fc.seq_id", "fc.seq_cnt", "fc.ox_id", "fc.rx_id"),
    *("fcp.dl", "fcp.taskmgmt", "fcp.data_ro", "fcp.burstlen", "fcp.status", "fcp.snslen", "fcp.resid"),
    *("fcels.opcode", "fcels.npname", "fcels.fnname", "fcdns.opcode"),
)


def read(path: Path, fields: Sequence[str], *, only: str | None = None) -> list[Packet]:
    """Some fields of each packet (several values of one are joined by "; "); only: a display filter."""
    # Of an OX_ID that comes again Wireshark takes the frames for parts of the older sequence: so each by itself.
    command = ["tshark", "-n", "-o", "fc.reassemble:FALSE", "-r", str(path), "-T", "fields"]
    command += ["-E", f"separator={_FIELD}", "-E", f"aggregator={_VALUE}"]
    command += ["-Y", only] if only else []
    command += [word for name in fields for word in ("-e", name)]
    run = subprocess.run(command, capture_output=True, check=True, timeout=300)
    lines = run.stdout.decode(errors="replace").split("\n")[:-1]
    return [
        {name: "; ".join(value.split(_VALUE)) for name, value in zip(fields, line.split(_FIELD), strict=True)}
        for line in lines
    ]


def faulty(found: Sequence[Packet]) -> list[Packet]:
    """Those of packets read with FAULTS that are malformed, or that an expert has an error or a warning for.

    Not the LS_ACC of a FLOGI or FDISC: it goes to an address that its request did not come from, so it has no match.
    """
    return [
        one
        for one in found
        if one["_ws.malformed"]
        or (_SEVERE & {*one["_ws.expert.severity"].split("; ")} and _NO_REQUEST not in one["_ws.expert.message"])
    ]


def frames(path: Path) -> list[Frame]:
    """The FC frames of a capture of ours, by our own codec."""
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory) / "plain.pcap"
        subprocess.run(["editcap", "-F", "pcap", str(path), str(plain)], check=True, timeout=300)
        return [Frame.unpack(data[4:-8]) for data in packets(plain)]  # without SOF; CRC and EOF


def ours(frame: Frame) -> dict[str, int]:
    """What our codecs read in a frame, under Wireshark's names."""
    found = {
        "fc.r_ctl": frame.r_ctl,
        "fc.d_id": frame.d_id,
        "fc.s_id": frame.s_id,
        "fc.type": frame.type,
        "fc.seq_id": frame.seq_id,
        "fc.seq_cnt": frame.seq_cnt,
        "fc.ox_id": frame.ox_id,
        "fc.rx_id": frame.rx_id,
    }
    match frame.type, frame.r_ctl:
        case FcType.FCP, RCtl.DATA_UNSOLICITED_COMMAND:
            command = FcpCmnd.unpack(frame.payload)
            found |= {"fcp.dl": command.data_length, "fcp.taskmgmt": command.tm_flags}
        case FcType.FCP, RCtl.DATA_DESCRIPTOR:
            ready = FcpXferRdy.unpack(frame.payload)
            found |= {"fcp.data_ro": ready.offset, "fcp.burstlen": ready.length}
        case FcType.FCP, RCtl.DATA_COMMAND_STATUS:
            response = FcpRsp.unpack(frame.payload)
            found |= {"fcp.status": response.status, "fcp.snslen": len(response.sense)}
            found |= {"fcp.resid": abs(response.residual)}
        case FcType.ELS, RCtl.ELS_REQUEST | RCtl.ELS_REPLY:
            found["fcels.opcode"] = frame.payload[0]
            if frame.payload[0] in {Els.FLOGI, Els.FDISC, Els.PLOGI}:
                login = Login.unpack(frame.payload)
                found |= {"fcels.npname": login.wwpn, "fcels.fnname": login.wwnn}
        case FcType.CT, _ if frame.seq_cnt == 0:
            found["fcdns.opcode"] = CtIu.unpack(frame.payload).code
    return found


def differences(found: Sequence[Packet], meant: Sequence[Frame]) -> list[str]:
    """Where Wireshark, in packets read with COMPARED, reads another value than we do."""
    told = []
    for number, (packet, frame) in enumerate(zip(found, meant, strict=True), 1):
        for name, value in ours(frame).items():
            theirs = packet[name].split("; ")[0]
            if theirs != "" and number_of(name, theirs) != value:
                told.append(f"packet {number}, {name}: Wireshark reads {theirs}, we {value:#x}: {frame}")
    return told


def number_of(field: str, text: str) -> int:
    """A field's value: a number, an address or a World Wide Name."""
    if field in {"fc.d_id", "fc.s_id", "fcels.npname", "fcels.fnname"}:
        return int(text.replace(":", "").replace(".", ""), 16)
    return int(text, 0)
