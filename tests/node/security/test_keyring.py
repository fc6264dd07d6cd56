import itertools
import os

import pytest

from mesh.errors import PeerError
from mesh.types import MeshId, NodeId
from node.security.keyring import MAX_DATAGRAM, MAX_MESSAGE, KeyRing, Stale, new_gossip_key

MESH, NODE = MeshId("1" * 32), NodeId("ab" * 16)
NOW = 1_800_000_000.0


def test_a_datagram_says_who_and_what() -> None:
    ring = KeyRing(MESH, [new_gossip_key()])
    assert ring.open(ring.seal(NODE, b"ping", NOW), NOW) == (NODE, b"ping")
    assert ring.seal(NODE, b"ping", NOW) != ring.seal(NODE, b"ping", NOW)
    assert len(ring.seal(NODE, bytes(MAX_MESSAGE), NOW)) == MAX_DATAGRAM
    with pytest.raises(ValueError, match="do not fit"):
        ring.seal(NODE, bytes(MAX_MESSAGE + 1), NOW)


def test_nothing_else_opens() -> None:
    key = new_gossip_key()
    ring = KeyRing(MESH, [key])
    sealed = ring.seal(NODE, b"ping", NOW)
    changed = [sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :] for i in range(len(sealed))]
    foreign = KeyRing(MeshId("2" * 32), [key]).seal(NODE, b"ping", NOW)
    other = KeyRing(MESH, [key[:1] + os.urandom(32)]).seal(NODE, b"ping", NOW)
    for bad in (b"", sealed[:-1], sealed + b"x", bytes(2000), os.urandom(200), foreign, other, *changed):
        with pytest.raises(PeerError):
            ring.open(bad, NOW)


def test_an_old_datagram_is_a_replay() -> None:
    ring = KeyRing(MESH, [new_gossip_key()])
    sealed = ring.seal(NODE, b"ping", NOW)
    ring.open(sealed, NOW + 599)
    for later in (601.0, -601.0):
        with pytest.raises(Stale):
            ring.open(sealed, NOW + later)


def test_a_rotation_loses_no_datagram() -> None:
    old = new_gossip_key()
    new = new_gossip_key((old,))
    assert old[0] != new[0]
    steps = [(old,), (old, new), (new, old), (new,)]
    for before, after in itertools.pairwise(steps):
        a, b = KeyRing(MESH, before), KeyRing(MESH, after)
        assert b.open(a.seal(NODE, b"x", NOW), NOW) == a.open(b.seal(NODE, b"x", NOW), NOW)
    a.set_keys((new,))
    with pytest.raises(PeerError, match="unknown key"):
        a.open(KeyRing(MESH, (old,)).seal(NODE, b"x", NOW), NOW)


@pytest.mark.parametrize("keys", [[], [b"short"], [bytes(33), bytes(33)]])
def test_a_malformed_ring_is_refused(keys: list[bytes]) -> None:
    with pytest.raises(PeerError):
        KeyRing(MESH, keys)
