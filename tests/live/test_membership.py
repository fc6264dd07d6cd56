"""Who votes, who coordinates and who comes back, in meshes of real witness nodes: joining, leaving, crashing,
freezing, losing the majority, moving, and another mesh at an old address."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from scripts.local_mesh import ROOT, LocalMesh, LocalNode
from scripts.watching import Said, Watcher

pytestmark = pytest.mark.live

WITNESS = ["--role", "witness"]


class Mesh:
    """A mesh of witnesses, and what its running nodes say now."""

    def __init__(self, nodes: int) -> None:
        self.local = LocalMesh(nodes, [], flags=WITNESS)
        self.nodes = self.local.nodes

    def start(self, count: int) -> None:
        """The founder and so many nodes in all."""
        if not self.local.token:
            self.nodes[0].start()
            self.until(self.nodes[0].ready, "the founder to be ready")
            self.local.token = self.local.new_token()
        for node in self.nodes[1:count]:
            if node.process is None:
                node.start(self.local.token)
        self.until(lambda: self.agree(), f"{count} nodes to agree")

    def running(self) -> list[LocalNode]:
        return [node for node in self.nodes if node.running]

    def until(self, condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
        self.local.wait(condition, what, timeout)

    def agree(self, voters: int | None = None) -> bool:
        """All that run see each other alive, name one coordinator of one term, and hold one record."""
        said = [self.ask(node) for node in self.running()]
        if not all(said):
            return False
        names = sorted(node.name for node in self.running())
        same = {(one["coordinator"], one["term"], str(one["placement"]), *one["voters"]) for one in said}
        alive = all(
            sorted(member["name"] for member in one["members"] if member["state"] == "alive") == names for one in said
        )
        leads = said[0].get("coordinator") in [one["node_id"] for one in said]
        return len(same) == 1 and alive and leads and voters in (None, len(said[0]["voters"]))

    def ask(self, node: LocalNode) -> dict[str, Any]:
        try:
            return dict(node.get("/mesh/status"))
        except (OSError, ValueError):
            return {}

    def coordinator(self) -> LocalNode:
        return next(node for node in self.running() if (said := self.ask(node))["node_id"] == said["coordinator"])

    def voters(self) -> list[LocalNode]:
        """The coordinator first."""
        leader = self.coordinator()
        voters = self.ask(leader)["voters"]
        return [leader, *(n for n in self.running() if n is not leader and self.ask(n)["node_id"] in voters)]

    def learners(self) -> list[LocalNode]:
        voters = self.voters()
        return [node for node in self.running() if node not in voters]

    @contextmanager
    def watched(self, *nodes: LocalNode) -> Iterator[list[Watcher]]:
        """All that ``nodes`` say meanwhile."""
        watchers = [Watcher(node, every_s=0.01) for node in nodes]
        for watcher in watchers:
            watcher.start()
        try:
            self.until(lambda: all(watcher.seen for watcher in watchers), "the watchers to see")
            yield watchers
        finally:
            for watcher in watchers:
                watcher.stopping.set()
                watcher.join()


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "node", *words], cwd=ROOT, capture_output=True, text=True, timeout=60.0
    )


def identity(node: LocalNode) -> str:
    return str(node.get("/mesh/status")["node_id"])


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """Seven nodes, of which the tests start more and more; they are left running and agreed."""
    made = Mesh(7)
    try:
        yield made
    finally:
        made.local.stop()


# -- who votes ---------------------------------------------------------------------------------------------------------


def test_one_votes_then_three_then_five(mesh: Mesh) -> None:
    mesh.start(2)
    status = mesh.ask(mesh.nodes[1])
    assert len(status["voters"]) == 1
    assert "two nodes cannot elect" in status["failover"]
    assert "takeover" in command("status", "--data-dir", str(mesh.nodes[1].folder)).stdout
    mesh.start(3)
    mesh.until(lambda: mesh.agree(voters=3), "three voters")
    assert mesh.ask(mesh.nodes[0])["failover"] is None
    mesh.start(7)
    mesh.until(lambda: mesh.agree(voters=5), "five voters")


def test_a_coordinator_that_leaves_hands_over_first(mesh: Mesh) -> None:
    """Another leads, and the leaver votes no more, while it is still here: nobody waits for a time-out."""
    leaver = mesh.coordinator()
    gone = identity(leaver)
    with mesh.watched(next(node for node in mesh.voters() if node is not leaver)) as (other,):
        assert command("leave", "--data-dir", str(leaver.folder)).returncode == 0
        mesh.until(lambda: other.now["states"][gone] == "left", "its goodbye")
        mesh.until(lambda: mesh.agree(voters=3), "three voters of six nodes")
    said = [one for _, one in other.seen]
    assert first(said, lambda one: one["coordinator"] not in (None, gone))["states"][gone] == "alive"
    assert gone not in first(said, lambda one: one["states"][gone] == "left")["voters"]


def test_who_left_and_is_back_may_vote_again() -> None:
    """Of three that is one vote in three: without it nobody follows the coordinator that is left."""
    trio = Mesh(3)
    try:
        trio.start(3)
        trio.until(lambda: trio.agree(voters=3), "three voters")
        leaver = trio.coordinator()
        assert command("leave", "--data-dir", str(leaver.folder)).returncode == 0
        trio.until(lambda: not leaver.running and trio.agree(voters=1), "two nodes, of which one votes")
        leaver.start()
        trio.until(lambda: trio.agree(voters=3), "three voters again")
    finally:
        trio.local.stop()


def test_a_voter_that_leaves_is_replaced_first(mesh: Mesh) -> None:
    leader, leaver, *_ = mesh.voters()
    gone = identity(leaver)
    with mesh.watched(leader) as (other,):
        assert command("leave", "--data-dir", str(leaver.folder)).returncode == 0
        mesh.until(lambda: other.now["states"][gone] == "left", "its goodbye")
        mesh.until(lambda: mesh.agree(voters=3), "three voters of five nodes")
    said = [one for _, one in other.seen]
    assert len(first(said, lambda one: gone not in one["voters"])["voters"]) == 3
    assert gone not in first(said, lambda one: one["states"][gone] == "left")["voters"]
    assert {one["coordinator"] for one in said} == {identity(leader)}


def first(said: list[Said], holds: Callable[[Said], bool]) -> Said:
    return next(one for one in said if holds(one))


# -- who coordinates ---------------------------------------------------------------------------------------------------


def test_an_old_coordinator_is_refused_when_it_wakes(mesh: Mesh) -> None:
    """It takes itself for the coordinator until it is told: what it is asked just then is done by all or refused."""
    old, *others = mesh.voters()
    frozen = identity(old)
    with mesh.watched(*others) as watchers:
        old.signal(signal.SIGSTOP)
        mesh.until(
            lambda: any(watcher.now["coordinator"] not in (None, frozen) for watcher in watchers), "a coordinator"
        )
        woken = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(new_token, old) for _ in range(8)]  # they wait at its door when it wakes
            time.sleep(0.1)
            old.signal(signal.SIGCONT)
            made = [token for one in asked if (token := one.result())]
        mesh.until(mesh.agree, "all to agree")
    for watcher in watchers:
        assert watcher.first(woken, lambda one: one["coordinator"] == frozen) is None
        records = [one["record"] for _, one in watcher.seen]
        assert records == sorted(records)
    for node in mesh.running():
        known = {token["id"] for token in node.admin("GET", "/mesh/admin/tokens")["data"]}
        assert known >= set(made), node.name


def new_token(node: LocalNode) -> str:
    """Its id, or nothing where it was refused for the moment."""
    try:
        return str(node.admin("POST", "/mesh/admin/tokens", {"ttl_s": 60, "uses": 1})["id"])
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        return ""


def test_a_mesh_that_lost_its_majority_says_so_and_is_taken_over(mesh: Mesh) -> None:
    """Those who were gone were a majority of the old voters: when they return they follow, whatever they decided."""
    (leader, second, survivor), learners = mesh.voters(), mesh.learners()
    epoch = mesh.ask(survivor)["placement"]["id"][0]
    leader.kill()
    second.kill()
    rest = [survivor, *learners]
    mesh.until(lambda: all(mesh.ask(node).get("degraded") for node in rest), "all to say that they are degraded")
    assert all("takeover" in mesh.ask(node)["degraded"] for node in rest)
    assert survivor.get("/ready") == {"ready": True, "degraded": mesh.ask(survivor)["degraded"]}
    refused = command("token", "create", "--data-dir", str(survivor.folder))
    assert (refused.returncode, "majority of the voters" in refused.stderr) == (1, True)

    heir = learners[0]
    done = command("takeover", "--data-dir", str(heir.folder))
    assert (done.returncode, "epoch=2" in done.stdout) == (0, True), done.stderr
    mesh.until(mesh.agree, "the rest to follow")
    assert mesh.coordinator() is heir
    assert command("takeover", "--data-dir", str(survivor.folder)).returncode == 1

    for node in (leader, second):
        node.start()
    mesh.until(lambda: mesh.agree(voters=3), "the old side to follow, and three voters")
    assert mesh.coordinator() is heir
    assert all(mesh.ask(node)["placement"]["id"][0] > epoch for node in mesh.running())
    assert "taken over" in leader.log.read_text()


# -- who comes back ----------------------------------------------------------------------------------------------------


def test_a_voter_that_dies_is_replaced_begins(mesh: Mesh) -> None:
    """A substitute comes when it has been dead for 15 s; the tests below pass the time."""
    _, victim, *_ = mesh.voters()
    victim.kill()


@pytest.fixture(scope="module")
def pair() -> Iterator[Mesh]:
    """Two nodes: a founder, which votes, and a learner."""
    made = Mesh(2)
    try:
        made.start(2)
        yield made
    finally:
        made.local.stop()


def move(node: LocalNode, like: LocalNode) -> None:
    """Its doors are where ``like``'s were."""
    node.api, node.peer = like.api, like.peer


