import base64

import msgspec
import pytest

from mesh.errors import ConfigError
from mesh.types import MeshId, NodeId
from node.security import token as tokens
from node.security.token import JoinToken, mint

MESH, NODE = MeshId("1" * 32), NodeId("2" * 32)


def test_a_token_survives_copy_and_paste() -> None:
    token, _ = mint(MESH, ("10.0.0.1:9000", "[::1]:9001"), bytes(32), 0.0, created_by=NODE)
    text = token.encode()
    assert text.startswith("mesh1.")
    assert len(text) < 260
    assert JoinToken.decode(f"  {text}\n") == token


def test_the_record_holds_no_secret() -> None:
    token, kept = mint(MESH, ("a:1",), bytes(32), 100.0, uses=3, created_by=NODE)
    assert token.secret not in msgspec.msgpack.encode(kept)
    assert kept.secret_hash == tokens.verifier(token.secret) != token.secret
    assert kept.expires_unix_s == 100.0 + 86_400.0


def test_each_use_counts_and_each_end_has_its_word() -> None:
    _, kept = mint(MESH, ("a:1",), bytes(32), 100.0, ttl_s=10, uses=2, created_by=NODE)
    assert tokens.why_closed(kept, 109.0) == ""
    assert tokens.why_closed(kept, 110.0) == "expired"
    assert tokens.why_closed(tokens.used(tokens.used(kept)), 100.0) == "used_up"
    assert tokens.why_closed(tokens.revoked(kept), 100.0) == "revoked"
    _, endless = mint(MESH, ("a:1",), bytes(32), 100.0, uses=tokens.UNLIMITED, created_by=NODE)
    assert tokens.used(endless) == endless


def _text(value: object) -> str:
    return "mesh1." + base64.urlsafe_b64encode(msgspec.msgpack.encode(value)).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not a join token"),
        ("mesh2.AAAA", "not a join token"),
        ("mesh1." + "A" * 5000, "not a join token"),
        ("mesh1.", "damaged"),
        ("mesh1.!!!", "damaged"),
        ("mesh1.AAAA", "damaged"),
        (_text((MESH, ("a:1",), bytes(31), "id", bytes(32))), "damaged"),
        (_text((MESH, (), bytes(32), "id", bytes(32))), "damaged"),
        (_text((MESH, ("a:1",) * 99, bytes(32), "id", bytes(32))), "damaged"),
    ],
)
def test_bad_text_is_one_clear_line(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        JoinToken.decode(text)


@pytest.mark.parametrize("options", [{"ttl_s": 0}, {"uses": 0}, {"uses": -2}])
def test_a_token_that_nobody_could_use_is_not_made(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        mint(MESH, ("a:1",), bytes(32), 0.0, created_by=NODE, **options)
