"""What a node believes of the mesh."""

from __future__ import annotations

import msgspec
import pytest

from mesh.placement import Assigned, ModelPlacement, NodeCapacity, Placement, place
from mesh.types import LayerSpan, NodeProfile
from mesh.view import MemberView, MeshView, gaps, power_of_two
from tests.mesh.views import PLAIN, member, view


def test_who_is_there() -> None:
    mesh = view(member("a", state="suspect"), member("b", state="dead"), member("c"))
    assert [m.id for m in mesh.live()] == ["me", "c"]
    assert mesh.member("b") is not None
    assert mesh.member("x") is None
    assert mesh.name_of("a") == "name-a"
    assert mesh.name_of("0123456789abcdef") == "01234567"


def test_who_holds_what() -> None:
    mesh = view(member("a", (0, 4)), member("b", (3, 6), state="suspect"), member("c", (5, 8), state="dead"))
    assert [m.id for m in mesh.holders("m", 3)] == ["a", "b"]
    assert mesh.holders("m", 7) == ()
    assert mesh.uncovered(PLAIN) == ((6, 8),)
    assert mesh.uncovered(PLAIN, without="a") == ((0, 3), (6, 8))


def test_a_span_may_be_dropped_when_others_serve_all_of_it() -> None:
    """And go on holding it: two that hold the same must not each rely on the other."""

    def held(me: str, to_hold: dict[str, tuple[int, int]], *members: MemberView) -> MeshView:
        spans = tuple(Assigned(node, LayerSpan("m", a, b)) for node, (a, b) in to_hold.items())
        return msgspec.structs.replace(view(*members), me=me, placement=Placement((ModelPlacement(PLAIN, spans),)))

    two = (member("a", (0, 4)), member("b", (4, 6)))
    assert not held("b", {"a": (0, 4)}, *two).may_drop(LayerSpan("m", 4, 6))
    three = (member("a", (0, 4)), member("b", (2, 6)), member("c", (3, 6)))
    stay = {"a": (0, 4), "c": (3, 6)}
    assert held("b", stay, *three).may_drop(LayerSpan("m", 2, 6))
    assert not held("a", stay, *three).may_drop(LayerSpan("m", 0, 4))
    assert not held("b", {"a": (0, 4), "c": (3, 5)}, *three).may_drop(LayerSpan("m", 2, 6))
    leaving = (member("a", (0, 4)), member("c", (3, 6), draining=True))
    assert not held("b", stay, *leaving).may_drop(LayerSpan("m", 2, 6))


def test_a_model_is_known_from_the_placement_or_an_offer() -> None:
    assert view().model("m") == PLAIN
    assert view().model("other") is None
    assert MeshView("me").model("m") is None
    placed = MeshView("me", placement=place([PLAIN], [NodeCapacity("a", 8000)]))
    assert placed.model("m") == PLAIN


def test_weights_come_from_offers_first_then_from_spans() -> None:
    offer = msgspec.structs.replace
    whole = member("whole")
    whole = offer(whole, profile=offer(whole.profile, models=(PLAIN,)))
    late = offer(whole, id="late", state="suspect")
    mesh = view(member("part", (0, 4)), late, whole, member("idle"))
    mesh = offer(mesh, placement=place([PLAIN], [NodeCapacity("part", 8000)]))
    assert mesh.sources(PLAIN.manifest) == ("whole", "late", "part")


@pytest.mark.parametrize(
    ("members", "may_fail"),
    [
        ((member("a", (0, 8)), member("b", (0, 8), draining=True), member("c", (0, 8), state="suspect")), 0),
        ((member("a", (0, 8)), member("b", (0, 5)), member("c", (4, 8))), 1),
        ((member("a", (0, 8)), member("b", (0, 5)), member("c", (6, 8))), 0),  # is to hold layer 5, and loads it yet
        ((member("a", (0, 8)), member("b", (0, 4), (2, 8)), member("c", (0, 8))), 2),
        ((member("a", (0, 7)), member("b", (0, 7))), -1),
    ],
)
def test_survivability_counts_what_the_living_that_stay_have_loaded(
    members: tuple[MemberView, ...], may_fail: int
) -> None:
    placement = place([PLAIN], [NodeCapacity(name, 8000) for name in ("a", "b", "c")])
    assert msgspec.structs.replace(view(*members), placement=placement).survivability() == {"m": may_fail}


def test_capacities_for_the_coordinator() -> None:
    a = MemberView("a", "alive", NodeProfile(weight_bytes=5, flops=1.0, bandwidth=2.0, rtt_ms=3.0, draining=True))
    mesh = MeshView("a", (a, MemberView("b", "dead"), MemberView("c", "suspect")))
    assert mesh.capacities() == (NodeCapacity("a", 5, 1.0, 2.0, 0.0, "any", True), NodeCapacity("c", 0))


def test_machines_that_measure_nearly_alike_are_alike() -> None:
    """Half or twice the median is how busy they were; a tenth of it is another machine."""
    speeds = {"a": 9e9, "b": 20e9, "c": 10e9, "d": 4e9, "e": 1e9}
    members = tuple(MemberView(x, "alive", NodeProfile(flops=y, bandwidth=y)) for x, y in speeds.items())
    found = {capacity.id: capacity.bandwidth for capacity in MeshView("a", members).capacities()}
    assert found == dict.fromkeys("abcd", 2.0**33) | {"e": 2.0**30}


@pytest.mark.parametrize(
    ("measured", "compared"), [(0.0, 0.0), (1.0, 1.0), (1.4, 1.0), (1.5, 2.0), (90e9, 2.0**36), (0.3, 0.25)]
)
def test_noise_of_measurements_moves_no_layers(measured: float, compared: float) -> None:
    assert power_of_two(measured) == compared


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], ((0, 8),)),
        ([(0, 8)], ()),
        ([(2, 4), (1, 3)], ((0, 1), (4, 8))),
        ([(0, 2), (5, 9)], ((2, 5),)),
        ([(9, 12)], ((0, 8),)),
    ],
)
def test_gaps(spans: list[tuple[int, int]], expected: tuple[tuple[int, int], ...]) -> None:
    assert gaps([LayerSpan("m", a, b) for a, b in spans], 8) == expected


def test_views_are_values() -> None:
    with pytest.raises(AttributeError):
        view().me = "you"  # type: ignore[misc]
