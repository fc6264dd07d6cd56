"""The ``/mesh/status`` document: what this node believes, as JSON."""

from __future__ import annotations

from typing import Any

from mesh.pipeline.events import State
from mesh.types import LayerSpan, NodeProfile, Priority
from mesh.view import MemberView, MeshView
from node.advice import failover_gap
from node.generation import LiveGeneration


def status_document(
    view: MeshView,
    *,
    mesh_id: str,
    name: str,
    voters: tuple[str, ...],
    epoch: int,
    version: int,
    term: int,
    sessions: list[LiveGeneration],
    waiting: dict[Priority, int],
    limits: dict[Priority, int],
    addresses: dict[str, str],
    checkpoints: dict[str, int],
) -> dict[str, Any]:
    """Names as in docs/protocol.md; ``placement.term`` and ``version`` are those of the committed record.
    ``checkpoints``: of this node alone."""
    paused = sum(generation.session.state is State.PAUSED for generation in sessions)
    living = {member.id for member in view.members if member.present}
    return {
        "mesh_id": mesh_id,
        "node_id": view.me,
        "name": name,
        "coordinator": view.coordinator,
        "term": view.term,
        "voters": list(voters),
        "degraded": view.degraded or None,
        "failover": failover_gap(len(voters), len(living.intersection(voters)), len(living)) or None,
        "members": [_member(member, addresses.get(member.id, "")) for member in view.members],
        "placement": {
            "id": [epoch, view.placement_id[1]],
            "term": term,
            "version": version,
            "models": [
                {
                    "id": entry.model.id,
                    "layers": entry.model.n_layers,
                    "dtype": entry.model.dtype,
                    "quantize": entry.model.quantize or None,
                    "missing": entry.missing or None,
                    "spans": [{"node": a.node, "start": a.span.start, "end": a.span.end} for a in entry.spans],
                }
                for entry in view.placement.models
            ],
        },
        "survivability": {model: {"nodes_that_may_fail": max(0, n)} for model, n in view.survivability().items()},
        "sessions": {
            "running": len(sessions) - paused,
            "paused": paused,
            "waiting": sum(waiting.values()),
            "classes": {each: {"waiting": waiting[each], "limit": limits[each]} for each in waiting},
            "items": [_session(generation) for generation in sessions],
        },
        "checkpoints": checkpoints,
    }


def _member(member: MemberView, address: str) -> dict[str, Any]:
    profile = member.profile
    return {
        "id": member.id,
        "name": profile.name or member.id[:8],
        "state": member.state,
        "degraded": member.degraded,
        "draining": profile.draining,
        "role": profile.role,
        "api": profile.api,
        "peer": address or profile.peer,
        "hardware": profile.hardware,
        "exact": profile.exact,
        "memory_bytes": profile.memory_bytes,
        "weight_bytes": profile.weight_bytes,
        "rtt_ms": round(member.rtt_ms, 3),
        "spans": [_span(span) for span in profile.spans],
        "loading": [_span(span) for span in profile.loading],
        "fetched": profile.fetched,
        "refused": list(profile.refused),
        "load": _load(profile),
    }


def _span(span: LayerSpan) -> dict[str, Any]:
    return {"model": span.model, "start": span.start, "end": span.end}


def _load(profile: NodeProfile) -> dict[str, Any]:
    load = profile.load
    return {
        "running": load.running,
        "waiting": load.waiting,
        "free_tokens": load.free_tokens,
        "tokens_per_s": round(load.tokens_per_s, 1),
        "step_ms": round(load.step_ms, 2),
        "lag_ms": round(load.lag_ms, 1),
    }


def _session(generation: LiveGeneration) -> dict[str, Any]:
    session, route = generation.session, generation.session.route
    return {
        "id": session.id,
        "model": session.request.model,
        "class": session.request.priority,
        "state": session.state.value,
        "waits_for": session.waits_for or None,
        "entry": session.me,
        "route": [{"node": hop.node, "start": hop.start, "end": hop.end} for hop in route.hops] if route else [],
        "tokens": len(session.drawn),
        "recoveries": [
            {
                "cause": trace.cause,
                "hop": trace.hop,
                "detected_by": trace.detected_by,
                "pause_ms": trace.pause_ms,
                "positions_replayed": trace.positions_replayed,
                "exact": trace.exact,
            }
            for trace in generation.recoveries
        ],
    }
