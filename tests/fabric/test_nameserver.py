"""The name server: what a port registers, what others may ask, what zones hide."""

from __future__ import annotations

import dataclasses

import pytest

from vhostfc.fabric.nameserver import Entry, NameServer
from vhostfc.fabric.zoning import Zone, Zoning
from vhostfc.fc import ct, ns
from vhostfc.fc.ct import Ct, CtIu, Explanation, Reason
from vhostfc.fc.frame import FcType, FrameError
from vhostfc.fc.wwn import Wwn

HOST, ARRAY, OTHER = Wwn(0x5001 << 48 | 1), Wwn(0x5006 << 48 | 1), Wwn(0x5006 << 48 | 2)
F_PORT = Wwn(0x2001 << 48)


@pytest.fixture
def names() -> NameServer:
    names = NameServer()
    for port_id, wwpn in ((0x010101, HOST), (0x010202, ARRAY), (0x010303, OTHER)):
        names.add(Entry(port_id, wwpn, Wwn(wwpn + 0x100), F_PORT))
    for port_id in (0x010202, 0x010303):
        ask(names, ns.RftId(port_id, frozenset({FcType.FCP})), port_id)
        ask(names, ns.RffId(port_id, ns.Fc4Feature.TARGET), port_id)
    return names


def ask(names: NameServer, request: ns.Request, asker: int = 0x010101, zoning: Zoning | None = None) -> CtIu:
    return names.answer(asker, request.pack(), zoning or Zoning()).iu


def test_gpn_ft_lists_the_ports_of_a_type_and_marks_the_last(names: NameServer) -> None:
    ports = ns.unpack_port_names(ask(names, ns.ByFc4Type(Ct.GPN_FT)).body)
    assert ports == [(0x010202, ARRAY), (0x010303, OTHER)]
    assert ns.unpack_port_ids(ask(names, ns.ByFc4Type(Ct.GID_FT, area=2)).body) == [0x010202]


def test_zones_hide_ports_from_every_query(names: NameServer) -> None:
    zoning = Zoning([Zone("z", frozenset({HOST, ARRAY}))])
    assert ns.unpack_port_names(ask(names, ns.ByFc4Type(Ct.GPN_FT), zoning=zoning).body) == [(0x010202, ARRAY)]
    assert ask(names, ns.ByPortId(Ct.GPN_ID, 0x010202), zoning=zoning).body == ARRAY.pack()
    hidden = ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.PORT_ID_NOT_REGISTERED)
    assert ask(names, ns.ByPortId(Ct.GPN_ID, 0x010303), zoning=zoning) == hidden
    assert not ask(names, ns.ByName(Ct.GID_PN, OTHER), zoning=zoning).accepted


def test_no_port_of_that_type_is_a_reject_that_initiators_take_for_an_empty_list(names: NameServer) -> None:
    answer = ask(names, ns.ByFc4Type(Ct.GPN_FT, fc4_type=0x28))
    assert (answer.reason, answer.explanation) == (0x09, 0x07)


def test_names_and_ids_lead_to_each_other(names: NameServer) -> None:
    assert ask(names, ns.ByName(Ct.GID_PN, ARRAY)).body == bytes.fromhex("00010202")
    assert ask(names, ns.ByPortId(Ct.GNN_ID, 0x010202)).body == Wwn(ARRAY + 0x100).pack()


def test_ga_nxt_walks_in_a_circle(names: NameServer) -> None:
    seen = [0x010101]
    for _ in range(3):
        seen.append(ns.PortEntry.unpack(ask(names, ns.ByPortId(Ct.GA_NXT, seen[-1])).body).port_id)
    assert seen == [0x010101, 0x010202, 0x010303, 0x010101]


def test_symbolic_names_are_kept(names: NameServer) -> None:
    assert ask(names, ns.RspnId(0x010101, b"vm1")).accepted
    assert ask(names, ns.RsnnNn(Wwn(HOST + 0x100), b"host")).accepted
    entry = ns.PortEntry.unpack(ask(names, ns.ByPortId(Ct.GA_NXT, 0)).body)
    assert (entry.wwpn, entry.port_symbolic_name, entry.node_symbolic_name) == (HOST, b"vm1", b"host")


def test_a_port_registers_for_itself_only(names: NameServer) -> None:
    refused = ct.reject(Reason.UNABLE_TO_PERFORM, Explanation.UNACCEPTABLE_PORT_ID)
    assert ask(names, ns.RffId(0x010202, 2)) == refused
    assert ask(names, ns.RnnId(0x010202, HOST)) == refused
    assert not ask(names, ns.RsnnNn(ARRAY, b"x")).accepted


def test_a_change_of_what_a_port_is_is_reported_once(names: NameServer) -> None:
    register = ns.RffId(0x010101, ns.Fc4Feature.INITIATOR).pack()
    first = names.answer(0x010101, register, Zoning())
    assert first.changed is names.entries[0x010101]
    assert names.answer(0x010101, register, Zoning()).changed is None


def test_da_id_forgets_what_was_registered(names: NameServer) -> None:
    assert ask(names, ns.ByPortId(Ct.DA_ID, 0x010202), asker=0x010202).accepted
    assert ns.unpack_port_ids(ask(names, ns.ByFc4Type(Ct.GID_FT)).body) == [0x010303]
    assert not ask(names, ns.ByPortId(Ct.DA_ID, 0x010303)).accepted


