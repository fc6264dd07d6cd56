"""Holders of a journal: who adopts when, what an old owner is told, what a witness does."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.core import Effect, Emit, Send
from mesh.pipeline import messages as m
from mesh.pipeline.journal import Adopt, JournalConfig, disclaim, holders, needs_witness
from mesh.pipeline.stage import StageConfig, StageCore
from mesh.pipeline.work import Free, Reserve
from mesh.types import Hop, LayerSpan, Route, SamplingParams

PROMPT = (10, 11, 12)
STEP = JournalConfig().adopt_step_s


def route(*nodes: str) -> Route:
    return Route("toy", tuple(Hop(node, 2 * at, 2 * at + 2) for at, node in enumerate(nodes)))


def opening(way: Route, hop: int, epoch: m.Epoch, drawn: tuple[int, ...] = (), **more: Any) -> m.Open:
    ask = m.SessionRequest(model="toy", prompt=PROMPT, sampling=SamplingParams(max_tokens=20))
    holds = hop in (0, len(way.hops) - 1, len(way.hops))
    return m.Open(
        "s", epoch, way, hop, (0, 0), 23, "normal", len(PROMPT) + len(drawn), ask if holds else None,
        drawn if holds else (), **more,
    )  # fmt: skip


class Node:
    """A stage and its clock; room in its engine is always there."""

    def __init__(self, me: str, layers: tuple[int, int] = (0, 6), config: StageConfig | None = None) -> None:
        self.now = 0.0
        self.core = StageCore(me, config)
        self.core.set_spans([LayerSpan("toy", *layers)])

    def hear(self, message: Any, sender: str) -> list[Effect]:
        return self._answered(self.core.receive(message, sender, self.now))

    def lost(self, node: str) -> list[Effect]:
        return self.core.lost(node, "reset", self.now)

    def wait(self) -> list[Effect]:
        assert self.core.deadline is not None
        self.now = max(self.now, self.core.deadline)
        return self.core.tick(self.now)

    def _answered(self, effects: list[Effect]) -> list[Effect]:
        done: list[Effect] = []
        for effect in effects:
            event = effect.event if isinstance(effect, Emit) else None
            done += self.core.reserved(event.key, self.now) if isinstance(event, Reserve) else [effect]
        return done


def adopted(effects: list[Effect]) -> list[Adopt]:
    return [effect.event for effect in effects if isinstance(effect, Emit) and isinstance(effect.event, Adopt)]


def sent(effects: list[Effect], kind: type) -> list[tuple[str, Any]]:
    return [(x.to, x.message) for x in effects if isinstance(x, Send) and isinstance(x.message, kind)]


def test_holders_adopt_from_the_sampler_on() -> None:
    assert holders(route("a", "b", "c"), None) == ["c", "a"]
    assert holders(route("a"), "w") == ["a", "w"]


@pytest.mark.parametrize(
    ("nodes", "needed"), [(("o",), True), (("o", "b"), False), (("a", "o"), False), (("o", "b", "o"), True)]
)
def test_a_witness_is_needed_where_the_owner_is_both_ends(nodes: tuple[str, ...], needed: bool) -> None:
    assert needs_witness(route(*nodes), "o") is needed


def test_the_sampler_adopts_at_once_with_all_that_it_knows() -> None:
    node = Node("c", (4, 6))
    node.hear(opening(route("a", "b", "c"), 2, (3, "o"), (20, 21), left_s=50.0), "o")
    node.now = 10.0
    (found,) = adopted(node.lost("o"))
    assert (found.epoch, found.drawn, found.left_s, found.detected_by) == ((3, "o"), (20, 21), 40.0, "reset")
    assert adopted(node.lost("o")) != [], "a second loss claims again ..."
    assert adopted(node.lost("o"))[0].epoch == (5, "o"), "... and never under an epoch of an earlier claim"


def test_the_first_hop_gives_the_sampler_time() -> None:
    node = Node("a", (0, 2))
    node.hear(opening(route("a", "b", "c"), 0, (1, "o")), "o")
    assert adopted(node.lost("o")) == []
    assert adopted(node.wait()) != []
    assert node.now == STEP


def test_the_first_hop_need_not_wait_for_a_sampler_that_was_the_owner() -> None:
    node = Node("a", (0, 2))
    node.hear(opening(route("a", "b", "o"), 0, (1, "o")), "o")
    assert len(adopted(node.lost("o"))) == 1


def test_whoever_is_not_first_in_line_follows_the_claim_of_who_was() -> None:
    node, way = Node("a", (0, 2)), route("a", "b", "c")
    node.hear(opening(way, 0, (1, "o")), "o")
    node.lost("o")
    assert sent(node.hear(opening(way, 0, (2, "c")), "c"), m.Opened) != []
    while node.now < 50.0:
        assert adopted(node.wait()) == []


def test_a_hop_between_holds_no_journal_and_adopts_nothing() -> None:
    node = Node("b", (2, 4))
    node.hear(opening(route("a", "b", "c"), 1, (1, "o")), "o")
    assert node.lost("o") == []
    assert list(node.core.journals) == []


def test_a_claim_that_lacks_tokens_is_told_them_and_changes_nothing() -> None:
    node, way = Node("c", (4, 6)), route("a", "b", "c")
    node.hear(opening(way, 2, (1, "o"), (20, 21)), "o")
    effects = node.hear(opening(way, 2, (2, "a"), (20,)), "a")
    assert effects == [Send("a", m.Ahead("s", (2, "a"), (1, "o"), (20, 21)))]
    assert node.core.journals.get("s").epoch == (1, "o")  # type: ignore[union-attr]
    assert sent(node.hear(opening(way, 2, (3, "a"), (20, 21)), "a"), m.Opened) != []


def test_an_owner_may_take_back_what_it_never_accepted() -> None:
    node, way = Node("c", (4, 6)), route("a", "b", "c")
    node.hear(opening(way, 2, (1, "o"), (20, 21)), "o")
    assert sent(node.hear(opening(way, 2, (2, "o"), (20,)), "o"), m.Opened) != []


@pytest.mark.parametrize("message", [m.Progress("s", (1, "o"), 3), m.Ack("s", (1, "o"), 3)])
def test_an_owner_that_was_frozen_is_told_who_took_over(message: Any) -> None:
    node, way = Node("b", (2, 4)), route("a", "b", "c")
    node.hear(opening(way, 1, (1, "o")), "o")
    node.hear(opening(way, 1, (2, "c")), "c")
    assert node.hear(message, "o") == [Send("o", m.Ahead("s", (1, "o"), (2, "c")))]
    assert sent(node.hear(m.Lease((("s", (1, "o")),)), "o"), m.Ahead) != []
    assert node.hear(m.Progress("s", (1, "o"), 3), "x") == []


def test_two_claims_with_one_counter_are_told_apart_by_their_owners() -> None:
    node, way = Node("b", (2, 4)), route("a", "b", "c")
    node.hear(opening(way, 1, (1, "o")), "o")
    node.hear(opening(way, 1, (2, "a")), "a")
    assert sent(node.hear(opening(way, 1, (2, "c")), "c"), m.Opened) != []
    assert sent(node.hear(opening(way, 1, (2, "a")), "a"), m.Ahead) == [("a", m.Ahead("s", (2, "a"), (2, "c")))]


def test_an_owner_that_does_not_renew_is_asked_and_then_lost() -> None:
    node = Node("c", (4, 6))
    node.hear(opening(route("a", "b", "c"), 2, (1, "o")), "o")
    asked: list[Any] = []
    while not asked:
        asked = sent(node.wait(), m.Held)
    assert (node.now, asked) == (60.0, [("o", m.Held("s", (1, "o"), 3))])
    found: list[Adopt] = []
    while not found:
        found = adopted(node.wait())
    assert (node.now, found[0].detected_by) == (65.0, "lease")


@pytest.mark.parametrize("answer", ["Lease", "Release", "Disown"])
def test_what_an_asked_owner_may_answer(answer: str) -> None:
    node = Node("c", (4, 6))
    node.hear(opening(route("a", "b", "c"), 2, (1, "o")), "o")
    while not sent(node.wait(), m.Held):
        pass
    said: Any = m.Lease((("s", (1, "o")),)) if answer == "Lease" else getattr(m, answer)("s", (1, "o"))
    effects = node.hear(said, "o")
    assert bool(adopted(effects)) is (answer == "Disown")
    assert (node.core.journals.get("s") is None) is (answer == "Release")


def test_only_the_owner_can_disown() -> None:
    node = Node("c", (4, 6))
    node.hear(opening(route("a", "b", "c"), 2, (2, "o")), "o")
    assert node.hear(m.Disown("s", (2, "o")), "x") == []
    assert node.hear(m.Disown("s", (1, "o")), "o") == []


def test_a_node_that_owns_nothing_says_whether_it_ended_or_forgot() -> None:
    asked = m.Held("s", (1, "o"), 4)
    assert disclaim(asked, "c", ended=True) == [Send("c", m.Release("s", (1, "o")))]
    assert disclaim(asked, "c", ended=False) == [Send("c", m.Disown("s", (1, "o")))]
    assert disclaim(m.Ahead("s", (1, "o"), (2, "c")), "c", ended=False) == []


# -- the witness -------------------------------------------------------------------------------------------------------


def witness() -> Node:
    node = Node("w")
    assert sent(node.hear(opening(route("o"), 1, (1, "o"), (20,)), "o"), m.Opened) == [
        ("o", m.Opened("s", (1, "o"), 1, 4))
    ]
    return node


def test_a_witness_holds_what_it_is_fed_and_computes_nothing() -> None:
    node = witness()
    assert node.hear(m.Feed("s", (1, "o"), 4, (21,)), "o") == [Send("o", m.Held("s", (1, "o"), 5))]
    assert node.core.sessions() == []
    (found,) = adopted(node.lost("o"))
    assert found.drawn == (20, 21)


def test_a_witness_says_what_it_lacks_and_is_never_cut() -> None:
    node = witness()
    assert node.hear(m.Feed("s", (1, "o"), 6, (23,)), "o") == [Send("o", m.Held("s", (1, "o"), 4))]
    node.hear(m.Feed("s", (1, "o"), 4, (21, 22)), "o")
    node.hear(opening(route("o"), 1, (1, "o"), (20,)), "o")  # sent again
    assert sent(node.hear(m.Progress("s", (1, "o"), 3), "o"), m.Held) == [("o", m.Held("s", (1, "o"), 6))]


def test_a_witness_believes_the_owner_only_and_holds_no_more_than_was_asked() -> None:
    node = witness()
    node.hear(m.Feed("s", (1, "o"), 4, (21,)), "x")
    node.hear(m.Feed("s", (1, "o"), 4, (1,) * 20), "o")
    assert node.core.journals.get("s").tokens == [*PROMPT, 20]  # type: ignore[union-attr]


def test_a_witness_frees_at_the_end_and_can_become_a_hop() -> None:
    node = witness()
    assert sent(node.hear(opening(route("w"), 0, (2, "o"), (20,)), "o"), m.Opened) != []
    assert len(node.core.sessions()) == 1
    assert [type(e.event) for e in node.hear(m.Release("s", (2, "o")), "o") if isinstance(e, Emit)] == [Free]
    assert list(node.core.journals) == []


def test_journals_of_a_witness_are_bounded() -> None:
    node = Node("w", config=StageConfig(journal=JournalConfig(max_witnessed=0)))
    assert sent(node.hear(opening(route("o"), 1, (1, "o")), "o"), m.Refused)[0][1].code == "busy"
