"""One membership core alone in a laboratory: its peers are puppets of the test."""

from __future__ import annotations

import random
from typing import Any

import msgspec

from gossip.config import GossipConfig
from gossip.messages import Ack, Gossip, MemberRecord, State, Update
from gossip.swim import Swim
from mesh.core import Effect, Emit, Persist, Send
from mesh.types import NodeId
from tests.sim.gossip_world import identity

ME = NodeId("me")


def record(name: str, incarnation: int = 1, *, address: str = "", left: bool = False) -> MemberRecord:
    """A record that ``name`` signed."""
    who = identity(NodeId(name))
    bare = MemberRecord(who.node, incarnation, address or f"{name}:1", left, who.key, b"")
    return msgspec.structs.replace(bare, signature=who.sign(bare.signed_bytes(who.mesh_id)))


def said(state: State, name: str, incarnation: int = 1, by: tuple[str, ...] = (), **more: Any) -> Update:
    return Update(state, record(name, incarnation, **more), tuple(NodeId(who) for who in by))


def alive(name: str, incarnation: int = 1, **more: Any) -> Update:
    return said(State.ALIVE, name, incarnation, **more)


def suspect(name: str, incarnation: int = 1, by: tuple[str, ...] = ("x",)) -> Update:
    return said(State.SUSPECT, name, incarnation, by)


def dead(name: str, incarnation: int = 1, by: tuple[str, ...] = ("x", "y")) -> Update:
    return said(State.DEAD, name, incarnation, by)


def left(name: str, incarnation: int = 2) -> Update:
    return said(State.LEFT, name, incarnation, left=True)


class Lab:
    """A core called ``me``, that knows ``peers`` to be alive at incarnation 1, at time 100."""

    def __init__(self, *peers: str, config: GossipConfig | None = None, seed: int = 1, join: bool = True) -> None:
        self.now = 100.0
        self.config = config or GossipConfig()
        self.core = Swim(identity(ME), "me:1", 10, self.config, random.Random(seed))
        self.effects: list[Effect] = []
        if join:
            self.did(self.core.join([], self.now))
        for peer in peers:
            self.did(self._apply(alive(peer), peer))
        self.effects.clear()

    def _apply(self, update: Update, sender: str) -> list[Effect]:
        return self.core.receive(Gossip((update,)), NodeId(sender), self.now)

    def did(self, effects: list[Effect]) -> list[Effect]:
        self.effects += effects
        return effects

    def hears(self, message: Any, sender: str) -> list[Effect]:
        """Only the effects of this step; all are kept in ``effects``."""
        return self.did(self.core.receive(message, NodeId(sender), self.now))

    def told(self, update: Update, sender: str = "b") -> list[Effect]:
        """The update comes by gossip."""
        return self.did(self._apply(update, sender))

    def run(self, seconds: float) -> list[Effect]:
        """Tick at each deadline for so long; the effects of that time."""
        start, end = len(self.effects), self.now + seconds
        while self.core.deadline is not None and self.core.deadline <= end:
            self.now = max(self.now, self.core.deadline)
            self.did(self.core.tick(self.now))
        self.now = end
        return self.effects[start:]

    def sleep(self, seconds: float) -> None:
        """Time passes and the process does not run."""
        self.now += seconds

    def until_ping(self, target: str | None = None, within: float = 30.0) -> Any:
        """Run until a ping (to ``target``) is sent; the ping.  All others are answered at once."""
        end = self.now + within
        while self.core.deadline is not None and self.core.deadline <= end:
            self.now = max(self.now, self.core.deadline)
            for to, message in sends(self.did(self.core.tick(self.now)), "Ping"):
                if target in (None, to):
                    return message
                self.hears(Ack(message.seq), to)
        raise AssertionError(f"no ping to {target}")

    def state(self, name: str) -> str | None:
        info = self.core.member(NodeId(name))
        return info.state if info else None

    def incarnation(self, name: str) -> int:
        info = self.core.member(NodeId(name))
        assert info is not None
        return info.incarnation


def sends(effects: list[Effect], kind: str | None = None) -> list[tuple[str, Any]]:
    return [
        (effect.to, effect.message)
        for effect in effects
        if isinstance(effect, Send) and (kind is None or type(effect.message).__name__ == kind)
    ]


def emitted(effects: list[Effect], kind: str) -> list[Any]:
    return [effect.event for effect in effects if isinstance(effect, Emit) and type(effect.event).__name__ == kind]


def persisted(effects: list[Effect]) -> list[Any]:
    return [effect.record for effect in effects if isinstance(effect, Persist)]
