"""Views for tests: a few members with spans, one line each."""

from __future__ import annotations

from mesh.types import LayerSpan, Load, ModelInfo, NodeProfile
from mesh.view import MemberView, MeshView
from tests.mesh.exhaustive import model

PLAIN = model(8, layer=1000, embed=0, head=0, hidden=0)


def member(name: str, *spans: tuple[int, int], state: str = "alive", **more: object) -> MemberView:
    """A member that holds ``spans`` of model ``m``, at 1 ms a layer; ``load`` as a dict, others are profile fields."""
    load = Load(**{"free_tokens": 1000, **more.pop("load", {})})  # type: ignore[dict-item]
    outer = {key: more.pop(key) for key in ("rtt_ms", "degraded") if key in more}
    profile = NodeProfile(
        name=f"name-{name}",
        spans=tuple(LayerSpan("m", a, b) for a, b in spans),
        load=load,
        bandwidth=float(more.pop("bandwidth", 1e6)),  # type: ignore[arg-type]
        flops=1e15,
        **more,  # type: ignore[arg-type]
    )
    return MemberView(name, state, profile, **outer)  # type: ignore[arg-type]


def view(*members: MemberView, me: str = "me", offered: ModelInfo = PLAIN) -> MeshView:
    """A view in which the node itself, which holds nothing, offers the model."""
    own = MemberView(me, "alive", NodeProfile(name="name-me", models=(offered,), role="entry"))
    return MeshView(me, (own, *members))
