import hashlib

import pytest

from mesh.errors import PeerError
from mesh.types import NodeId
from node.identity import Identity, SealKey, node_id_of, verifier, verify, verify_seal_key
from node.security.seal import seal


def test_the_id_is_the_hash_of_the_public_key() -> None:
    identity = Identity.generate()
    assert identity.node_id == hashlib.sha256(identity.public_key).hexdigest()[:32] == node_id_of(identity.public_key)
    assert Identity.from_secrets(*identity.secrets()).node_id == identity.node_id


def test_only_the_node_itself_speaks_for_itself() -> None:
    a, b = Identity.generate(), Identity.generate()
    signed = a.signer("member")(b"alive 7")
    check = verifier("member")
    assert check(a.node_id, b"alive 7", signed)
    assert not check(b.node_id, b"alive 7", signed)
    assert not check(a.node_id, b"alive 8", signed)
    assert not check(a.node_id, b"alive 7", signed[:-1] + bytes([signed[-1] ^ 1]))
    assert not check(a.node_id, b"alive 7", b.sign("member", b"alive 7"))
    assert not check(a.node_id, b"alive 7", a.public_key + b.sign("member", b"alive 7")[32:])


@pytest.mark.parametrize("signed", [b"", b"x" * 95, b"x" * 96, b"x" * 97, bytes(96)])
def test_malformed_signatures_are_false_and_not_an_error(signed: bytes) -> None:
    assert not verify(NodeId("0" * 32), "member", b"", signed)
    assert not verify(node_id_of(signed[:32]), "member", b"", signed)


def test_a_signature_is_for_one_purpose() -> None:
    identity = Identity.generate()
    assert not verify(identity.node_id, "profile", b"x", identity.sign("member", b"x"))
    assert not verify(identity.node_id, "a", b"b\0c", identity.sign("a\0b", b"c")) or "\0" in "a\0b"


def test_the_seal_key_is_bound_to_the_identity() -> None:
    a, b = Identity.generate(), Identity.generate()
    assert verify_seal_key(a.node_id, a.seal_key)
    assert not verify_seal_key(b.node_id, a.seal_key)
    assert not verify_seal_key(a.node_id, SealKey(b.seal_key.public, a.seal_key.signed))


def test_sealed_bytes_open_for_one_key_and_one_purpose() -> None:
    a, b = Identity.generate(), Identity.generate()
    sealed = seal(a.seal_key.public, b"the CA's key", b"mesh 1")
    assert a.unseal(sealed, b"mesh 1") == b"the CA's key"
    for opener, text, aad in (
        (b, sealed, b"mesh 1"),
        (a, sealed, b"mesh 2"),
        (a, sealed[:-1], b"mesh 1"),
        (a, b"", b""),
    ):
        with pytest.raises(PeerError):
            opener.unseal(text, aad)
    with pytest.raises(PeerError):
        seal(bytes(32), b"to a point of low order", b"")
    assert seal(a.seal_key.public, b"x", b"") != seal(a.seal_key.public, b"x", b"")
