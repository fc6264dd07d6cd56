"""One turn of the loop is one frame to a peer and lane; order, bounds, and what cannot be read."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from mesh.core import Send
from mesh.errors import PeerError
from mesh.pipeline import messages as m
from mesh.types import Hop, Route, SamplingParams
from node import mail
from node.mail import FRAME, Mail
from node.net import frames

EPOCH = (1, "me")


class Office:
    def __init__(self) -> None:
        self.frames: list[tuple[str, bytes, bytes]] = []
        self.delivered: list[tuple[Any, str]] = []
        self.on_local: dict[Any, list[Send]] = {}
        self.mail = Mail("me", self._send, self._deliver)

    def _send(self, peer: str, message: bytes, body: bytes) -> bool:
        frames.encode(mail.KIND, message, body)  # the link's own bounds
        self.frames.append((peer, bytes(message), bytes(body)))
        return True

    def _deliver(self, message: Any, sender: str) -> None:
        self.delivered.append((message, sender))
        for send in self.on_local.pop(message, []):
            self.mail.post(send)

    def post(self, to: str, *messages: Any) -> None:
        for message in messages:
            self.mail.post(Send(to, message))


async def turn() -> None:
    await asyncio.sleep(0)


def gap(expected: int) -> m.Gap:
    return m.Gap("s", EPOCH, expected)


def forward(start: int, size: int = 8) -> m.Forward:
    return m.Forward("s", EPOCH, start, 1, memoryview(bytes(size)))


async def test_what_one_turn_posts_to_a_peer_is_one_frame_in_order() -> None:
    office = Office()
    office.post("a", gap(1), gap(2))
    office.post("b", gap(3))
    office.post("a", gap(4))
    assert office.frames == []
    await turn()
    assert [(peer, FRAME.decode(message), body) for peer, message, body in office.frames] == [
        ("a", [gap(1), gap(2), gap(4)], b""),
        ("b", [gap(3)], b""),
    ]
    await turn()
    assert len(office.frames) == 2
    office.post("a", gap(5))
    await turn()
    assert FRAME.decode(office.frames[2][1]) == [gap(5)]


async def test_hidden_states_go_by_the_tensor_lane() -> None:
    office = Office()
    office.post("a", forward(0), gap(1), forward(1))
    await turn()
    (_, small, none), (_, empty, body) = office.frames
    assert (FRAME.decode(small), none, empty) == ([gap(1)], b"", b"")
    assert FRAME.decode(body) == [forward(0), forward(1)]


async def test_tensor_frames_stay_below_half_the_bound() -> None:
    office = Office()
    third = mail.MAX_FRAME_BYTES // 2 // 3
    office.post("a", *[forward(start, third) for start in range(5)])
    await turn()
    groups = [[x.start for x in FRAME.decode(body)] for _, _, body in office.frames]
    assert groups == [[0, 1, 2], [3, 4]]


async def test_a_recovery_of_many_long_sessions_fits_the_control_lane() -> None:
    """All sessions are opened anew in one turn, each with its whole prompt."""
    office = Office()
    prompt = tuple(range(70_000, 70_000 + 100_000))
    ask = m.SessionRequest(model="toy", prompt=prompt, sampling=SamplingParams())
    openings = [
        m.Open(
            f"s{index}", EPOCH, route=Route("toy", (Hop("a", 0, 2),)), hop=0, placement_id=(1, 1),
            max_positions=100_256, priority="normal", accepted=100_000, request=ask,
        )
        for index in range(20)
    ]  # fmt: skip
    office.post("a", *openings, gap(7))
    await turn()
    assert len(office.frames) > 1
    sent = [message for _, frame, _ in office.frames for message in FRAME.decode(frame)]
    assert [message.session for message in sent] == [*(f"s{index}" for index in range(20)), "s"]


async def test_mail_to_oneself_is_delivered_in_the_same_turn() -> None:
    office = Office()
    office.on_local = {gap(1): [Send("me", gap(2)), Send("a", gap(3))]}
    office.post("me", gap(1))
    assert office.delivered == []
    await turn()
    assert office.delivered == [(gap(1), "me"), (gap(2), "me")]
    assert [FRAME.decode(message) for _, message, _ in office.frames] == [[gap(3)]]


async def test_what_arrives_is_delivered_in_order() -> None:
    office = Office()
    office.mail.arrived("a", FRAME.encode([gap(1), forward(0)]))
    assert office.delivered == [(gap(1), "a"), (forward(0), "a")]


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x91\x91\xa3Owl", FRAME.encode([gap(1)])[:-1]])
async def test_what_cannot_be_read_is_the_peers_fault(data: bytes) -> None:
    office = Office()
    with pytest.raises(PeerError):
        office.mail.arrived("a", data)
    assert office.delivered == []


@pytest.mark.parametrize("counter", [-1, 1 << 62, (1 << 64) - 1])
async def test_a_counter_that_could_not_be_raised_is_the_peers_fault(counter: int) -> None:
    office = Office()
    with pytest.raises(PeerError):
        office.mail.arrived("a", msgspec.msgpack.encode([m.Gap("s", (counter, "o"), 1)]))
    assert office.delivered == []