def test_a_node_that_was_forgotten_and_moved_comes_back_as_itself(pair: Mesh) -> None:
    """Crashed; forgotten by a mesh that was started again meanwhile; then back at another address, and both moved."""
    spare = LocalMesh(4, [], flags=WITNESS)
    founder, node = pair.nodes
    me = identity(node)
    node.kill()
    pair.until(lambda: states(founder)[me] == "dead", "its death to be noticed")
    founder.kill()
    founder.start()
    pair.until(lambda: me not in states(founder), "it to be forgotten")
    move(node, spare.nodes[0])
    node.start()
    pair.until(pair.agree, "it to be back")
    assert (identity(node), states(founder)[me]) == (me, "alive")
    assert next(m["peer"] for m in founder.get("/mesh/status")["members"] if m["id"] == me) == node.peer

    node.kill()
    founder.kill()
    move(founder, spare.nodes[1])
    move(node, spare.nodes[2])
    founder.start()
    pair.until(founder.answers, "the founder to answer")
    token = pair.local.new_token()
    node.start(token)
    pair.until(pair.agree, "a token to tell it where the founder is")
    assert identity(node) == me


def states(node: LocalNode) -> dict[str, str]:
    try:
        return {member["id"]: member["state"] for member in node.get("/mesh/status")["members"]}
    except (OSError, ValueError):
        return {}


