"""Which sessions are on disk and for how long, and who goes on with them after a restart."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from mesh.errors import CapacityError, PeerUnreachable
from mesh.pipeline.events import State
from mesh.pipeline.messages import SessionRequest
from mesh.types import Hop, ModelId, Priority, Route, SamplingParams
from node import durable
from node.api.service import GenerationRequest
from node.durable import HOLDER_S, Durable, NotKept
from node.entry import RESULT_S
from node.session_log import SessionLogs

ROUTE = Route(ModelId("m"), (Hop("first", 0, 2), Hop("me", 2, 4)))


def asked(session: str, priority: Priority = "batch", key: str = "") -> GenerationRequest:
    sampling = SamplingParams(max_tokens=9)
    return GenerationRequest(session=session, request_id="r", model=ModelId("m"), prompt=(1, 2), sampling=sampling,
                             priority=priority, idempotency_key=key)  # fmt: skip


def journaled(request: GenerationRequest) -> SessionRequest:
    return SessionRequest(model=request.model, prompt=request.prompt, sampling=request.sampling,
                          priority=request.priority, form=msgspec.msgpack.encode(request))  # fmt: skip


class World:
    """One node's parts as ``Durable`` sees them, on a clock that the test holds."""

    def __init__(self, folder: Path) -> None:
        (folder / "sessions").mkdir(exist_ok=True)
        self.now = 100.0
        self.unsure = False
        self.owned: list[Any] = []
        self.journals: list[Any] = []
        self.owners: dict[str, str] = {}
        self.claims: dict[str, str] = {}
        self.restored: list[Any] = []
        logs = SessionLogs(folder / "sessions", folder / "sessions.key")
        self.logs = logs
        entry: Any = SimpleNamespace(batch=lambda: self.owned, restore=lambda _, kept: self.restored.append(kept))
        relay: Any = SimpleNamespace(find=self._find)
        claims: Any = SimpleNamespace(claim=self._claim)
        journals: Any = self.journals
        self.durable = Durable("me", logs, entry, journals, relay, claims, lambda: self.now)

    async def _find(self, session: str, patience_s: float) -> str | None:
        if self.unsure:
            raise PeerUnreachable("busy")
        return self.owners.get(session)

    async def _claim(self, request: GenerationRequest) -> str:
        return self.claims.setdefault(request.idempotency_key, request.session)

    def own(self, request: GenerationRequest, *drawn: int) -> Any:
        session = SimpleNamespace(id=request.session, epoch=(4, "me"), request=journaled(request), drawn=list(drawn),
                                  left_s=lambda now: 77.0, state=State.RUNNING)  # fmt: skip
        self.owned.append(session)
        return session

    def hold(self, request: GenerationRequest, *drawn: int) -> None:
        self.journals.append(SimpleNamespace(session=request.session, epoch=(4, "x"), request=journaled(request),
                                             drawn=drawn, ends_at=self.now + 55.0, route=ROUTE))  # fmt: skip


async def restarted(folder: Path) -> World:
    world = World(folder)
    await world.durable.load()
    return world


async def test_the_tokens_of_batch_follow_and_the_file_goes_with_the_result(tmp_path: Path) -> None:
    world = World(tmp_path)
    session = world.own(asked("a1"))
    await world.durable.keep(asked("a1"))
    assert world.logs.names() == ["a1"]
    session.drawn += [5, 6]
    await world.durable.write()
    session.drawn += [7]
    await world.durable.write()
    kept = World(tmp_path).logs.read("a1")
    assert kept is not None
    assert (kept.drawn, kept.left_s, kept.head.place, kept.head.epoch) == ((5, 6, 7), 77.0, 0, (4, "me"))
    world.owned.clear()
    await world.durable.write()
    assert world.logs.names() == []


async def test_journals_of_batch_are_kept_too_and_of_no_other_class(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.hold(asked("a1"), 5)
    world.hold(asked("a2", "normal"), 5)
    await world.durable.write()
    assert world.logs.names() == ["a1"]
    kept = world.logs.read("a1")
    assert kept is not None
    assert (kept.head.place, kept.left_s) == (1, 55.0), "the sampler goes on first after the owner"


async def test_a_journal_that_lost_tokens_is_written_anew(tmp_path: Path) -> None:
    world = World(tmp_path)
    session = world.own(asked("a1"), 5, 6, 7)
    await world.durable.write()
    session.drawn = [5]
    await world.durable.write()
    kept = world.logs.read("a1")
    assert kept is not None
    assert kept.drawn == (5,)


async def test_the_disk_of_a_node_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "MAX_KEPT", 1)
    world = World(tmp_path)
    world.own(asked("a1"))
    await world.durable.write()
    world.durable.check(asked("a2", "normal"))
    with pytest.raises(CapacityError):
        world.durable.check(asked("a2"))


async def test_what_is_kept_already_stays_when_there_is_no_place_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "MAX_KEPT", 1)
    world = World(tmp_path)
    world.hold(asked("a1"), 5)
    for _ in range(2):
        await world.durable.write()
        assert world.logs.names() == ["a1"]
    world.hold(asked("a2"), 6)
    await world.durable.write()
    assert world.logs.names() == ["a1"]


async def test_an_owner_goes_on_at_once(tmp_path: Path) -> None:
    before = World(tmp_path)
    before.own(asked("a1", key="k"), 5, 6)
    await before.durable.write()
    world = await restarted(tmp_path)
    await world.durable.go_on(0.0)
    assert [(kept.session, kept.drawn) for kept in world.restored] == [("a1", (5, 6))]
    assert world.claims == {"k": "a1"}, "its key finds it again"


