"""The weather as values: faults, and the habits of a network.  A schedule of faults prints, and replays."""

from __future__ import annotations

from typing import Literal

import msgspec

FaultKind = Literal[
    "crash",  # kill -9: peers see their connections reset;  other=("silent",): power cut, they see nothing
    "crash_mid",  # the same, in the middle of the effects of the node's next step
    "restart",  # with its disk
    "wipe",  # restart without its disk
    "pause",  # SIGSTOP: messages wait in the inbox, no ticks
    "resume",
    "partition",  # no messages between `nodes` and `other` (empty: everyone else)
    "cut",  # one way: from `nodes` to `other` (empty: everyone else)
    "flap",  # a cut that is there for `value` seconds, gone for as long, and so on
    "heal",  # all partitions, cuts, flaps and losses end; with `nodes` only cuts and flaps that began there
    "loss",  # probability `value` on all messages to and from `nodes` (empty: on every message)
    "slow",  # `value` seconds more on every message to and from `nodes`
    "uplink",  # `nodes` send at most `value` bytes a second (0: as much as they like); what waits too long is dropped
    "busy",  # every step of `nodes` takes `value` seconds; what arrives meanwhile waits
    "fsync",  # a record is durable only `value` seconds later, while the node waits; a crash meanwhile may lose it
    "lies",  # the next crash of `nodes` loses the last `value` records, though the disk had said that they are durable
    "leave",  # `nodes` are to go: what they do is their core's; mostly a crash follows
    "drift",  # the clocks of `nodes` run at `value` x real time from now on
]
Delay = Literal["exponential", "uniform", "pareto"]


class Fault(msgspec.Struct, frozen=True):
    """One act of the weather.  A schedule is a list of them: it prints, and replays."""

    at: float
    kind: FaultKind
    nodes: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    value: float = 0.0


class NetParams(msgspec.Struct, frozen=True):
    """The network's habits.  One-way delay = base_s + jitter_s x a draw of mean 1, in s; the rest are probabilities."""

    base_s: float = 0.0002
    jitter_s: float = 0.0003
    delay: Delay = "exponential"
    """``pareto`` (shape 1.5) has a heavy tail: one in a thousand is 33 times the mean."""
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    reorder_s: float = 0.05
    """A reordered message is up to this much later than the others."""
    retransmit_s: float = 0.2
    """What one lost segment costs a reliable message."""
    reset_s: float = 0.0
    """A peer's crash is noticed up to this much later than its connection ends: connecting anew must fail first."""
    inbox: int = 1024
    """Messages that wait for a paused or busy node (a socket buffer); more are dropped."""
    queue_s: float = 1.0
    """What a limited uplink holds back at most, as time to send it; more is dropped."""
