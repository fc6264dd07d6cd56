import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from mesh.errors import PeerError
from mesh.types import MeshId, NodeId
from node.identity import Identity
from node.security.admission import found_membership
from node.security.ca import (
    CLOCK_SKEW_S,
    LEAF_LIFE_S,
    Authority,
    check_host,
    check_issued,
    load_certificate,
    load_csr,
    make_csr,
    new_leaf_key,
    parse_uris,
    subject_of,
)
from node.security.membership import Membership

MESH = MeshId("0123456789abcdef" * 2)
NODE = NodeId("ab" * 16)
NOW = 1_800_000_000.0


def leaf_of(authority: Authority, hosts: tuple[str, ...] = (), now: float = NOW) -> x509.Certificate:
    return load_certificate(authority.issue(make_csr(new_leaf_key()), NODE, hosts, now))


def test_a_leaf_names_its_node_and_its_hosts() -> None:
    authority = Authority.found(MESH, NOW)
    leaf = leaf_of(authority, ("Example.org.", "192.0.2.7", "2001:db8::1"))
    subject = subject_of(leaf)
    assert (subject.mesh_id, subject.node_id) == (MESH, NODE)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", "example.org"} < set(names.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "192.0.2.7", "2001:db8::1"} < {str(a) for a in names.get_values_for_type(x509.IPAddress)}
    check_issued(leaf, load_certificate(authority.der))
    with pytest.raises(PeerError):
        check_issued(leaf, load_certificate(Authority.found(MESH, NOW).der))


def test_a_leaf_lives_seven_days_and_is_renewed_at_half() -> None:
    membership = found_membership(Identity.generate(), Authority.found(MESH, NOW), (), NOW)
    assert membership.expires == NOW + LEAF_LIFE_S
    assert membership.renew_at == NOW + (LEAF_LIFE_S - CLOCK_SKEW_S) / 2
    assert load_certificate(membership.leaf).not_valid_before_utc.timestamp() == NOW - CLOCK_SKEW_S


@pytest.mark.parametrize(
    "host",
    [
        *("", "*", "*.example.org", "a b", "-a", "a..b", "x" * 64, "a/b", "murmur.internal", "\0"),
        f"{MESH}.murmur.internal",
        f"{'cd' * 16}.{MESH}.murmur.internal",
        f"{'cd' * 16}.{MESH}.MURMUR.internal.",
    ],
)
def test_no_node_can_have_the_name_of_another(host: str) -> None:
    with pytest.raises(PeerError):
        check_host(host)
    with pytest.raises(PeerError):
        leaf_of(Authority.found(MESH, NOW), (host,))


def test_the_request_decides_nothing_but_the_key() -> None:
    authority, key = Authority.found(MESH, NOW), new_leaf_key()
    claims = x509.SubjectAlternativeName(
        [x509.DNSName("bank.example"), x509.UniformResourceIdentifier("spiffe://x/node/y")]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(claims, False)
    csr = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    leaf = load_certificate(authority.issue(csr, NODE, (), NOW))
    assert subject_of(leaf).node_id == NODE
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert "bank.example" not in names.get_values_for_type(x509.DNSName)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_bad_requests_are_refused() -> None:
    good = make_csr(new_leaf_key())
    other_curve = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ec.generate_private_key(ec.SECP384R1()), hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    for csr in (b"", b"junk", good[:-1] + bytes([good[-1] ^ 1]), good + bytes(5000), other_curve):
        with pytest.raises(PeerError):
            load_csr(csr)


@pytest.mark.parametrize(
    "uris",
    [
        [],
        ["https://example.org"],
        [f"spiffe://{MESH}/node/{NODE}", f"spiffe://{MESH}/node/{NODE}"],
        [f"spiffe://{MESH}/node/{NODE}/more"],
        [f"spiffe://{MESH}/person/{NODE}"],
        [f"spiffe://{MESH}/node/../{NODE}"],
        [f"spiffe://{MESH}/node/{NODE.upper()}"],
        ["spiffe://short/node/short"],
    ],
)
def test_a_certificate_names_exactly_one_node(uris: list[str]) -> None:
    with pytest.raises(PeerError):
        parse_uris(uris)


def test_the_ca_travels_sealed_to_one_node() -> None:
    authority, voter, other = Authority.found(MESH, NOW), Identity.generate(), Identity.generate()
    sealed = authority.sealed_to(voter.node_id, voter.seal_key)
    opened = Authority.unsealed(voter, MESH, sealed)
    assert opened.der == authority.der
    check_issued(leaf_of(opened), load_certificate(authority.der))
    with pytest.raises(PeerError):
        Authority.unsealed(other, MESH, sealed)
    with pytest.raises(PeerError):
        Authority.unsealed(voter, MeshId("f" * 32), sealed)
    with pytest.raises(PeerError, match="not signed by it"):
        authority.sealed_to(voter.node_id, other.seal_key)


def test_a_membership_file_holds_together() -> None:
    authority = Authority.found(MESH, time.time())
    membership = found_membership(Identity.generate(), authority, (), time.time())
    pem = membership.to_pem()
    assert Membership.from_pem(pem) == membership
    other = found_membership(Identity.generate(), authority, (), time.time()).to_pem()
    key = b"-----BEGIN PRIVATE KEY"
    for damaged in (b"", pem[: pem.index(key)], pem[: len(pem) // 2], pem.split(key)[0] + key + other.split(key)[1]):
        with pytest.raises(ValueError):
            Membership.from_pem(damaged)