async def test_a_holder_waits_for_those_before_it(tmp_path: Path) -> None:
    before = World(tmp_path)
    before.hold(asked("a1"), 5)
    await before.durable.write()
    world = await restarted(tmp_path)
    await world.durable.go_on(HOLDER_S - 1)
    await world.durable.write()
    assert (world.restored, world.logs.names()) == ([], ["a1"])
    await world.durable.go_on(HOLDER_S)
    assert [kept.session for kept in world.restored] == ["a1"]


@pytest.mark.parametrize("how", ["owned", "claimed"])
async def test_what_somebody_else_runs_is_dropped(tmp_path: Path, how: str) -> None:
    before = World(tmp_path)
    before.own(asked("a1", key="k"), 5)
    await before.durable.write()
    world = await restarted(tmp_path)
    if how == "owned":
        world.owners["a1"] = "other"
    else:
        world.claims["k"] = "another session"
    await world.durable.go_on(0.0)
    await world.durable.write()
    assert (world.restored, world.logs.names()) == ([], [])


async def test_a_form_of_another_version_stops_nothing(tmp_path: Path) -> None:
    before = World(tmp_path)
    strange = before.own(asked("a1"))
    strange.request = msgspec.structs.replace(strange.request, form=b"\x01")
    before.own(asked("a2"))
    await before.durable.write()
    world = await restarted(tmp_path)
    await world.durable.go_on(0.0)
    assert [kept.session for kept in world.restored] == ["a2"]


@pytest.mark.parametrize("ended", [True, False])
async def test_a_result_on_disk_is_no_younger_after_a_restart(tmp_path: Path, ended: bool) -> None:
    world = World(tmp_path)
    session = world.own(asked("a1"), 5, 6)
    await world.durable.write()
    session.state = State.ENDED if ended else State.RUNNING
    await world.durable.write()
    wrote = tmp_path / "sessions" / "a1.session"
    assert (world.logs.read("a1") or pytest.fail("gone")).ended == ended
    earlier = time.time() - RESULT_S + 60.0
    os.utime(wrote, (earlier, earlier))
    again = await restarted(tmp_path)
    await again.durable.go_on(0.0)
    assert [kept.drawn for kept in again.restored] == [(5, 6)], "it can be read for a minute yet"
    restored = again.own(asked("a1"), 5, 6)
    await again.durable.write()
    restored.state = session.state
    await again.durable.write()
    assert wrote.stat().st_mtime == pytest.approx(earlier), "nothing new was written"
    os.utime(wrote, (earlier - 61.0, earlier - 61.0))
    later = await restarted(tmp_path)
    assert later.logs.names() == ([] if ended else ["a1"])


async def test_what_the_disk_refuses_is_not_accepted_and_costs_no_other_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, begin, full = World(tmp_path), SessionLogs.begin, {"a1"}

    def refuse(logs: SessionLogs, session: str, head: Any) -> None:
        if session in full:
            raise OSError(28, "No space left on device")
        begin(logs, session, head)

    monkeypatch.setattr(SessionLogs, "begin", refuse)
    world.own(asked("a1"), 5)
    world.own(asked("b1"), 6)
    with pytest.raises(NotKept, match="ask another"):
        await world.durable.keep(asked("a1"))
    assert world.logs.names() == ["b1"]
    full.clear()
    await world.durable.keep(asked("a1"))
    assert (World(tmp_path).logs.read("a1") or pytest.fail("lost")).drawn == (5,)


async def test_a_file_that_was_torn_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, append = World(tmp_path), SessionLogs.append
    session = world.own(asked("a1"), 5)
    await world.durable.keep(asked("a1"))

    def tear(logs: SessionLogs, name: str, tail: Any) -> None:
        append(logs, name, tail)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as torn:
        torn.setattr(SessionLogs, "append", tear)
        session.drawn += [6]
        await world.durable.write()
    session.drawn += [7]
    await world.durable.write()
    assert (World(tmp_path).logs.read("a1") or pytest.fail("lost")).drawn == (5, 6, 7)


async def test_what_not_all_have_denied_waits(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.own(asked("a1"), 5)
    await world.durable.write()
    again = await restarted(tmp_path)
    again.unsure = True
    await again.durable.go_on(0.0)
    assert (again.restored, again.logs.names()) == ([], ["a1"])
    again.unsure = False
    await again.durable.go_on(1.0)
    assert [kept.drawn for kept in again.restored] == [(5,)]


async def test_a_disk_that_lets_nothing_go_ends_no_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It became read-only: what is over stays until it can be removed."""
    world = World(tmp_path)
    for name in ("a1", "a2"):
        world.own(asked(name), 5)
    await world.durable.write()
    again = await restarted(tmp_path)
    again.owners = {"a1": "other", "a2": "other"}

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as stuck:
        stuck.setattr(SessionLogs, "remove", refuse)
        await again.durable.go_on(0.0)
        await again.durable.write()
    assert (again.restored, again.logs.names()) == ([], ["a1", "a2"])
    await again.durable.write()
    assert again.logs.names() == []


async def test_a_file_that_cannot_be_read_costs_its_session_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, read = World(tmp_path), SessionLogs.read
    for name in ("a1", "a2"):
        before.own(asked(name), 5)
    await before.durable.write()

    def fail(logs: SessionLogs, session: str) -> Any:
        if session == "a1":
            raise OSError(5, "Input/output error")
        return read(logs, session)

    monkeypatch.setattr(SessionLogs, "read", fail)
    world = await restarted(tmp_path)
    await world.durable.go_on(0.0)
    assert [kept.session for kept in world.restored] == ["a2"]