def test_a_mesh_at_an_address_of_another_stays_another(pair: Mesh, mesh: Mesh) -> None:
    """A node of each mesh returns where one of the other's was: each is looked for there, and neither is taken in."""
    mine, theirs = pair.nodes[1], mesh.learners()[0]
    watched = [pair.nodes[0], mesh.coordinator(), mine, theirs]
    before = [sorted(states(node)) for node in watched]
    mine.kill()
    theirs.kill()
    mine.api, mine.peer, theirs.api, theirs.peer = theirs.api, theirs.peer, mine.api, mine.peer
    mine.start()
    theirs.start()
    pair.until(pair.agree, "one mesh to be whole")
    mesh.until(mesh.agree, "the other to be whole")
    assert [sorted(states(node)) for node in watched] == before


def test_a_voter_that_dies_is_replaced_ends(mesh: Mesh) -> None:
    (victim,) = (node for node in mesh.nodes if node.process is not None and node.process.poll() == -9)
    me = next(m["id"] for m in mesh.ask(mesh.coordinator())["members"] if m["name"] == victim.name)
    mesh.until(lambda: mesh.agree(voters=3) and me not in mesh.ask(mesh.running()[0])["voters"], "a substitute")
    victim.start()
    mesh.until(mesh.agree, "it to come back")
    assert me not in mesh.ask(victim)["voters"]
