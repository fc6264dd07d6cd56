"""The error tree: whose fault, is the outcome certain, and what the API answers.

MeshError                the root; never raised itself
├ PeerError              the other side broke the protocol: count it, drop the message (never shown to a client)
├ PeerUnreachable        the other side did not answer: whether it acted is not certain
├ CapacityError          full, and certainly nothing was started: 429 with Retry-After
├ NoRoute                no live nodes cover some layers: 503 with Retry-After, names the layers
├ WeightsError (node.weights)  weights could not be brought or kept: 503, says how much and why
├ NotKept (node.durable) a request that has to be on disk is not: 503, ask another
├ Leaving                this node takes no new work, or stopped in the middle of it: 503, ask another
├ StalePlacement         work carried an older placement id than this node has active: re-route, certain
├ SessionLost            a running session could not be recovered: error event, says how far it got
├ RequestError           the caller's fault: 400 (or its own status) with an OpenAI error body
└ ConfigError            a setting is wrong: exit 2, names the field

A bug is an AssertionError: the process stops and the mesh carries on without it.
"""

from __future__ import annotations


class MeshError(Exception):
    """Root of the tree."""

    status = 500
    code = "internal_error"
    kind = "server_error"
    retry_after_s: float | None = None
    param: str | None = None


class PeerError(MeshError):
    """A peer sent something that no honest peer of this version sends."""


class PeerUnreachable(MeshError):
    """No connection, or no answer in time; what was asked may or may not have happened."""

    status = 503
    code = "peer_unreachable"
    retry_after_s = 1.0


class CapacityError(MeshError):
    """No room now; certainly nothing was started."""

    status = 429
    code = "rate_limit_exceeded"
    kind = "rate_limit_error"

    def __init__(self, message: str, retry_after_s: float = 1.0, lacking: int = 0) -> None:
        """``lacking``: bytes of keys and values that would have to be freed; 0: not known, or of no use."""
        super().__init__(message)
        self.retry_after_s, self.lacking = retry_after_s, lacking


class NoRoute(MeshError):
    """No live nodes cover layers [start, end) of a model."""

    status = 503
    code = "no_route"
    retry_after_s = 2.0


class Leaving(MeshError):
    """This node drains and leaves."""

    status = 503
    code = "leaving"
    retry_after_s = 1.0


class StalePlacement(MeshError):
    """The placement id named is older than the active one."""

    status = 503
    code = "stale_placement"
    retry_after_s = 1.0


class SessionLost(MeshError):
    """A running session ended without being complete; the message says how far it got."""

    status = 503
    code = "session_lost"


class RequestError(MeshError):
    """The caller's fault.  ``param`` names the field, ``code`` is OpenAI's where there is one."""

    status = 400
    kind = "invalid_request_error"

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


class ConfigError(MeshError):
    """A setting is wrong or the node cannot start with it; the message names it and what to do."""
