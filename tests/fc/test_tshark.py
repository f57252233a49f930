"""What a third party makes of our frames: Wireshark's dissectors read a whole session of ours."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.fc.conftest import Pair
from tests.fc.tiny import INVALID_OPCODE, lun
from vhostfc.fc import ct, els, ns
from vhostfc.fc.els import Els
from vhostfc.fc.fcp import FcpCmnd, FcpRsp, ResponseCode, TmFlag, cmnd_frame, conf_frame, rsp_frame
from vhostfc.fc.frame import Frame, els_reply, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.sequence import ct_reply
from vhostfc.fc.wwn import Wwn

#: LINKTYPE_FC_2: packets begin with the Frame_Header.
FC_2 = 224


GENERAL = ("_ws.col.Protocol", "_ws.col.Info", "_ws.malformed", "_ws.expert.severity", "_ws.expert.message")


def dissect(frames: list[Frame], directory: Path, fields: Sequence[str] = GENERAL) -> list[dict[str, str]]:
    """Protocol, text and faults of each frame, or other fields, by tshark."""
    capture = directory / "session.pcap"
    with capture.open("wb") as stream:
        stream.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, FC_2))
        for number, frame in enumerate(frames):
            data = frame.pack()
            stream.write(struct.pack("<IIII", number, 0, len(data), len(data)) + data)
    command = ["tshark", "-n", "-r", str(capture), "-T", "json", *(word for name in fields for word in ("-e", name))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    packets = [packet["_source"]["layers"] for packet in json.loads(run.stdout)]
    return [{name: "; ".join(layers.get(name, [])) for name in fields} for layers in packets]


@pytest.fixture
def session() -> Pair:
    """A login, commands of all kinds, an abort, a reset, notifications, a logout."""
    pair = Pair().up()
    pair.run(0, bytes([0x12, 0, 0, 0, 96, 0]), data_in_length=96)
    pair.run(0, b"\x2a\0\0\0\0\0\0\0\x14\0", data_out=bytes(20 * 512))
    pair.run(3, b"\x28\0\0\0\0\0\0\0\x08\0", data_in_length=8 * 512)
    pair.run(9, bytes(6))
    pair.array.hold = True
    held = pair.port.start_command(pair.remote, lun(0), bytes(6), pair.now)
    pair.settle()
    pair.port.abort(held, pair.now)
    pair.settle()
    pair.advance(10)
    pair.port.manage(pair.remote, lun(0), TmFlag.LOGICAL_UNIT_RESET, 10, pair.now)
    pair.array.hold = False
    pair.inject(pair.fabric.rscn(pair.port.port_id, 0x01FE01))
    logo = pair.array.logo(pair.port.port_id)
    pair.fabric.log.append(logo)
    pair.inject(logo)
    pair.port.log_out(pair.now)
    pair.settle()
    return pair


def test_wireshark_reads_our_session(session: Pair, tmp_path: Path) -> None:
    packets = dissect(session.fabric.log, tmp_path)
    told = " | ".join(packet["_ws.col.Info"] for packet in packets)

    assert len(packets) == len(session.fabric.log) > 70
    for packet in packets:
        assert not packet["_ws.malformed"], packet
        assert "Malformed" not in packet["_ws.col.Info"], packet
        assert packet["_ws.expert.severity"] not in {"8388608", "6291456"}, packet  # error, warning
    for words in [
        "FLOGI",
        "ACC (FLOGI)",
        "PLOGI",
        *("RNN_ID", "RSNN_NN", "RSPN_ID", "RFT_ID", "RFF_ID", "GPN_FT", "ACC (GPN_FT)"),
        "SCR",
        "PRLI",
        "ADISC",
        "RRQ",
        "LOGO",
        "RSCN",
        "SCSI: Report LUNs",
        "SCSI: Inquiry",
        "SCSI: Write(10)",
        "SCSI: Read(10)",
        "XFER_RDY",
        "ABTS",
        "BA_ACC",
        "(Check Condition)",
        "LU_RESET",
    ]:
        assert words in told, words


def test_wireshark_reads_the_rest(tmp_path: Path) -> None:
    """Structures that no session of ours has."""
    request = els_request(0x010101, 0x01FE01, 1, els.Rec(0x010101, 2, 3).pack())
    entry = ns.PortEntry(0x010101, Wwn(0x5001438000000002), Wwn(0x5001438000000003), frozenset({8}), b"port", b"node")
    query = ct.ct_request(0x010101, 0xFFFFFC, 2, ns.ByPortId(ct.Ct.GA_NXT, 1).pack())
    by_type = ct.ct_request(0x010101, 0xFFFFFC, 3, ns.ByFc4Type(ct.Ct.GID_FT).pack())
    name = ct.ct_request(0x010101, 0xFFFFFC, 4, ns.ByPortId(ct.Ct.GPN_ID, 0x010101).pack())
    rejection = els.LsRjt(els.Reason.LOGICAL_ERROR, els.Explanation.INVALID_PORT_NAME)
    node = els.RnidAcc(Wwn(0x5001438000000002), Wwn(0x5001438000000003), els.AssociatedType.SWITCH, 7, 1, b"vendor")
    prlo = els.Prli((els.PrliPage(8),), Els.PRLO)
    packets = dissect(
        [
            request,
            els_reply(request, els.RecAcc(2, 3, 0x010101, 0x01FE01, 512, els.RecAcc.INITIATIVE).pack()),
            els_request(0x010101, 0x01FE01, 5, prlo.pack()),
            els_request(0x010101, 0x01FE01, 6, els.Echo(b"12345678").pack()),
            els_request(0x010101, 0xFFFFFE, 7, els.Rtv().pack()),
            rnid := els_request(0x010101, 0xFFFFFE, 10, els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY).pack()),
            els_reply(rnid, node.pack()),
            els_reply(els_request(0x010101, 0xFFFFFE, 7, b""), els.RtvAcc(10000, 2000).pack()),
            els_reply(els_request(0, 0xFFFFFE, 8, b""), rejection.pack()),
            query,
            *ct_reply(query, ct.accept(entry.pack()).pack()),
            by_type,
            *ct_reply(by_type, ct.accept(ns.pack_port_ids([1, 2, 3])).pack()),
            name,
            *ct_reply(name, ct.reject(ct.Reason.UNABLE_TO_PERFORM, ct.Explanation.PORT_ID_NOT_REGISTERED).pack()),
            Frame(7, 0x010101, 0x01FE01, 8, 0x980000, 9, payload=FcpRsp(code=ResponseCode.REJECTED).pack()),
            command := cmnd_frame(0x010101, 0x01FE01, 10, FcpCmnd(bytes(8), bytes(16))),
            response := rsp_frame(command, 7, 1, FcpRsp(2, sense=INVALID_OPCODE, confirm=True)),
            conf_frame(response, 1),
        ],
        tmp_path,
    )

    told = " | ".join(packet["_ws.col.Info"] for packet in packets)
    assert not [packet for packet in packets if packet["_ws.malformed"] or "Malformed" in packet["_ws.col.Info"]], told
    for words in [
        "REC",
        "PRLO",
        "ECHO",
        "RTV",
        "RNID",
        "GA_NXT",
        "ACC (GA_NXT)",
        "GID_FT",
        "GPN_ID",
        "LS_RJT",
        "Confirm",
    ]:
        assert words in told, words


def test_wireshark_reads_what_we_mean_by_a_node(tmp_path: Path) -> None:
    request = els_request(0x010101, 0xFFFFFE, 10, els.Rnid(els.NodeFormat.GENERAL_TOPOLOGY).pack())
    node = els.RnidAcc(Wwn(0x5001438000000002), Wwn(0x5001438000000003), els.AssociatedType.SWITCH, 7, 1, b"vendor")
    names = ("nodeidfmt", "spidlen", "vendoruniq", "asstype", "physport", "attnodes", "ipvers")
    fields = [f"fcels.rnid.{name}" for name in names]
    asked, told = dissect([request, els_reply(request, node.pack())], tmp_path, fields)
    assert asked["fcels.rnid.nodeidfmt"] == "0xdf"
    values = dict(zip(names, (told[field] for field in fields), strict=True))
    assert values == {
        "nodeidfmt": "0xdf",
        "spidlen": "52",
        "vendoruniq": b"vendor".ljust(16, b"\0").hex(),
        "asstype": "0x00000004",
        "physport": "0x00000001",
        "attnodes": "0x00000007",
        "ipvers": "0x00",
    }


def test_wireshark_reads_what_we_mean_by_a_login(tmp_path: Path) -> None:
    """Credit, receive sizes, and that class 3 is the only class, in both accepts that a fabric gives."""
    me, node = Wwn(0x5001438000000002), Wwn(0x5001438000000003)
    flogi = els_request(0, 0xFFFFFE, 1, Login.flogi(me, node).pack())
    plogi = els_request(0x010101, 0x01FE01, 2, Login.plogi(me, node).pack())
    fabric = Login.fabric_accept(node, node, r_a_tov=10000, e_d_tov=2000)
    frames = [
        flogi,
        els_reply(flogi, fabric.pack(), d_id=0x010101),
        plogi,
        els_reply(plogi, Login.plogi(node, node, accept=True).pack()),
    ]
    fields = [f"fcels.logi.{name}" for name in ("b2b", "cmnfeatures", "rcvsize", "clsflags", "clsrcvsize")]
    class_3_only = "0x0000; 0x0000; 0x8800; 0x0000"  # valid, sequential delivery; classes 1, 2 and 4 are not
    assert [[packet[field] for field in fields] for packet in dissect(frames, tmp_path, fields)] == [
        ["10", "0x8000", "2112", class_3_only, "0"],  # FLOGI: several N_Port_IDs wanted
        ["10", "0xb000", "2112", class_3_only, "0"],  # its accept: a clean address, NPIV, an F_Port
        ["10", "0x8000", "2112", class_3_only, "2112"],  # PLOGI: continuously increasing offset
        ["10", "0x8000", "2112", class_3_only, "2112"],
    ]
