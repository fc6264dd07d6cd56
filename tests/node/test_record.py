"""Edits as pure functions, and the keeper that commits them: here, at the coordinator, or not at all."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import pytest

from gossip.members import MemberInfo
from mesh.core import Effect
from mesh.election.events import Busy, NotLeader
from mesh.election.record import ApiKey, Content, JoinToken, Record, RecordId, make_record
from mesh.errors import PeerError, PeerUnreachable, RequestError
from mesh.types import MeshId, ModelInfo
from node import record as records
from node.identity import Identity
from node.record import (
    AddKey,
    AddModel,
    AddToken,
    Edit,
    RecordKeeper,
    RemoveModel,
    RevokeKey,
    RevokeNode,
    RevokeToken,
    models_of,
)
from node.security import admission, token
from node.security.admission import Applicant, Refused
from node.security.ca import Authority, fingerprint
from tests.mesh.exhaustive import model

MESH = MeshId("0123456789abcdef" * 2)
ME = Identity.generate()
AUTHORITY = Authority.found(MESH, time.time())


def join_token(name: str, uses: int = 1) -> JoinToken:
    return JoinToken(name, b"hash", 1e12, uses)


def api_key(name: str, scope: Any = "infer") -> ApiKey:
    return ApiKey(name, b"hash of " + name.encode(), scope)


def raw(info: ModelInfo) -> bytes:
    return msgspec.msgpack.encode(info)


# -- edits -------------------------------------------------------------------------------------------------------------

A, B = model(name="a"), model(name="b")
FULL = Content(
    placement_counter=3,
    tombstones=("gone",),
    tokens=(join_token("t1"), join_token("t2")),
    api_keys=(api_key("k1"), api_key("k1", "rag"), api_key("k2")),
    sealed_ca=(("n1", b"x"), ("n2", b"y")),
    gossip_keys=(b"old", b"older"),
    models=(raw(A), raw(B)),
)


@pytest.mark.parametrize(
    ("edit", "changes"),
    [
        (AddToken(join_token("t3")), {"tokens": (join_token("t1"), join_token("t2"), join_token("t3"))}),
        (AddToken(join_token("t1", 9)), {"tokens": (join_token("t2"), join_token("t1", 9))}),
        (
            RevokeToken("t1"),
            {"tokens": (msgspec.structs.replace(join_token("t1"), expires_unix_s=0.0), join_token("t2"))},
        ),
        (AddKey((api_key("k3"),)), {"api_keys": (*FULL.api_keys, api_key("k3"))}),
        (RevokeKey("k1"), {"api_keys": (api_key("k2"),)}),
        (
            RevokeNode("n1", b"new"),
            {"tombstones": ("gone", "n1"), "gossip_keys": (b"new",), "sealed_ca": (("n2", b"y"),)},
        ),
        (RevokeNode("gone", b"new"), {}),
        (AddModel(A), {}),
        (AddModel(model(name="c")), {"models": (raw(A), raw(B), raw(model(name="c")))}),
        (RemoveModel("a"), {"models": (raw(B),)}),
    ],
)
def test_an_edit_changes_this_and_nothing_else(edit: Any, changes: dict[str, Any]) -> None:
    after = edit.apply(FULL)
    assert after == msgspec.structs.replace(FULL, **changes)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(edit), type=records.AnyEdit) == edit


@pytest.mark.parametrize(
    "edit",
    [AddToken(join_token("t3")), AddKey((api_key("k3"), api_key("k3", "rag"))), RevokeNode("n1", b"new"), AddModel(A)],
)
def test_an_edit_that_may_have_been_committed_can_be_tried_again(edit: Any) -> None:
    once = edit.apply(FULL)
    assert edit.apply(once) == once


@pytest.mark.parametrize(
    ("edit", "code", "status"),
    [
        (RevokeToken("t9"), "token_not_found", 404),
        (RevokeKey("k9"), "key_not_found", 404),
        (RemoveModel("z"), "model_not_found", 404),
        (AddModel(msgspec.structs.replace(A, manifest="other weights")), "model_name_taken", 409),
    ],
)
def test_an_edit_that_cannot_be(edit: Any, code: str, status: int) -> None:
    with pytest.raises(RequestError) as caught:
        edit.apply(FULL)
    assert (caught.value.code, caught.value.status) == (code, status)


def test_the_oldest_tokens_make_room() -> None:
    content = Content()
    for index in range(records.MAX_TOKENS + 3):
        content = AddToken(join_token(f"t{index}")).apply(content)
    assert len(content.tokens) == records.MAX_TOKENS
    assert content.tokens[0].id == "t3"


def test_an_edit_of_no_kind_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        Edit().apply(FULL)


def test_models_in_the_order_of_their_offers() -> None:
    assert models_of(FULL) == (A, B)


# -- the keeper --------------------------------------------------------------------------------------------------------


class FakeCore:
    """An election of one voice: what is proposed waits until the test commits it, or lets another win."""

    def __init__(self, content: Content) -> None:
        self.role, self.leader, self.ready = "leader", ME.node_id, True
        self.record = self.committed = make_record(1, RecordId(3, 1), (ME.node_id,), content)
        self.durable = type("D", (), {"mesh_id": MESH})
        self.proposed: list[Content] = []
        self.busy = 0

    def propose(self, now: float, content: Content) -> list[Effect]:
        if self.role != "leader":
            raise NotLeader(self.leader)
        if self.busy:
            self.busy -= 1
            raise Busy("a change is being committed")
        self.proposed.append(content)
        last = self.record.id
        self.record = make_record(1, RecordId(last.term, last.version + 1), (ME.node_id,), content)
        return []


class World:
    """Peers around a fake core; ``auto`` commits at once."""

    def __init__(self, content: Content = FULL, auto: bool = True) -> None:
        self.core, self.auto = FakeCore(content), auto
        self.election = self.door = self
        self.verbs: dict[str, Any] = {}
        self.asked: list[tuple[str, str, bytes]] = []
        self.answer: bytes | Exception = b""
        self.table = [told("z"), told(ME.node_id), told("dead", "dead")]
        self.swim = type("S", (), {"members": lambda _: self.table})()
        self.keeper = RecordKeeper(ME, self)  # type: ignore[arg-type]

    def on_rpc(self, verb: str, handler: Any) -> None:
        self.verbs[verb] = handler

    async def call(self, verb: Any) -> None:
        verb(self.core, 0.0)
        if self.auto:
            self.commit(self.core.record)

    def commit(self, record: Record) -> None:
        self.core.committed = record
        self.keeper.noticed()

    def lose(self, leader: str | None, record: Record | None = None) -> None:
        """Another leads from now on, and this is what it holds."""
        self.core.role, self.core.leader = "follower", leader
        if record is not None:
            self.core.record = self.core.committed = record
        self.keeper.noticed()

    async def request(self, to: str, verb: str, payload: bytes, timeout_s: float) -> bytes:
        self.asked.append((to, verb, payload))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def told(node: str, state: Any = "alive") -> MemberInfo:
    return MemberInfo(node, state, 1, f"{node}:1", 0, None, False)  # type: ignore[arg-type]


def other_term(content: Content) -> Record:
    return make_record(1, RecordId(4, 2), (ME.node_id,), content)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def add(name: str) -> Any:
    return AddToken(join_token(name)).apply


async def test_a_change_returns_what_was_committed() -> None:
    world = World(auto=False)
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    assert not change.done()
    assert world.core.proposed == [add("t3")(FULL)]
    world.commit(world.core.record)
    assert await change == add("t3")(FULL) == world.keeper.content


async def test_a_change_that_changes_nothing_commits_nothing() -> None:
    world = World()
    assert await world.keeper.change(RevokeNode("gone", b"k").apply) == FULL
    assert world.core.proposed == []


async def test_what_an_edit_refuses_is_raised() -> None:
    world = World()
    with pytest.raises(RequestError):
        await world.keeper.change(RevokeKey("k9").apply)
    assert world.core.proposed == []
    await world.keeper.change(add("t3"))


async def test_changes_wait_for_each_other_and_build_on_each_other() -> None:
    world = World(auto=False)
    one = asyncio.create_task(world.keeper.change(add("t3")))
    two = asyncio.create_task(world.keeper.change(add("t4")))
    await settle()
    assert len(world.core.proposed) == 1
    world.commit(world.core.record)
    await one
    await settle()
    world.commit(world.core.record)
    assert [x.id for x in (await two).tokens] == ["t1", "t2", "t3", "t4"]


async def test_while_the_core_is_busy_or_not_ready_it_is_asked_again() -> None:
    world = World()
    world.core.busy, world.core.ready = 2, False
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    assert (world.core.proposed, world.core.busy) == ([], 2)
    world.core.ready = True
    for _ in range(3):
        world.keeper.noticed()
        await settle()
    assert change.done()
    assert (await change).tokens[-1].id == "t3"


async def test_an_edit_is_tried_anew_on_what_was_committed_meanwhile() -> None:
    world = World()
    world.core.ready = False
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    world.core.record = world.core.committed = make_record(1, RecordId(3, 7), (ME.node_id,), Content())
    world.core.ready = True
    world.keeper.noticed()
    assert [x.id for x in (await change).tokens] == ["t3"]


async def test_a_change_that_is_not_committed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "COMMIT_S", 0.0)
    world = World(auto=False)
    with pytest.raises(Busy, match="a majority"):
        await world.keeper.change(add("t3"))
    assert not world.keeper._lock.locked()


async def test_only_the_coordinator_changes() -> None:
    world = World()
    world.lose("leader")
    with pytest.raises(NotLeader) as caught:
        await world.keeper.change(add("t3"))
    assert caught.value.leader == "leader"


# -- leadership lost midway --------------------------------------------------------------------------------------------


async def test_a_change_is_not_waited_for_by_who_leads_no_more() -> None:
    world = World(auto=False)
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    world.lose("leader")
    with pytest.raises(NotLeader):
        await change


async def test_a_change_that_another_leader_overtook_is_not_reported_as_committed() -> None:
    """Ids are ordered by term first: a newer committed record need not hold what was proposed before."""
    world = World(auto=False)
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    world.lose("leader", other_term(FULL))
    with pytest.raises(NotLeader):
        await change


async def test_a_leader_that_lost_and_won_tries_again_on_what_holds_now() -> None:
    world = World(auto=False)
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    world.core.record = other_term(add("t9")(FULL))
    world.auto = True
    world.commit(world.core.record)
    assert [x.id for x in (await change).tokens] == ["t1", "t2", "t9", "t3"]


async def test_a_change_that_the_next_leader_commits_as_it_is_holds() -> None:
    world = World(auto=False)
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    world.lose("leader", other_term(add("t3")(FULL)))
    assert await change == add("t3")(FULL)


async def test_another_record_that_came_while_the_own_was_saved_is_not_taken_for_it() -> None:
    """By the time that ``call`` returns, the core may follow another leader already."""
    world = World(auto=False)

    async def call(verb: Any) -> None:
        verb(world.core, 0.0)
        world.lose("leader", other_term(FULL))

    world.call = call  # type: ignore[method-assign]
    with pytest.raises(NotLeader):
        await world.keeper.change(add("t3"))


async def test_later_changes_of_the_same_term_hold_the_earlier() -> None:
    world = World(auto=False)
    change = asyncio.create_task(world.keeper.change(add("t3")))
    await settle()
    after = add("t4")(world.core.record.content)
    world.commit(make_record(1, RecordId(3, 9), (ME.node_id,), after))
    assert await change == after


# -- through the coordinator -------------------------------------------------------------------------------------------


async def test_an_edit_goes_to_the_coordinator() -> None:
    world = World()
    world.lose("leader")
    await world.keeper.edit(RevokeToken("t1"))
    assert world.asked == [("leader", "edit", msgspec.msgpack.encode(RevokeToken("t1")))]
    assert world.core.proposed == []


@pytest.mark.parametrize("leader", [None, ME.node_id], ids=["nobody", "itself"])
async def test_without_a_coordinator_an_edit_is_refused(leader: str | None) -> None:
    world = World()
    world.lose(leader)
    with pytest.raises(NotLeader):
        await world.keeper.edit(RevokeToken("t1"))
    assert world.asked == []


async def test_a_refusal_of_the_coordinator_is_raised() -> None:
    world = World()
    world.lose("leader")
    world.answer = RequestError("no such token", status=404)
    with pytest.raises(RequestError):
        await world.keeper.edit(RevokeToken("t9"))


async def test_edits_of_others_are_committed_here() -> None:
    world = World()
    assert await world.verbs["edit"]("other", msgspec.msgpack.encode(RevokeKey("k2"))) == b""
    assert world.keeper.content.api_keys == FULL.api_keys[:2]


@pytest.mark.parametrize("payload", [b"", b"\xc1", b"\x80", msgspec.msgpack.encode({"type": "Edit"}), b"\x93\1\2\3"])
async def test_what_is_no_edit_is_the_peers_fault(payload: bytes) -> None:
    world = World()
    with pytest.raises(PeerError, match="not an edit"):
        await world.verbs["edit"]("other", payload)
    assert world.core.proposed == []


# -- reading -----------------------------------------------------------------------------------------------------------


def test_whether_weights_are_served() -> None:
    keeper = World().keeper
    assert keeper.serves(A)
    assert not keeper.serves(msgspec.structs.replace(A, manifest="other weights"))
    assert not keeper.serves(model(name="z"))


def test_the_authority_is_there_for_whom_it_was_sealed_to() -> None:
    sealed = (ME.node_id, AUTHORITY.sealed_to(ME.node_id, ME.seal_key))
    holder = World(Content(ca_certificate=AUTHORITY.der, sealed_ca=(sealed,)))
    found = holder.keeper.authority()
    assert found is not None
    assert found.der == AUTHORITY.der
    assert holder.keeper.authority() is found
    assert World(Content(ca_certificate=AUTHORITY.der)).keeper.authority() is None


def test_a_new_gossip_key_is_none_of_the_old() -> None:
    world = World()
    assert world.keeper.new_gossip_key() not in FULL.gossip_keys


# -- admitting ---------------------------------------------------------------------------------------------------------


class Applying:
    """A joiner with a token of so many uses, and the world that it wants into."""

    def __init__(self, uses: int = 1, auto: bool = True) -> None:
        self.joiner = Identity.generate()
        made, kept = token.mint(
            MESH, ("h:1",), fingerprint(AUTHORITY.der), time.time(), uses=uses, created_by=ME.node_id
        )
        sealed = (ME.node_id, AUTHORITY.sealed_to(ME.node_id, ME.seal_key))
        content = Content(ca_certificate=AUTHORITY.der, sealed_ca=(sealed,), tokens=(kept,), gossip_keys=(b"g",))
        self.world = World(content, auto)
        self.applicant = Applicant(self.joiner, MESH, ("h",), token=made)
        self.request = self.applicant.request(b"nonce")

    @property
    def left(self) -> int:
        return self.world.keeper.content.tokens[0].uses_left


async def test_a_use_is_counted_before_anything_is_signed() -> None:
    it = Applying(auto=False)
    admitting = asyncio.create_task(it.world.keeper.admit(it.request))
    await settle()
    assert not admitting.done()
    it.world.commit(it.world.core.record)
    reply = await admitting
    assert it.left == 0
    assert it.applicant.accept(reply, AUTHORITY.der).node_id == it.joiner.node_id
    assert (reply.mesh_id, reply.gossip_keys) == (MESH, (b"g",))
    assert [member.id for member in reply.members] == [ME.node_id, "z"], "oneself first, the dead not at all"
    assert msgspec.msgpack.decode(reply.record, type=Record) == it.world.core.committed


async def test_a_repeated_request_counts_once() -> None:
    it = Applying()
    await it.world.keeper.admit(it.request)
    await it.world.keeper.admit(it.request)
    assert it.left == 0


async def test_two_joiners_cannot_share_one_use() -> None:
    """Both are judged good; the second is judged again on what the first left."""
    it = Applying(auto=False)
    other = Applicant(Identity.generate(), MESH, ("h",), token=it.applicant._token).request(b"nonce")
    one = asyncio.create_task(it.world.keeper.admit(it.request))
    two = asyncio.create_task(it.world.keeper.admit(other))
    await settle()
    it.world.commit(it.world.core.record)
    await one
    with pytest.raises(Refused) as caught:
        await two
    assert caught.value.why == "used_up"


async def test_nobody_is_signed_in_whose_use_was_not_committed() -> None:
    it = Applying(auto=False)
    admitting = asyncio.create_task(it.world.keeper.admit(it.request))
    await settle()
    it.world.lose("leader")
    with pytest.raises(Refused) as caught:
        await admitting
    assert caught.value.why == "unavailable"


async def test_a_node_that_does_not_lead_passes_a_join_on() -> None:
    it = Applying()
    it.world.lose("leader")
    it.world.answer = admission.encode_answer(Refused("revoked"))
    with pytest.raises(Refused, match="has been revoked"):
        await it.world.keeper.admit(it.request)
    assert it.world.asked == [("leader", "admit", msgspec.msgpack.encode(it.request))]


async def test_nobody_is_admitted_without_a_coordinator() -> None:
    it = Applying()
    for leader, answer in ((None, b""), ("leader", PeerUnreachable("gone"))):
        it.world.lose(leader)
        it.world.answer = answer
        with pytest.raises(Refused) as caught:
            await it.world.keeper.admit(it.request)
        assert caught.value.transient


async def test_a_follower_that_is_asked_to_decide_says_unavailable() -> None:
    it = Applying()
    it.world.lose("leader")
    raw_answer = await it.world.verbs["admit"]("other", msgspec.msgpack.encode(it.request))
    with pytest.raises(Refused) as caught:
        admission.decode_answer(raw_answer)
    assert caught.value.why == "unavailable"
