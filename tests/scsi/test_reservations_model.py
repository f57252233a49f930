"""Long streams of reservation commands from several nexuses, against a model written from the standard's prose.

The model knows no State: it keeps rows of a table, and asks of each command, in the order of the
clauses, who loses what and who is told.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.scsi.cluster import (
    CLEAR,
    FULL_STATUS,
    IGNORE,
    KEYS,
    PREEMPT,
    PREEMPT_AND_ABORT,
    REGISTER,
    RELEASE,
    RESERVATION,
    RESERVE,
    TYPES,
    Cluster,
    name,
    nexus,
)
from vhostfc.scsi.persistent import pack, unpack
from vhostfc.scsi.reservations import Kind, State
from vhostfc.scsi.task import AbortTasks, TaskManagement

NAMES = ("A1", "A2", "B1", "B2", "C1", "C2")
RELEASED, PREEMPTED, REMOVED = "2A/04", "2A/03", "2A/05"


class Model:
    """table: nexus -> key.  kind 0: no reservation.  owner: of a reservation that one nexus holds."""

    def __init__(self) -> None:
        self.table: dict[str, int] = {}
        self.kind = 0
        self.owner = ""
        self.count = 0
        self.news: dict[str, set[str]] = {}
        self.aborted: set[str] = set()
        self.reserver = ""

    def holders(self) -> set[str]:
        if self.kind in (7, 8):
            return set(self.table)
        return {self.owner} if self.kind else set()

    def tell(self, who: set[str], what: str) -> None:
        for one in who:
            self.news.setdefault(one, set()).add(what)

    def drop(self, who: set[str]) -> bool:
        """Registrations go; True if the reservation went with them."""
        before = self.kind
        if self.kind in (7, 8):
            if not set(self.table) - who:
                self.kind = 0
        elif self.owner in who:
            self.kind, self.owner = 0, ""
        for one in who:
            self.table.pop(one, None)
        return bool(before and not self.kind)

    def command(self, who: str, action: int, key: int, new: int, kind: int, all_ports: bool) -> str:
        self.news, self.aborted = {}, set()
        if self.reserver:
            return "conflict"
        mine = self.table.get(who, 0)
        if action in (REGISTER, IGNORE):
            ports = [who[0] + "1", who[0] + "2"] if all_ports else [who]
            if action == REGISTER and [one for one in ports if self.table.get(one, 0) != key]:
                return "conflict"
            if new:
                for one in ports:
                    self.table[one] = new
            elif any(one in self.table for one in ports):
                old = self.kind
                if self.drop(set(ports)) and old in (5, 6):
                    self.tell(set(self.table), RELEASED)
            else:
                return "good"
            self.count += 1
            return "good"
        if not mine or mine != key:
            return "conflict"
        if action == RESERVE and kind not in TYPES:
            return "5/24/00:c2.3"
        others = set(self.table) - {who}
        if action == RESERVE:
            if self.kind and not (who in self.holders() and kind == self.kind):
                return "conflict"
            if not self.kind:
                self.kind, self.owner = kind, "" if kind in (7, 8) else who
            return "good"
        if action == RELEASE:
            if who in self.holders():
                if kind != self.kind:
                    return "5/26/04"
                if self.kind > 3:
                    self.tell(others, RELEASED)
                self.kind, self.owner = 0, ""
            return "good"
        self.count += 1
        if action == CLEAR:
            self.tell(others, PREEMPTED)
            self.table.clear()
            self.kind, self.owner = 0, ""
            return "good"
        answer = self.preempt(who, new, kind)
        if answer != "good":
            self.count -= 1
        return answer

    def preempt(self, who: str, victim_key: int, kind: int) -> str:
        everyone = self.kind in (7, 8)
        if victim_key == 0 and not everyone:
            return "5/26/00:p8"
        victims = {one for one, key in self.table.items() if key == victim_key or not victim_key}
        if not victims:
            return "conflict"
        takes_over = victim_key == 0 if everyone else self.owner in victims
        if takes_over:
            if kind not in TYPES:
                return "5/24/00:c2.3"
            victims.discard(who)
            old = self.kind
            self.kind, self.owner = kind, "" if kind in (7, 8) else who
            for one in victims:
                del self.table[one]
            if old != kind:
                self.tell(set(self.table) - {who}, RELEASED)
        else:
            self.drop(victims)
        self.tell(victims - {who}, REMOVED)
        self.aborted = victims
        return "good"

    def may(self, who: str) -> str:
        if self.reserver:
            return "rw" if who == self.reserver else ""
        if not self.kind or who in self.holders() or (self.kind >= 5 and who in self.table):
            return "rw"
        return "r" if self.kind in (1, 5, 7) else ""


class Reserving(RuleBasedStateMachine):
    who = st.sampled_from(NAMES)
    keys = st.integers(0, 3)
    kinds = st.sampled_from((*TYPES, 2))
    actions = st.sampled_from((REGISTER, IGNORE, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT))

    @initialize()
    def begin(self) -> None:
        self.cluster = Cluster(NAMES)
        self.model = Model()

    def key_of(self, who: str, key: int, right: bool) -> int:
        return self.model.table.get(who, 0) if right else key

    @rule(who=who, new=st.integers(1, 3))
    def register(self, who: str, new: int) -> None:
        self.do(who, IGNORE, 0, new, 0, False)

    @rule(who=who, kind=st.sampled_from(TYPES))
    def reserve(self, who: str, kind: int) -> None:
        self.do(who, RESERVE, self.key_of(who, 0, True), 0, kind, False)

    @rule(who=who, abort=st.booleans(), kind=kinds, of=who)
    def preempt(self, who: str, abort: bool, kind: int, of: str) -> None:
        action = PREEMPT_AND_ABORT if abort else PREEMPT
        self.do(who, action, self.key_of(who, 0, True), self.model.table.get(of, 0), kind, False)

    @rule(who=who, action=actions, key=keys, new=keys, kind=kinds, all_ports=st.booleans(), right=st.integers(0, 3))
    def anything(self, who: str, action: int, key: int, new: int, kind: int, all_ports: bool, right: int) -> None:
        self.do(who, action, self.key_of(who, key, bool(right)), new, kind, all_ports)

    def do(self, who: str, action: int, key: int, new: int, kind: int, all_ports: bool) -> None:
        expected = self.model.command(who, action, key, new, kind, all_ports)
        assert self.cluster.out(who, action, key, new, kind, all_tg_pt=all_ports) == expected
        aborted = {name(one) for e in self.cluster.target.effects if isinstance(e, AbortTasks) for one in e.nexuses}
        assert aborted == (self.model.aborted if action == PREEMPT_AND_ABORT else set())
        self.told()

    @rule(who=who, to=who, key=keys, new=keys, unreg=st.booleans())
    def move(self, who: str, to: str, key: int, new: int, unreg: bool) -> None:
        model, mine = self.model, self.model.table.get(who, 0)
        answer = self.cluster.move(who, mine, new, to, unreg=unreg)
        if model.reserver or not mine:
            assert answer == "conflict"
        elif not model.kind:
            assert answer == "5/24/00:c1.4"
        elif model.owner != who:
            assert answer == "conflict"
        elif not new or who[0] == to[0]:
            assert answer.startswith("5/26/00")
        else:
            assert answer == "good"
            model.table[to], model.owner = new, to
            model.count += 1
            if unreg:
                del model.table[who]
        model.news = {}
        self.told()

    @rule(who=who)
    def reserve_6(self, who: str) -> None:
        model = self.model
        answer = self.cluster.send(who, "16 00 00 00 00 00")
        if model.reserver:
            assert answer == ("good" if who == model.reserver else "conflict")
        elif model.kind and model.may(who) == "rw":
            assert answer == "good"
        elif model.table:
            assert answer == "conflict"
        else:
            assert answer == "good"
            model.reserver = who

    @rule(who=who)
    def release_6(self, who: str) -> None:
        self.cluster.send(who, "17 00 00 00 00 00")
        if who == self.model.reserver:
            self.model.reserver = ""

    @rule(who=who)
    def come_and_go(self, who: str) -> None:
        self.cluster.target.unit.detach(nexus(who))
        self.cluster.target.unit.attach(nexus(who))
        if who == self.model.reserver:
            self.model.reserver = ""
        self.model.news = {who: {"29/07"}}
        self.told()

    @rule(who=who)
    def reset(self, who: str) -> None:
        self.cluster.target.manage(TaskManagement.LOGICAL_UNIT_RESET, nexus(who))
        self.model.reserver = ""
        self.model.news = {one: {"29/03"} for one in NAMES}
        self.told()

    def told(self) -> None:
        """Everybody hears what the model says, once; a RESERVE(6) keeps others from asking by TEST UNIT READY."""
        news = {one: sorted(what) for one, what in self.model.news.items() if what}
        found: dict[str, list[str]] = {}
        for one in NAMES:
            while (data := self.cluster.target.good("03 00 00 00 12 00", nexus=nexus(one)))[2]:
                found.setdefault(one, []).append(f"{data[12]:02X}/{data[13]:02X}")
        assert {one: sorted(what) for one, what in found.items()} == news

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        if not hasattr(self, "cluster"):
            return
        model = self.model
        assert {one: self.cluster.may(one) for one in NAMES} == {one: model.may(one) for one in NAMES}
        if model.reserver:
            return
        assert self.cluster.registered() == model.table
        assert int.from_bytes(self.cluster.read(KEYS)[:4], "big") == model.count
        data = self.cluster.read(RESERVATION)
        if model.kind:
            assert data[21] == model.kind
            assert int.from_bytes(data[8:16], "big") == model.table.get(model.owner, 0)
        else:
            assert len(data) == 8
        data = self.cluster.read(FULL_STATUS)
        held = {name_of(data[at : at + 48]) for at in range(8, len(data), 48) if data[at + 12] & 1}
        assert held == model.holders()


def name_of(descriptor: bytes) -> str:
    return f"{chr(descriptor[24 + 15])}{descriptor[19]}"


Reserving.TestCase.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
TestReserving = Reserving.TestCase


# ---------------------------------------------------------------- over a restart


@st.composite
def states(draw: st.DrawFn) -> State:
    names = draw(st.lists(st.sampled_from([f"{letter}{port}" for letter in "ABC" for port in (1, 2)]), unique=True))
    keys = {nexus(one): draw(st.integers(1, 2**64 - 1)) for one in names}
    kind = draw(st.sampled_from([None, *Kind])) if keys else None
    holder = draw(st.sampled_from(list(keys))) if kind and not kind.all_registrants else None
    return State(aptpl=True, keys=keys, kind=kind, holder=holder)


@given(states())
def test_what_is_kept_comes_back(state: State) -> None:
    assert unpack(pack(state, lambda port: bytes(7) + bytes([port])), lambda port: port[7]) == state


@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_whatever_else_is_refused_with_a_reason(value: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        unpack(json.dumps(value).encode(), lambda port: port[7])


@pytest.mark.parametrize(
    "damage",
    [
        b'"type": 9',
        b'"type": 7',
        b'"version": 2',
        b'"initiator": "00"',
        b'"key": "0000000000000000"',
        b"\xff",
    ],
)
def test_a_damaged_record_is_refused(damage: bytes) -> None:
    state = State(aptpl=True, keys={nexus("A1"): 1}, kind=Kind.WRITE_EXCLUSIVE, holder=nexus("A1"))
    record = pack(state, lambda port: bytes(7) + bytes([port]))
    field = damage.split(b":")[0]
    lines = [damage + b"," * line.endswith(b",") if field in line else line for line in record.splitlines()]
    broken = b"\n".join(lines) if field in record else damage + record
    assert broken != record

    with pytest.raises(ValueError, match=r"\w"):
        unpack(broken, lambda port: port[7])
