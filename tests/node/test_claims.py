"""Idempotency keys at the two nodes that keep them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mesh.errors import PeerUnreachable, RequestError
from mesh.types import ModelId, SamplingParams
from node import claims as module
from node.api.service import GenerationRequest
from node.claims import Claim, Claims
from tests.mesh.views import member, view


class Mesh:
    """Claims of several nodes that ask each other without a network; ``down`` ones do not answer."""

    def __init__(self, *names: str) -> None:
        self.now, self.down = 0.0, set[str]()
        self.verbs: dict[str, Callable[[str, bytes], Awaitable[bytes]]] = {}
        seen = view(*(member(name) for name in names))  # which counts "me" as well
        self.nodes = {
            str(x.id): Claims(x.id, self._peers(str(x.id)), lambda: seen, lambda: self.now) for x in seen.live()
        }

    def _peers(self, me: str) -> Any:
        mesh = self

        class Door:
            def on_rpc(self, verb: str, handler: Any) -> None:
                mesh.verbs[me] = handler

        class Peers:
            door = Door()

            async def request(self, to: str, verb: str, payload: bytes, timeout_s: float) -> bytes:
                if to in mesh.down:
                    raise PeerUnreachable(to)
                return await mesh.verbs[to](me, payload)

        return Peers()


def request(session: str, key: str = "k", body: str = "b", caller: str = "c") -> GenerationRequest:
    return GenerationRequest(
        session=session, request_id="r", model=ModelId("m"), prompt=(1,), sampling=SamplingParams(),
        idempotency_key=key, body_hash=body, caller=caller,
    )  # fmt: skip


async def test_a_repeat_at_any_node_finds_the_first_session() -> None:
    mesh = Mesh("a", "b", "c", "d")
    assert await mesh.nodes["a"].claim(request("s1")) == "s1"
    assert {await node.claim(request(f"again-{name}")) for name, node in mesh.nodes.items()} == {"s1"}
    assert await mesh.nodes["b"].claim(request("s2", key="other")) == "s2"
    assert await mesh.nodes["b"].claim(request("s3", caller="somebody")) == "s3"


async def test_two_first_requests_at_the_same_time_find_one_session() -> None:
    """Whichever answer comes late from whichever keeper."""
    for slow in ("a", "b", "c", "d"):
        mesh = Mesh("a", "b", "c", "d")
        for name, verb in list(mesh.verbs.items()):
            mesh.verbs[name] = _delayed(verb, 3 if name == slow else 1)
        asked = [node.claim(request(f"s-{name}")) for name, node in mesh.nodes.items()]
        assert len(set(await asyncio.gather(*asked))) == 1


def _delayed(verb: Callable[[str, bytes], Awaitable[bytes]], turns: int) -> Callable[[str, bytes], Awaitable[bytes]]:
    async def answer(sender: str, payload: bytes) -> bytes:
        for _ in range(turns):
            await asyncio.sleep(0)
        return await verb(sender, payload)

    return answer


async def test_another_body_under_the_same_key_is_refused() -> None:
    mesh = Mesh("a", "b", "c")
    await mesh.nodes["a"].claim(request("s1"))
    with pytest.raises(RequestError) as refused:
        await mesh.nodes["b"].claim(request("s2", body="else"))
    assert (refused.value.status, refused.value.code) == (409, "idempotency_key_reused")


async def test_either_keeper_may_be_lost() -> None:
    mesh = Mesh("a", "b", "c", "d")
    await mesh.nodes["a"].claim(request("s1"))
    keepers = [name for name, node in mesh.nodes.items() if node._kept]
    assert len(keepers) == module.HOLDERS
    for lost in keepers:
        mesh.down = {lost}
        asker = next(name for name in mesh.nodes if name != lost)
        assert await mesh.nodes[asker].claim(request("again")) == "s1"


def test_claims_are_bounded_in_time_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CLAIMS", 3)
    mesh = Mesh()
    node = mesh.nodes["me"]
    for number in range(10):
        node.keep(Claim(b"%d" % number, "b", "s"))
    assert len(node._kept) == 3
    mesh.now = module.KEEP_S + 1.0
    assert node.keep(Claim(b"9", "b", "later")).session == "later"
