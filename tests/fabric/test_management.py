"""The management server: who may register what, who sees it, and how long it stays."""

from __future__ import annotations

import dataclasses

import pytest

from tests.fabric.san import TARGET, Initiator, San, wwpn
from vhostfc.fabric.gathering import AT_ONCE
from vhostfc.fabric.zoning import Zone, Zoning
from vhostfc.fc import ct, fdmi
from vhostfc.fc.ct import CtIu, Reason
from vhostfc.fc.fdmi import Explanation, Fdmi, HbaAttribute, PortAttribute, RegisterAttributes, RegisterHba, Simple
from vhostfc.fc.frame import Address, FCtl, Frame, RCtl, els_request
from vhostfc.fc.login import Login
from vhostfc.fc.wwn import Wwn

ABOUT: dict[int, bytes] = {HbaAttribute.MANUFACTURER: b"Acme".ljust(64, b"\0"), HbaAttribute.MODEL: b"X-1\0"}
PORT: dict[int, bytes] = {PortAttribute.HOST_NAME: b"node7".ljust(256, b"\0")}


def ask(one: Initiator, payload: bytes, *, at: int = Address.MANAGEMENT_SERVER) -> CtIu:
    one.ox_id += 1
    one.send(ct.ct_request(one.port_id, at, one.ox_id, payload))
    (reply,) = one.take()
    assert (reply.r_ctl, reply.s_id) == (RCtl.DATA_SOLICITED_CONTROL, at)
    return CtIu.unpack(reply.payload)


def refused(iu: CtIu) -> int:
    assert (iu.code, iu.reason) == (ct.Ct.REJECT, Reason.UNABLE_TO_PERFORM)
    return iu.explanation


def accepted(iu: CtIu) -> bytes:
    assert iu.accepted, iu
    assert (iu.fs_type, iu.fs_subtype) == (0xFA, 0x10)  # libfc looks at that
    return iu.body


def registered(san: San, number: int) -> Initiator:
    one = Initiator(san, number).login()
    accepted(ask(one, RegisterHba(one.wwpn, (one.wwpn,), ABOUT).pack()))
    accepted(ask(one, RegisterAttributes(Fdmi.RPA, one.wwpn, PORT).pack()))
    return one


def test_what_libfc_says_at_its_login_is_kept() -> None:
    """DHBA and DPRT of what is not there, RHBA, RPA."""
    san = San()
    one = Initiator(san, 1).login()
    assert one.els(Address.MANAGEMENT_SERVER, Login.plogi(one.wwpn, one.wwnn).pack())[0] == 2
    assert refused(ask(one, Simple(Fdmi.DHBA, one.wwpn).pack())) == Explanation.HBA_NOT_REGISTERED
    assert refused(ask(one, Simple(Fdmi.DPRT, one.wwpn).pack())) == Explanation.PORT_NOT_REGISTERED
    accepted(ask(one, RegisterHba(one.wwpn, (one.wwpn,), ABOUT).pack()))
    accepted(ask(one, RegisterAttributes(Fdmi.RPA, one.wwpn, PORT).pack()))
    hba = san.switch.management.hba_of(one.wwpn)
    assert hba is not None
    assert (hba.attributes, hba.ports) == (ABOUT, {one.wwpn: PORT})


def test_what_qla2xxx_does_when_it_was_here_already() -> None:
    san = San()
    one = registered(san, 1)
    again = RegisterHba(one.wwpn, (one.wwpn,), {}).pack()
    assert refused(ask(one, again)) == 0x10, "HBA already registered"
    accepted(ask(one, Simple(Fdmi.DHBA, one.wwpn).pack()))
    accepted(ask(one, again))


