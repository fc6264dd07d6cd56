import pytest

from node.security.keys import bearer, find_api_key, is_admin_key, new_admin_key, new_api_key


def test_an_api_key_is_found_by_its_text_alone() -> None:
    key, record = new_api_key("infer", "laptop")
    other, second = new_api_key("admin", expires_unix_s=100.0)
    assert key.startswith("mk-")
    assert key.encode() not in record.hash
    assert find_api_key((record, second), key, 1e12) is record
    assert find_api_key((record, second), other, 99.0) is second
    assert find_api_key((record, second), other, 100.0) is None


@pytest.mark.parametrize("text", ["", "mk-", "mk-nope", "mka-admin", "mk-" + "x" * 10_000, "mk-\u00e9"])
def test_other_text_finds_nothing(text: str) -> None:
    _, record = new_api_key("infer")
    assert find_api_key((record,), text, 0.0) is None
    assert find_api_key((), text, 0.0) is None


def test_the_admin_key() -> None:
    key = new_admin_key()
    assert key.startswith("mka-")
    assert is_admin_key(key, key)
    for wrong in ("", key[:-1], key + "x", new_admin_key(), "\u00e9"):
        assert not is_admin_key(wrong, key)


@pytest.mark.parametrize(
    ("header", "key"),
    [(None, ""), ("", ""), ("Bearer mk-1", "mk-1"), ("bearer  mk-1 ", "mk-1"), ("Basic x", ""), ("mk-1", "")],
)
def test_bearer(header: str | None, key: str) -> None:
    assert bearer(header) == key