def test_what_cannot_be_read_is_rejected_with_its_reason(names: NameServer) -> None:
    assert names.answer(0x010101, CtIu(0x0555).pack(), Zoning()).iu.reason == Reason.NOT_SUPPORTED
    assert names.answer(0x010101, CtIu(Ct.GPN_ID, b"\0").pack(), Zoning()).iu.reason == Reason.INVALID_SIZE
    with pytest.raises(FrameError):
        names.answer(0x010101, b"\1\2", Zoning())


def test_each_word_about_a_port_can_be_asked_for(names: NameServer) -> None:
    assert ask(names, ns.RspnId(0x010202, b"array-a"), 0x010202).accepted
    assert ask(names, ns.RcsId(0x010202, 0x0C), 0x010202).accepted
    assert ask(names, ns.RptId(0x010202), 0x010202).accepted
    assert ask(names, ns.RpnId(0x010202, ARRAY), 0x010202).accepted

    def said(command: Ct) -> bytes:
        return ask(names, ns.ByPortId(command, 0x010202)).body

    assert ns.unpack_symbolic_name(said(Ct.GSPN_ID)) == b"array-a"
    assert said(Ct.GCS_ID) == bytes.fromhex("0000000c")
    assert said(Ct.GPT_ID) == bytes.fromhex("01000000")
    assert said(Ct.GFPN_ID) == F_PORT.pack()
    assert ns.unpack_types(said(Ct.GFT_ID)) == {FcType.FCP}
    assert ns.unpack_features(said(Ct.GFF_ID)) == {FcType.FCP: ns.Fc4Feature.TARGET}
    assert said(Ct.GFF_ID)[7] & 0x0F == ns.Fc4Feature.TARGET, "where lpfc looks for it"


def test_what_a_port_has_not_registered_is_said_to_be_missing(names: NameServer) -> None:
    for command, explanation in (
        (Ct.GSPN_ID, Explanation.SYMBOLIC_PORT_NAME_NOT_REGISTERED),
        (Ct.GFT_ID, Explanation.FC4_TYPES_NOT_REGISTERED),
        (Ct.GFF_ID, Explanation.FC4_FEATURES_NOT_REGISTERED),
    ):
        assert ask(names, ns.ByPortId(command, 0x010101)) == ct.reject(Reason.UNABLE_TO_PERFORM, explanation)
    node = ns.ByName(Ct.GSNN_NN, Wwn(HOST + 0x100))
    assert ask(names, node).explanation == Explanation.SYMBOLIC_NODE_NAME_NOT_REGISTERED


def test_lists_by_node_type_and_feature(names: NameServer) -> None:
    assert ns.unpack_port_names(ask(names, ns.ByFc4Type(Ct.GNN_FT)).body) == [
        (0x010202, Wwn(ARRAY + 0x100)),
        (0x010303, Wwn(OTHER + 0x100)),
    ]
    assert ns.unpack_port_ids(ask(names, ns.ByName(Ct.GID_NN, Wwn(ARRAY + 0x100))).body) == [0x010202]
    assert len(ns.unpack_port_ids(ask(names, ns.GidPt()).body)) == 3
    assert ns.unpack_port_ids(ask(names, ns.GidFf(ns.Fc4Feature.TARGET)).body) == [0x010202, 0x010303]
    assert not ask(names, ns.GidFf(ns.Fc4Feature.INITIATOR)).accepted
    assert ask(names, ns.GidPt(ns.PortType.NL_PORT)).explanation == Explanation.PORT_TYPE_NOT_REGISTERED


def test_nobody_gives_itself_another_name(names: NameServer) -> None:
    assert ask(names, ns.RpnId(0x010101, ARRAY)).explanation == Explanation.ACCESS_DENIED


def test_an_asker_with_little_room_is_told_how_much_is_missing(names: NameServer) -> None:
    query = dataclasses.replace(CtIu.unpack(ns.ByFc4Type(Ct.GPN_FT).pack()), size=4)
    answer = names.answer(0x010101, query.pack(), Zoning()).iu
    assert (len(answer.body), answer.size) == (16, 4)


def test_a_node_name_is_known_as_long_as_one_of_its_ports_is_here(names: NameServer) -> None:
    node = Wwn(HOST + 0x100)
    names.add(Entry(0x010404, Wwn(HOST + 1), node, F_PORT))
    assert ask(names, ns.RsnnNn(node, b"host")).accepted
    names.remove(0x010101)
    assert ns.unpack_symbolic_name(ask(names, ns.ByName(Ct.GSNN_NN, node), 0x010404).body) == b"host"
    names.remove(0x010404)
    names.add(Entry(0x010404, Wwn(HOST + 1), node, F_PORT))
    assert not ask(names, ns.ByName(Ct.GSNN_NN, node), 0x010404).accepted


def test_a_target_that_takes_its_word_back_is_told_of_as_a_target(names: NameServer) -> None:
    answer = names.answer(0x010202, ns.ByPortId(Ct.DA_ID, 0x010202).pack(), Zoning())
    assert answer.changed is not None
    assert answer.changed.is_target
    assert names.targets == {0x010303}