def test_what_lpfc_does_for_a_virtual_port() -> None:
    san = San()
    one = registered(san, 1)
    vport = Initiator(san, 2, f_port=one.f_port).login(fdisc=True)
    early = fdmi.RegisterPort(wwpn(9), vport.wwpn, PORT).pack()
    assert refused(ask(vport, early)) == Explanation.HBA_NOT_REGISTERED
    accepted(ask(vport, fdmi.RegisterPort(one.wwpn, vport.wwpn, PORT).pack()))
    assert fdmi.unpack_names(accepted(ask(one, Simple(Fdmi.GRPL, one.wwpn).pack()))) == (one.wwpn, vport.wwpn)
    accepted(ask(vport, Simple(Fdmi.DPRT, vport.wwpn).pack()))
    assert fdmi.unpack_names(accepted(ask(one, Simple(Fdmi.GRPL, one.wwpn).pack()))) == (one.wwpn,)


def test_queries_tell_what_was_registered() -> None:
    san = San()
    one, other = registered(san, 1), registered(san, 2)
    assert fdmi.unpack_names(accepted(ask(other, Simple(Fdmi.GRHL).pack()))) == (one.wwpn, other.wwpn)
    body = accepted(ask(other, Simple(Fdmi.GHAT, one.wwpn).pack()))
    assert fdmi.unpack_names(body) == (one.wwpn,)
    assert fdmi.unpack_attributes(body[12:], Fdmi.GHAT) == ABOUT
    body = accepted(ask(other, Simple(Fdmi.GPAT, one.wwpn).pack()))
    assert fdmi.unpack_attributes(body, Fdmi.GPAT) == PORT
    accepted(ask(one, RegisterAttributes(Fdmi.RHAT, one.wwpn, {HbaAttribute.MODEL: b"X-2\0"}).pack()))
    hba = san.switch.management.hbas[one.wwpn]
    assert (hba.attributes[HbaAttribute.MODEL], len(hba.attributes)) == (b"X-2\0", 2)
    accepted(ask(one, Simple(Fdmi.DPA, one.wwpn).pack()))
    accepted(ask(one, Simple(Fdmi.DHAT, one.wwpn).pack()))
    assert (hba.attributes, hba.ports) == ({}, {one.wwpn: {}})


def test_zones_hold_here_too() -> None:
    san = San(Zoning([Zone("one", frozenset({wwpn(1), TARGET})), Zone("two", frozenset({wwpn(2), TARGET}))]))
    one, other = registered(san, 1), registered(san, 2)
    assert fdmi.unpack_names(accepted(ask(other, Simple(Fdmi.GRHL).pack()))) == (other.wwpn,)
    for command in (Fdmi.GHAT, Fdmi.GRPL, Fdmi.DHBA, Fdmi.DHAT):
        assert refused(ask(other, Simple(command, one.wwpn).pack())) == Explanation.HBA_NOT_REGISTERED
    assert refused(ask(other, Simple(Fdmi.GPAT, one.wwpn).pack())) == Explanation.PORT_NOT_REGISTERED


def test_nobody_speaks_for_another() -> None:
    san = San()
    one, thief = registered(san, 1), Initiator(san, 2).login()
    for command in (Fdmi.DHBA, Fdmi.DHAT):
        assert refused(ask(thief, Simple(command, one.wwpn).pack())) == Explanation.HBA_NOT_REGISTERED
    for command in (Fdmi.DPRT, Fdmi.DPA):
        assert refused(ask(thief, Simple(command, one.wwpn).pack())) == Explanation.PORT_NOT_REGISTERED
    for request in (
        RegisterAttributes(Fdmi.RPA, one.wwpn, PORT),
        RegisterAttributes(Fdmi.RHAT, one.wwpn, ABOUT),
        fdmi.RegisterPort(one.wwpn, one.wwpn),
        RegisterHba(wwpn(3), (wwpn(3),)),
    ):
        refused(ask(thief, request.pack()))
    assert san.switch.management.hba_of(thief.wwpn) is None
    accepted(ask(thief, RegisterHba(wwpn(3), (thief.wwpn, one.wwpn, wwpn(9)), ABOUT).pack()))
    mine = san.switch.management.hba_of(thief.wwpn)
    assert mine is not None
    assert list(mine.ports) == [thief.wwpn], "a port of another HBA, and one that is not here"


