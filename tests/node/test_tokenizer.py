"""Tokenizers, text from tokens, stop strings."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from pathlib import Path

import pytest

from mesh.errors import ConfigError, RequestError
from mesh.types import ModelId
from node.text.detokenize import UNFINISHED, ChoiceText, Detokenizer, StopStrings, certain
from node.text.tokenizer import (
    LONG_AT_ONCE,
    Tokenizer,
    Tokenizers,
    encode_off_loop,
    eos_ids,
    load_tokenizer,
    off_loop,
)
from tests.fakes import make_tokenizer

TEXT = "Hello wörld 😀 日本語 naïve   spaces\n\ttabs — “q” é́ 👩\u200d👩\u200d👧 the lazy dog"


@pytest.fixture(params=["byte-level", "byte-fallback"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return make_tokenizer(byte_fallback=request.param == "byte-fallback")


def test_pieces_join_to_the_text_and_never_show_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, special=False)
    for cut in range(len(ids)):
        head = tokenizer.decode(ids[:cut])
        if head.endswith("\ufffd"):
            continue
        detokenizer = Detokenizer(tokenizer, ids[:cut])
        pieces = [detokenizer.push(token) for token in ids[cut:]]
        assert "".join(pieces) == TEXT[len(head) :], f"after {cut} tokens of prompt"
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_text_needs_at_least_its_length_in_longest_words(tokenizer: Tokenizer) -> None:
    longest = max(tokenizer._hf.get_vocab(), key=len)
    for text in (TEXT, longest * 50, "the " * 99, "日本" * 40, "x", ""):
        assert tokenizer.least(text) <= len(tokenizer.encode(text, special=False)), text
    assert tokenizer.least("x" * 100 * len(longest)) == 100


async def test_a_long_text_does_not_hold_up_the_event_loop() -> None:
    tokenizer, worst = make_tokenizer(), 0.0
    task = asyncio.ensure_future(encode_off_loop(tokenizer, "a b " * 150_000, special=False))
    began = last = time.monotonic()
    while not task.done():
        await asyncio.sleep(0.001)
        worst, last = max(worst, time.monotonic() - last), time.monotonic()
    assert len(task.result()) > 100_000
    assert worst < (last - began) / 2, "the loop turned while it was encoded"


async def test_few_long_texts_are_in_work_at_a_time() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    await asyncio.gather(*(off_loop(True, work) for _ in range(8)))
    assert most <= LONG_AT_ONCE


def test_a_prompt_cut_within_a_character_is_completed() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("a 😀 b", special=False)
    detokenizer = Detokenizer(tokenizer, ids[:4])
    assert "".join(map(detokenizer.push, ids[4:])) == "😀 b"


def test_random_tokens_give_what_one_decode_gives() -> None:
    """Broken bytes included, but for the last ones, which may still become a character."""
    tokenizer, rng = make_tokenizer(), random.Random(5)
    for _ in range(50):
        ids = [rng.randrange(9, 300) for _ in range(120)]
        detokenizer = Detokenizer(tokenizer)
        shown = "".join(map(detokenizer.push, ids))
        whole = tokenizer.decode(ids)
        assert whole.startswith(shown)
        assert len(whole) - len(shown) <= 3 * UNFINISHED


def test_endless_broken_bytes_keep_the_window_short() -> None:
    tokenizer = make_tokenizer()
    (broken,) = (t for t in range(tokenizer.size) if tokenizer.token_bytes(t) == b"\x80")
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(broken) for _ in range(1_000))
    assert set(shown) == {"\ufffd"}
    assert len(shown) >= 990
    assert len(detokenizer._window) < 100


def test_special_tokens_are_not_text(tokenizer: Tokenizer) -> None:
    ids = [2, *tokenizer.encode("Hi", special=False), 6, *tokenizer.encode(" you", special=False)]
    detokenizer = Detokenizer(tokenizer, [4])
    assert "".join(map(detokenizer.push, ids)).split() == ["Hi", "you"]


@pytest.mark.parametrize(
    ("text", "end"), [("", 0), ("ab", 2), ("ab\ufffd", 2), ("ab\ufffd\ufffd\ufffd\ufffd", 3), ("\ufffda", 2)]
)
def test_certain(text: str, end: int) -> None:
    assert certain(text) == end


def test_token_bytes_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, special=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip(" ") == TEXT
    assert tokenizer.token_bytes(1) == b"</s>"
    assert tokenizer.token_bytes(10**6) == b""


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        ([], "abc", "abc", None),
        (["STOP"], "go STO then STOP never", "go STO then ", "STOP"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["bc", "abcd"], "xabcd", "xa", "bc"),
        (["c", "abc"], "xabc", "x", "abc"),
        (["aab"], "aaab", "a", "aab"),
        (["xyz"], "ends with xy", "ends with xy", None),
        (["a"], "a", "", "a"),
    ],
)
def test_stop_strings_however_the_text_is_cut(stops: list[str], text: str, shown: str, matched: str | None) -> None:
    for seed in range(20):
        rng, found, out, at = random.Random(seed), StopStrings(stops), "", 0
        while at < len(text) and found.matched is None:
            size = rng.randint(1, 4)
            out += found.push(text[at : at + size])
            assert shown.startswith(out), "nothing of a stop string is ever shown"
            at += size
        assert out + (found.flush() if found.matched is None else "") == shown
        assert found.matched == matched


def choice(text: str, **settings: object) -> tuple[str, ChoiceText]:
    tokenizer = make_tokenizer()
    state = ChoiceText(tokenizer, [], **settings)  # type: ignore[arg-type]
    shown = ""
    for token in [*tokenizer.encode(text, special=False), 1]:
        shown += state.push(token)
        if state.finish is not None:
            return shown, state
    return shown + state.end(), state


def test_a_choice_ends_at_its_stop_token_or_string() -> None:
    shown, state = choice("one two three", stop_ids=[1])
    assert (shown, state.finish, state.offset) == ("one two three", "stop", 13)
    shown, state = choice("one two three", stops=[" th"], stop_ids=[1])
    assert (shown, state.finish, state.offset) == ("one two", "stop", 7)
    shown, state = choice("one two th", stops=["three"])
    assert (shown, state.finish) == ("one two th", None)


def test_nothing_stops_a_choice_before_its_least_tokens() -> None:
    shown, _ = choice("one two three one two", stops=["one"], min_tokens=2)
    assert shown.startswith("one two")
    assert shown.count("one") == 1


def test_text_is_rebuilt_from_the_tokens_alone() -> None:
    """What an adopting node does with the journal: same text, same offset, and on from there."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(TEXT + " STO STOP tail", special=False)
    for cut in range(len(ids)):
        one, other = (ChoiceText(tokenizer, [3, 4], stops=["STOP"]) for _ in range(2))
        first = feed(one, ids[:cut])
        assert feed(other, ids[:cut]) == first
        assert one.offset == len(first)
        assert feed(one, ids[cut:]) == feed(other, ids[cut:])


