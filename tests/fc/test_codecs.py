"""The codecs against frames of a real initiator and fabric, and against themselves."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fc import golden
from vhostfc.fc import bls, ct, els, fcp, ns
from vhostfc.fc.els import Els, Explanation, Reason
from vhostfc.fc.frame import MAX_FRAME, Address, FCtl, FcType, Frame, FrameError, RCtl, els_reply, els_request
from vhostfc.fc.login import Feature, Login
from vhostfc.fc.wwn import Wwn

wwns = st.integers(0, 2**64 - 1).map(Wwn)
ids = st.integers(0, 0xFFFFFF)
xids = st.integers(0, 0xFFFF)
words = st.integers(0, 0xFFFFFFFF)
octets = st.integers(0, 255)

frames = st.builds(
    Frame,
    r_ctl=octets,
    d_id=ids,
    s_id=ids,
    type=octets,
    f_ctl=ids.map(lambda value: value & ~3),
    ox_id=xids,
    rx_id=xids,
    seq_id=octets,
    seq_cnt=xids,
    parameter=words,
    payload=st.binary(max_size=70),
    df_ctl=octets,
    cs_ctl=octets,
)
logins = st.builds(
    Login,
    command=st.sampled_from([Els.FLOGI, Els.FDISC, Els.PLOGI]),
    wwpn=wwns,
    wwnn=wwns,
    features=xids,
    receive_size=st.integers(256, 2112),
    bb_credit=xids,
    word2=words,
    e_d_tov=words,
    class3_options=xids,
    class3_receive_size=st.integers(0, 2112),
    class3_sequences=xids,
    class3_open_sequences=xids,
    version=octets,
)
pages = st.lists(st.builds(els.PrliPage, octets, octets, words, words, words), min_size=1, max_size=4).map(tuple)
rscn_pages = st.lists(st.builds(els.RscnPage, ids, st.integers(0, 3), st.integers(0, 15)), min_size=1, max_size=9)
els_requests = st.one_of(
    logins,
    st.builds(els.Logo, ids, wwns),
    st.builds(els.Prli, pages, st.sampled_from([Els.PRLI, Els.PRLO])),
    st.builds(els.Adisc, wwns, wwns, ids),
    st.just(els.Rtv()),
    st.builds(els.Rscn, rscn_pages.map(tuple)),
    st.builds(els.Scr, octets),
    st.builds(els.Rrq, ids, xids, xids),
    st.builds(els.Rec, ids, xids, xids),
    st.builds(els.Rnid, octets),
    st.builds(els.Echo, st.binary(max_size=64)),
)
names = st.binary(max_size=255)
ct_requests = st.one_of(
    st.builds(ns.ByPortId, st.sampled_from([c for c in ct.Ct if c.name.endswith("_ID") and c.name[0] in "GD"]), ids),
    st.builds(ns.ByPortId, st.just(ct.Ct.GA_NXT), ids),
    st.builds(ns.ByName, st.sampled_from([ct.Ct.GID_PN, ct.Ct.GID_NN, ct.Ct.GSNN_NN]), wwns),
    st.builds(ns.ByFc4Type, st.sampled_from([ct.Ct.GID_FT, ct.Ct.GPN_FT, ct.Ct.GNN_FT]), octets, octets, octets),
    st.builds(ns.GidPt, octets, octets, octets),
    st.builds(ns.GidFf, octets, octets, octets, octets),
    st.builds(ns.RpnId, ids, wwns),
    st.builds(ns.RnnId, ids, wwns),
    st.builds(ns.RcsId, ids, words),
    st.builds(ns.RptId, ids, octets),
    st.builds(ns.RftId, ids, st.frozensets(octets)),
    st.builds(ns.RffId, ids, octets, octets),
    st.builds(ns.RspnId, ids, names),
    st.builds(ns.RsnnNn, wwns, names),
)
cdbs = st.integers(4, 65).flatmap(lambda n: st.binary(min_size=4 * n, max_size=4 * n))
cmnds = st.builds(
    fcp.FcpCmnd,
    lun=st.binary(min_size=8, max_size=8),
    cdb=cdbs,
    data_length=words,
    write=st.booleans(),
    read=st.booleans(),
    attribute=st.integers(0, 7),
    priority=st.integers(0, 15),
    reference=octets,
    tm_flags=octets,
)


@pytest.mark.parametrize("name", golden.ALL)
def test_a_real_frame_is_read_and_written_unchanged(name: str) -> None:
    frame = Frame.unpack(golden.ALL[name])

    assert frame.pack() == golden.ALL[name]


@pytest.mark.parametrize("name", ["FLOGI", "FDISC", "PLOGI_DNS", "SCR", "PRLI", "RTV", "LOGO"])
def test_a_real_els_request_is_read_and_written_unchanged(name: str) -> None:
    frame = Frame.unpack(golden.ALL[name])
    request = els.parse_request(frame.payload)

    assert els_request(frame.s_id, frame.d_id, frame.ox_id, request.pack()).pack() == golden.ALL[name]


@pytest.mark.parametrize("name", ["RNN_ID", "RSNN_NN", "RSPN_ID", "RFT_ID", "RFF_ID", "GPN_FT"])
def test_a_real_name_server_request_is_read_and_written_unchanged(name: str) -> None:
    frame = Frame.unpack(golden.ALL[name])
    request = ns.parse_request(frame.payload)

    assert ct.ct_request(frame.s_id, frame.d_id, frame.ox_id, request.pack()).pack() == golden.ALL[name]


def test_what_linux_registers() -> None:
    def read(name: str) -> ns.Request:
        return ns.parse_request(Frame.unpack(golden.ALL[name]).payload)

    assert read("RNN_ID") == ns.RnnId(0x010200, Wwn.parse("10:00:52:54:00:12:34:56"))
    assert read("RSPN_ID") == ns.RspnId(0x010200, b"fcoe v0.1 over eth0")
    assert read("RFT_ID") == ns.RftId(0x010200, frozenset({FcType.FCP, FcType.CT}))
    assert read("RFF_ID") == ns.RffId(0x010200, ns.Fc4Feature.INITIATOR)
    assert read("GPN_FT") == ns.ByFc4Type(ct.Ct.GPN_FT)


def test_replies_of_a_real_fabric() -> None:
    accept = Frame.unpack(golden.FLOGI_ACC)
    login = Login.unpack(accept.payload)
    assert els.rejection(accept.payload) is None
    assert (login.wwnn, login.e_d_tov_seconds, login.r_a_tov_seconds) == (Wwn(0x100002FCF00000FA), 2.0, 10.0)
    assert login.features == Feature.CLEAN_ADDRESS | Feature.NPIV | Feature.F_PORT
    assert login.payload_size == 2112

    ports = ct.CtIu.unpack(Frame.unpack(golden.GPN_FT_ACC).payload)
    assert ports.accepted
    assert ns.unpack_port_names(ports.body) == [
        (0x01FE01, Wwn(0x5001000000000101)),
        (0x01FE02, Wwn(0x5001000000000102)),
        (0x010200, Wwn(0x2000525400123456)),
    ]
    prli = els.Prli.unpack(Frame.unpack(golden.PRLI_ACC).payload).pages[0]
    assert prli.response == els.PrliPage.EXECUTED
    assert prli.parameters == els.FcpService.TARGET | els.FcpService.READ_XFER_RDY_DISABLED
    assert els.RtvAcc.unpack(Frame.unpack(golden.RTV_ACC).payload) == els.RtvAcc(10000, 2000)


def test_fcp_on_a_real_wire() -> None:
    write = Frame.unpack(golden.WRITE)
    cmnd = fcp.FcpCmnd.unpack(write.payload)
    assert (cmnd.write, cmnd.read, cmnd.data_length, cmnd.cdb[0]) == (True, False, 2560, 0x2A)
    assert fcp.cmnd_frame(write.s_id, write.d_id, write.ox_id, cmnd).pack() == golden.WRITE
    rsp = fcp.FcpRsp.unpack(Frame.unpack(golden.UNDERRUN_RSP).payload)
    assert rsp == fcp.FcpRsp(residual=0x1D)
    inquiry = Frame.unpack(golden.INQUIRY)
    assert fcp.rsp_frame(inquiry, 0x1001, 0x11, fcp.FcpRsp()).pack() == golden.INQUIRY_RSP
    xfer_rdy = fcp.FcpXferRdy(0, 2560)
    assert fcp.xfer_rdy_frame(write, 0x1031, 0x7F, xfer_rdy).pack() == golden.XFER_RDY


def test_fill_bytes_are_not_payload() -> None:
    frame = Frame.unpack(golden.PADDED_DATA)

    assert frame.payload == bytes.fromhex("00000003008083")
    assert frame.f_ctl == FCtl.EXCHANGE_RESPONDER | FCtl.END_SEQUENCE | FCtl.RELATIVE_OFFSET


@given(frames)
def test_frames_round_trip(frame: Frame) -> None:
    assert Frame.unpack(frame.pack()) == frame


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_frame_error(data: bytes) -> None:
    try:
        frame = Frame.unpack(data)
    except FrameError:
        return
    assert Frame.unpack(frame.pack()) == frame


@pytest.mark.parametrize("length", [0, 23, 26, MAX_FRAME + 4])
def test_bytes_that_cannot_be_a_frame_are_refused(length: int) -> None:
    with pytest.raises(FrameError, match=str(length)):
        Frame.unpack(bytes(length))


def test_more_fill_than_payload_is_refused() -> None:
    with pytest.raises(FrameError, match="fill"):
        Frame.unpack(bytes(11) + b"\x03" + bytes(12))


def test_a_payload_that_does_not_fit_is_refused() -> None:
    with pytest.raises(FrameError, match="2113"):
        Frame(1, 2, 3, 8, 0, 0, payload=bytes(2113)).pack()


@given(els_requests)
def test_els_requests_round_trip(request_: els.Request) -> None:
    assert els.parse_request(request_.pack()) == request_


@given(st.sampled_from(list(Els)), st.binary(max_size=150))
def test_any_payload_is_an_els_request_or_deserves_a_rejection(command: Els, body: bytes) -> None:
    reason: int = Reason.PROTOCOL_ERROR
    try:
        request = els.parse_request(bytes([command]) + body)
        assert els.parse_request(request.pack()).pack() == request.pack()
    except els.ElsError as error:
        reason = error.rejection.reason
    assert reason in (Reason.PROTOCOL_ERROR, Reason.NOT_SUPPORTED)


def test_an_unknown_els_is_not_supported() -> None:
    with pytest.raises(els.ElsError) as caught:
        els.parse_request(bytes([0x7E, 0, 0, 0]))

    assert caught.value.rejection == els.LsRjt(Reason.NOT_SUPPORTED, Explanation.NOT_SUPPORTED)


@given(st.builds(els.LsRjt, octets, octets, octets))
def test_rejections_round_trip_and_speak(rejection: els.LsRjt) -> None:
    assert els.rejection(rejection.pack()) == rejection
    assert f"{rejection.reason:#04x}" in str(rejection)


def test_a_rejection_in_words() -> None:
    rejection = els.LsRjt(Reason.LOGICAL_ERROR, Explanation.INVALID_PORT_NAME)

    assert str(rejection) == "reason logical error (0x03), explanation invalid port name (0x0d)"


@given(st.builds(els.RtvAcc, words, words, words))
def test_rtv_accepts_round_trip(accept: els.RtvAcc) -> None:
    assert els.RtvAcc.unpack(accept.pack()) == accept


@given(st.builds(els.RecAcc, xids, xids, ids, ids, words, words))
def test_rec_accepts_round_trip(accept: els.RecAcc) -> None:
    assert els.RecAcc.unpack(accept.pack()) == accept


@given(logins)
def test_an_accept_is_the_login_with_another_first_byte(login: Login) -> None:
    accept = dataclasses.replace(login, command=Els.LS_ACC)

    assert els.rejection(accept.pack()) is None
    assert Login.unpack(accept.pack()) == accept
    assert accept.pack()[1:] == login.pack()[1:]


def test_the_smaller_receive_size_counts() -> None:
    login = Login.plogi(Wwn(1), Wwn(2))

    assert dataclasses.replace(login, class3_receive_size=1024).payload_size == 1024
    assert dataclasses.replace(login, receive_size=514).payload_size == 512
    assert dataclasses.replace(login, class3_receive_size=0).payload_size == 2112


def test_e_d_tov_may_come_in_nanoseconds() -> None:
    accept = Login.fabric_accept(Wwn(1), Wwn(2), r_a_tov=10000, e_d_tov=2_000_000_000)

    assert dataclasses.replace(accept, features=accept.features | Feature.NANOSECONDS).e_d_tov_seconds == 2.0


def test_the_accept_of_flogi_goes_to_the_new_address() -> None:
    flogi = els_request(0, Address.F_PORT, 5, Login.flogi(Wwn(1), Wwn(2)).pack())
    accept = els_reply(flogi, els.LS_ACC, d_id=0x010203)

    assert (accept.d_id, accept.s_id, accept.ox_id) == (0x010203, Address.F_PORT, 5)
    assert accept.from_responder


@given(ct_requests)
def test_ct_requests_round_trip(request_: ns.Request) -> None:
    assert ns.parse_request(request_.pack()) == request_


@given(st.sampled_from(list(ct.Ct)), st.binary(max_size=60))
def test_any_body_is_a_ct_request_or_deserves_a_reject(code: ct.Ct, body: bytes) -> None:
    reason: int = ct.Reason.INVALID_SIZE
    try:
        request = ns.parse_request(ct.CtIu(code, body).pack())
        assert ns.parse_request(request.pack()) == request
    except ct.CtError as error:
        reason = error.reason
    assert reason in (ct.Reason.INVALID_SIZE, ct.Reason.NOT_SUPPORTED)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (ct.CtIu(0x0400).pack(), ct.Reason.NOT_SUPPORTED),
        (ct.CtIu(ct.Ct.GPN_FT, bytes(4), fs_type=0xFA).pack(), ct.Reason.NOT_SUPPORTED),
        (ct.CtIu(ct.Ct.GPN_FT, bytes(3)).pack(), ct.Reason.INVALID_SIZE),
        (ct.CtIu(ct.Ct.RSPN_ID, bytes(4) + b"\x05vm").pack(), ct.Reason.INVALID_SIZE),
    ],
)
def test_a_ct_request_that_cannot_be_read_says_why(payload: bytes, reason: ct.Reason) -> None:
    with pytest.raises(ct.CtError) as caught:
        ns.parse_request(payload)

    assert caught.value.reason == reason


@given(st.lists(st.tuples(ids, wwns), min_size=1, max_size=40))
def test_lists_of_ports_round_trip(ports: list[tuple[int, Wwn]]) -> None:
    assert ns.unpack_port_names(ns.pack_port_names(ports)) == ports
    only_ids = [port_id for port_id, _ in ports]
    assert ns.unpack_port_ids(ns.pack_port_ids(only_ids)) == only_ids


def test_a_list_without_a_last_entry_is_refused() -> None:
    with pytest.raises(FrameError, match="last"):
        ns.unpack_port_names(bytes(32))


@given(st.builds(ns.PortEntry, ids, wwns, wwns, st.frozensets(octets), names, names, wwns, octets, words))
def test_port_entries_round_trip(entry: ns.PortEntry) -> None:
    assert ns.PortEntry.unpack(entry.pack()) == entry


@given(cmnds, words)
def test_commands_round_trip(cmnd: fcp.FcpCmnd, length: int) -> None:
    if cmnd.read and cmnd.write:
        cmnd = dataclasses.replace(cmnd, bidirectional_read_length=length)

    assert fcp.FcpCmnd.unpack(cmnd.pack()) == cmnd


def test_a_short_cdb_is_filled_and_a_long_one_has_its_length() -> None:
    assert len(fcp.FcpCmnd(bytes(8), bytes(6)).pack()) == 32
    assert len(fcp.FcpCmnd(bytes(8), bytes(32)).pack()) == 48
    assert fcp.FcpCmnd(bytes(8), bytes(32)).pack()[11] == 4 << 2
    with pytest.raises(FrameError, match="261"):
        fcp.FcpCmnd(bytes(8), bytes(261)).pack()


@pytest.mark.parametrize("words", [62, 63])
def test_a_cdb_that_no_command_has_is_refused(words: int) -> None:
    payload = bytes(11) + bytes([words << 2]) + bytes(16 + 4 * words + 4)
    with pytest.raises(FrameError, match=f"a CDB of {16 + 4 * words}"):
        fcp.FcpCmnd.unpack(payload)


def test_a_command_shorter_than_it_says_is_refused() -> None:
    payload = fcp.FcpCmnd(bytes(8), bytes(32)).pack()

    with pytest.raises(FrameError, match="FCP_CMND"):
        fcp.FcpCmnd.unpack(payload[:-4])


@given(
    st.builds(
        fcp.FcpRsp,
        status=octets,
        residual=st.integers(-0xFFFFFFFF, 0xFFFFFFFF),
        sense=st.binary(max_size=252),
        code=st.none() | octets,
        status_qualifier=xids,
        confirm=st.booleans(),
    )
)
def test_responses_round_trip(rsp: fcp.FcpRsp) -> None:
    assert fcp.FcpRsp.unpack(rsp.pack()) == rsp


@given(st.binary(max_size=64))
def test_any_bytes_are_a_response_or_a_frame_error(payload: bytes) -> None:
    try:
        rsp = fcp.FcpRsp.unpack(payload)
    except FrameError:
        return
    assert fcp.FcpRsp.unpack(rsp.pack()).status == rsp.status


@given(words, words)
def test_transfer_ready_round_trips(offset: int, length: int) -> None:
    assert fcp.FcpXferRdy.unpack(fcp.FcpXferRdy(offset, length).pack()) == fcp.FcpXferRdy(offset, length)


@given(st.builds(bls.BaAcc, xids, xids, st.none() | octets, xids, xids))
def test_ba_acc_round_trips(accept: bls.BaAcc) -> None:
    assert bls.BaAcc.unpack(accept.pack()) == accept


@given(st.builds(bls.BaRjt, octets, octets, octets))
def test_ba_rjt_round_trips(reject: bls.BaRjt) -> None:
    assert bls.BaRjt.unpack(reject.pack()) == reject


def test_an_abort_and_its_answer_name_the_same_exchange() -> None:
    abts = bls.abts_frame(0x010101, 0x01FE01, 7, 9, 2)
    answer = bls.answer(abts, bls.BaAcc(7, 9))

    assert (abts.r_ctl, abts.f_ctl, abts.payload) == (RCtl.BLS_ABTS, 0x090000, b"")
    assert (answer.r_ctl, answer.f_ctl, answer.payload.hex()) == (RCtl.BLS_BA_ACC, 0x980000, "00000000000700090000ffff")
    assert (answer.s_id, answer.d_id, answer.ox_id, answer.rx_id) == (0x01FE01, 0x010101, 7, 9)


@pytest.mark.parametrize("body", [b"", b"\x05abc"])
def test_a_symbolic_name_that_is_shorter_than_it_says_is_an_error(body: bytes) -> None:
    with pytest.raises(FrameError, match="a name of"):
        ns.unpack_symbolic_name(body)


@given(st.builds(els.RnidAcc, wwns, wwns, words, words, words, st.just(b"vendor")) | st.builds(els.RnidAcc, wwns, wwns))
def test_node_identification_round_trips(accept: els.RnidAcc) -> None:
    assert els.RnidAcc.unpack(accept.pack()) == accept


@pytest.mark.parametrize("payload", [bytes(8), bytes([2, 0, 0, 0, 0xDF, 16, 0, 52]) + bytes(60), b"\2" + bytes(23)])
def test_node_identification_that_is_shorter_than_it_says(payload: bytes) -> None:
    with pytest.raises(FrameError):
        els.RnidAcc.unpack(payload)