def test_it_is_gone_with_its_last_port() -> None:
    san = San()
    one = registered(san, 1)
    san.switch.detach(one.f_port)
    assert not san.switch.management.hbas
    assert san.switch.management.hba_of(one.wwpn) is None


def test_attributes_have_a_bound() -> None:
    san = San()
    one = registered(san, 1)
    for number in range(40):
        reply = ask(one, RegisterAttributes(Fdmi.RPA, one.wwpn, {0x8000 + number: bytes(500)}).pack())
    assert refused(reply) == Explanation.INVALID_PORT_BLOCK_LENGTH
    hba = san.switch.management.hbas[one.wwpn]
    assert sum(map(len, hba.ports[one.wwpn].values())) < 8192


@pytest.mark.parametrize("subtype", [0x01, 0x02, 0x03])
def test_other_services_are_refused_in_their_own_name(subtype: int) -> None:
    """GMAL or GPSC of qla2xxx: silence would cost it twice R_A_TOV."""
    iu = ask(Initiator(San(), 1).login(), CtIu(0x0116, bytes(8), fs_type=0xFA, fs_subtype=subtype).pack())
    assert (iu.code, iu.reason, iu.fs_type, iu.fs_subtype) == (ct.Ct.REJECT, Reason.NOT_SUPPORTED, 0xFA, subtype)


# ---------------------------------------------------------------- requests of several frames


def cut(one: Initiator, payload: bytes, ox_id: int) -> list[Frame]:
    whole = ct.ct_request(one.port_id, Address.MANAGEMENT_SERVER, ox_id, b"")
    pieces = [payload[at : at + 1024] for at in range(0, len(payload), 1024)]
    middle = FCtl.FIRST_SEQUENCE
    return [
        dataclasses.replace(whole, payload=piece, seq_cnt=n, f_ctl=whole.f_ctl if n == len(pieces) - 1 else middle)
        for n, piece in enumerate(pieces)
    ]


def test_a_registration_that_takes_several_frames() -> None:
    san = San()
    one, other = Initiator(san, 1).login(), Initiator(san, 2).login()
    about = {kind: bytes(256) for kind in range(1, 14)}
    frames = [cut(each, RegisterHba(each.wwpn, (each.wwpn,), about).pack(), 7) for each in (one, other)]
    assert len(frames[0]) == 4
    for mine, others in zip(*frames, strict=True):  # the same OX_ID of two ports is two sequences
        one.send(mine)
        other.send(others)
    for each in (one, other):
        (reply,) = each.take()
        accepted(CtIu.unpack(reply.payload))
    assert set(san.switch.management.hbas) == {one.wwpn, other.wwpn}
    assert len(san.switch._gathering) == 0


def test_what_is_never_finished_is_bounded_and_gone_with_its_port() -> None:
    san = San()
    one = Initiator(san, 1).login()
    for ox_id in range(100):
        one.send(cut(one, bytes(2048), ox_id)[0])
    assert len(san.switch._gathering) == AT_ONCE
    one.send(cut(one, bytes(2048), 99)[1])  # this one is complete, and no CT_IU that anybody knows
    assert CtIu.unpack(one.take()[0].payload).code == ct.Ct.REJECT
    one.send(cut(one, bytes(4096), 98)[2])
    assert san.switch.discarded == {"no CT_IU": 1}
    san.switch.reset(one.f_port)
    assert len(san.switch._gathering) == 0


def test_a_request_without_end_is_dropped() -> None:
    san = San()
    one = Initiator(san, 1).login()
    for frame in cut(one, bytes(64 << 10), 5)[:-1]:
        one.send(frame)
    assert len(san.switch._gathering) == 0
    assert san.switch.discarded["no CT_IU"] > 0


def test_the_domain_controller_is_there() -> None:
    one = Initiator(San(), 1).login()
    assert one.els(0xFFFC01, Login.plogi(one.wwpn, one.wwnn).pack())[0] == 2
    one.send(els_request(one.port_id, 0xFFFC02, 9, Login.plogi(one.wwpn, Wwn(1)).pack()))
    assert one.take()[0].payload[0] == 1  # no domain of ours