def feed(state: ChoiceText, ids: list[int]) -> str:
    return "".join(state.push(token) for token in ids if state.finish is None)


def test_a_folder_loads(tmp_path: Path) -> None:
    make_tokenizer()._hf.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 6]}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(TEXT) == make_tokenizer().encode(TEXT)
    assert loaded.eos_ids == (1, 6)
    assert loaded.chat([{"role": "user", "content": "Hi"}]) == "<|user|>Hi<|end|><|assistant|>"


def test_the_demo_models_tokenizer() -> None:
    folder = Path(__file__).parents[2] / "models" / "demo"
    if not (folder / "tokenizer.json").exists():
        pytest.skip("the demo model is not here")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.has_chat_template
    assert tokenizer.eos_ids
    for text in ("Mila lives in Oslo. Where does Mila live?", TEXT):
        ids = tokenizer.encode(text, special=False)
        detokenizer = Detokenizer(tokenizer, ids[:1])
        assert tokenizer.decode(ids[:1]) + "".join(map(detokenizer.push, ids[1:])) == tokenizer.decode(ids)
    text = tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert "Be brief." in text
    assert "Hi" in text


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "tokenizer_eos", "expected"),
    [({}, 2, (2,)), ({}, None, ()), ({"config.json": {"eos_token_id": 5}}, 2, (5, 2)),
     ({"generation_config.json": {"eos_token_id": [7, 8]}, "config.json": {"eos_token_id": 5}}, 7, (7, 8)),
     ({"generation_config.json": {}, "config.json": {"eos_token_id": 5}}, None, (5,))],
)  # fmt: skip
def test_eos_ids(
    tmp_path: Path, files: dict[str, object], tokenizer_eos: int | None, expected: tuple[int, ...]
) -> None:
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert eos_ids(tmp_path, tokenizer_eos) == expected


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        eos_ids(tmp_path, 1)


def test_a_template_that_refuses_is_the_callers_fault() -> None:
    with pytest.raises(RequestError, match="bad role"):
        make_tokenizer().chat([{"role": "wizard", "content": "x"}])


async def test_tokenizers_load_once_and_again_after_a_failure() -> None:
    loads, fail = [], [True]

    def load(folder: Path) -> Tokenizer:
        loads.append(folder)
        if fail.pop() if fail else False:
            raise ConfigError("not yet")
        return make_tokenizer()

    tokenizers = Tokenizers(load)
    with pytest.raises(ConfigError):
        await tokenizers.get(ModelId("m"), Path("a"))
    found = await asyncio.gather(*(tokenizers.get(ModelId("m"), Path("a")) for _ in range(5)))
    assert len(set(map(id, found))) == 1
    assert len(loads) == 2
    tokenizers.forget(ModelId("m"))
    await tokenizers.get(ModelId("m"), Path("a"))
    assert len(loads) == 3
