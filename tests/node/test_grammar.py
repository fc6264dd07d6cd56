"""Masks against brute force: a token is allowed if and only if the text so far and it begin some valid text.

(Where only one text can follow, the library allows no odd spellings of it.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import RequestError
from node.api import structured
from node.text.grammar import Allowed, DeadEnd, Vocabularies, Vocabulary
from node.text.tokenizer import Tokenizer, load_tokenizer
from tests.fakes import make_tokenizer
from tests.tiny_models import write_tokenizer

DEMO = Path(__file__).parents[2] / "models" / "demo"


def schema(value: dict[str, Any]) -> str:
    return msgspec.json.encode({"grammars": [{"json_schema": value}]}).decode()


def lark(text: str) -> str:
    return msgspec.json.encode({"grammars": [{"lark_grammar": text}]}).decode()


def bits(mask: bytearray) -> set[int]:
    return {token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1}


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    """Nearly all single bytes, and nothing else."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        return load_tokenizer(Path(folder))


@pytest.fixture(scope="module")
def demo() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = load_tokenizer(DEMO)
    return tokenizer, Vocabulary(tokenizer)


# -- brute force: a language with few words, all of them written out ---------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (schema({"enum": ["red", "green", "grey", 12, None]}), ['"red"', '"green"', '"grey"', "12", "null"]),
        (
            schema({"type": "object", "properties": {"a": {"enum": [1, 12]}, "b": {"const": "é"}}, "required": ["b"],
                    "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}),
            ['{"b":"é"}', '{"a":1,"b":"é"}', '{"a":12,"b":"é"}'],
        ),
        (
            schema({"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 2,
                    "x-guidance": {"whitespace_flexible": False}}),
            [f"[{a}{b}]" for a in ("true", "false") for b in ("", ",true", ",false")],
        ),
        (lark("start: /(ab|abc|b{2,3})x?/"), ["ab", "abx", "abc", "abcx", "bb", "bbx", "bbb", "bbbx"]),
        (lark('start: "The" | "There" | "The quick"'), ["The", "There", "The quick"]),
        (lark('start: "日本" | "日光" | "𝄞"'), ["日本", "日光", "𝄞"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("words", ["bytes", "byte-level", "sentencepiece", "demo"])
def test_allowed_are_the_tokens_that_begin_a_valid_text(
    words: str, grammar: str, texts: list[str], small: Tokenizer, demo: tuple[Tokenizer, Vocabulary]
) -> None:
    kinds: dict[str, Callable[[], Tokenizer]] = {
        "bytes": lambda: small,
        "byte-level": make_tokenizer,
        "sentencepiece": lambda: make_tokenizer(byte_fallback=True),
        "demo": lambda: demo[0],
    }
    tokenizer = kinds[words]()
    spellings = {token: tokenizer.token_bytes(token) for token in range(tokenizer.size)}
    spellings = {t: b for t, b in spellings.items() if t not in tokenizer.special_ids and b != b"\xff"}
    whole = {text.encode() for text in texts}
    assert all(_can_spell(text, set(spellings.values())) for text in whole)
    vocabulary = Vocabulary(tokenizer)
    allowed, exactly = vocabulary.start(grammar), 0
    for so_far, drawn in _walk(whole, spellings):
        rest = [word[len(so_far) :] for word in whole if word.startswith(so_far)]
        expected = {t for t, b in spellings.items() if b and any(r.startswith(b) for r in rest)}
        if so_far in whole:
            expected |= set(tokenizer.eos_ids)
        found = bits(allowed.after(drawn))
        if (
            len({r[:1] for r in rest}) == 1 and so_far not in whole
        ):  # only one text can follow: it is spelled as the tokenizer would
            assert found, (so_far, drawn)
            assert found <= expected, (so_far, drawn)
        else:
            assert found == expected, (so_far, drawn)
            exactly += 1
        assert bits(vocabulary.start(grammar).after(drawn)) == found, "from the tokens alone"
    assert exactly >= 3


def _can_spell(text: bytes, pieces: set[bytes]) -> bool:
    reach = {0}
    for at in range(len(text)):
        if at in reach:
            reach |= {at + len(p) for p in pieces if p and text.startswith(p, at)}
    return len(text) in reach


def _walk(whole: set[bytes], spellings: dict[int, bytes]) -> Iterator[tuple[bytes, list[int]]]:
    """Every beginning of a text that tokens can spell and end, each by one spelling of it, mostly an odd one."""
    pieces = set(spellings.values())
    ends = {rest for word in whole for at in range(len(word) + 1) if _can_spell(rest := word[at:], pieces)}
    waiting, seen = [(b"", list[int]())], set[bytes]()
    while waiting:
        so_far, drawn = waiting.pop()
        if so_far in seen:
            continue
        seen.add(so_far)
        yield so_far, drawn
        rests = {word[len(so_far) :] for word in whole if word.startswith(so_far)}
        for token, piece in spellings.items():
            if piece and any(rest.startswith(piece) and rest[len(piece) :] in ends for rest in rests):
                waiting.append((so_far + piece, [*drawn, token]))


# -- a function of the tokens ------------------------------------------------------------------------------------------

PERSON = schema(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
        "required": ["name", "age"],
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(choices=st.lists(st.integers(0, 10_000), min_size=1, max_size=40), cuts=st.lists(st.integers(0, 40), max_size=5))
def test_a_state_cut_back_or_made_anew_gives_the_same_masks(
    demo: tuple[Tokenizer, Vocabulary], choices: list[int], cuts: list[int]
) -> None:
    tokenizer, vocabulary = demo
    running, drawn, seen = vocabulary.start(PERSON), [], []
    for choice in choices:
        mask = running.after(drawn)
        seen.append(bytes(mask))
        options = sorted(bits(mask) - set(tokenizer.eos_ids))
        if not options:
            break
        drawn = [*drawn, options[choice % len(options)]]
    for cut in [*cuts, 0, len(seen) - 1]:
        at = cut % len(seen)
        assert bytes(running.after(drawn[:at])) == seen[at], "cut back"
        assert bytes(vocabulary.start(PERSON).after(drawn[:at])) == seen[at], "from the tokens alone"


# -- ends --------------------------------------------------------------------------------------------------------------


def test_the_end_is_allowed_only_where_the_text_is_complete(demo: tuple[Tokenizer, Vocabulary]) -> None:
    tokenizer, vocabulary = demo
    allowed, eos = vocabulary.start(PERSON), set(tokenizer.eos_ids)
    text = tokenizer.encode('{"name": "Ann", "age": 7}', special=False)
    for n in range(len(text)):
        assert not bits(allowed.after(text[:n])) & eos
    assert bits(allowed.after(text)) == eos
    for repeat in range(2):
        with pytest.raises(DeadEnd, match="complete"):
            allowed.after([*text, tokenizer.eos_ids[0]])
        with pytest.raises(DeadEnd):
            allowed.after([*text, text[0]])
        assert bits(allowed.after(text)) == eos, repeat


def test_what_the_grammar_did_not_allow_is_a_dead_end_and_never_an_end(demo: tuple[Tokenizer, Vocabulary]) -> None:
    """The library itself answers with EOS alone once a token did not fit."""
    tokenizer, vocabulary = demo
    allowed = vocabulary.start(PERSON)
    wrong = tokenizer.encode("Kalt", special=False)
    for _ in range(2):
        with pytest.raises(DeadEnd):
            allowed.after(wrong)
    assert bits(allowed.after([]))


def test_a_text_that_the_vocabulary_cannot_spell_is_a_dead_end(small: Tokenizer) -> None:
    missing = next(c for c in map(chr, range(0xA1, 0x180)) if not _can_spell(c.encode(), _pieces(small)))
    allowed = Vocabulary(small).start(lark(f'start: "a{missing}b"'))
    begun = list(small.encode(f"a{missing}", special=False))[:2]
    assert bits(allowed.after(begun[:1])) == {begun[1]}
    with pytest.raises(DeadEnd, match="no token of the vocabulary"):
        allowed.after(begun)


def _pieces(tokenizer: Tokenizer) -> set[bytes]:
    return {tokenizer.token_bytes(t) for t in range(tokenizer.size) if t not in tokenizer.special_ids}


# -- a tool's schema inside that of a call -----------------------------------------------------------------------------

NODE = {"type": "object", "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}}}
NAMED = {"$defs": {"A": {"enum": ["red"]}}, "type": "object", "properties": {"a": {"$ref": "#/$defs/A"}}}


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize(
    ("parameters", "right", "wrong"),
    [
        (NODE, '{"v": 1, "kids": [{"v": 2, "kids": []}]}', '{"v": 1, "kids": [{"name"'),
        (NAMED, '{"a": "red"}', '{"a": "blue"'),
    ],
)
def test_references_of_a_tools_schema_stay_within_it(
    demo: tuple[Tokenizer, Vocabulary], parameters: dict[str, Any], right: str, wrong: str, others: int
) -> None:
    tokenizer, vocabulary = demo
    strict = msgspec.to_builtins([NODE, parameters][1 - others :])
    tools = [
        structured._Function(f"f{at}", {**p, "additionalProperties": False}, True, "") for at, p in enumerate(strict)
    ]
    allowed = vocabulary.start(structured._grammar(structured._call(tools)))
    head = f'{{"name": "f{others}", "arguments": '
    text = tokenizer.encode(f"{head}{right}}}", special=False)
    assert bits(allowed.after(text)) == set(tokenizer.eos_ids)
    with pytest.raises(DeadEnd):
        allowed.after(tokenizer.encode(head + wrong, special=False))


# -- what cannot be enforced -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        (schema({"type": "nonsense"}), "nonsense"),
        (schema({"type": "array", "uniqueItems": True}), "uniqueItems"),
        (schema({"type": "string", "pattern": "(a"}), "unclosed group"),
        (schema({"allOf": [{"type": "string"}, {"type": "integer"}]}), "Unsatisfiable"),
        (schema({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}), "allows no text"),
        (schema({"allOf": [{"anyOf": [{"properties": {i + j: {}}} for j in "abcd"]} for i in "abcdefghi"]}), "large"),
        ("not a grammar", "Expected"),
        ('{"grammars":[]}', "empty"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_enforced_is_refused_and_says_why(
    demo: tuple[Tokenizer, Vocabulary], grammar: str, why: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(why)) as refused:
        demo[1].start(grammar)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 400


def test_a_tokenizer_of_another_kind_is_refused_by_name() -> None:
    from tokenizers import Tokenizer as Rust
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Rust(WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(RequestError, match="BPE-type"):
        Vocabulary(Tokenizer(words, (1,)))


def test_a_vocabulary_is_built_once_for_a_folder(small: Tokenizer) -> None:
    loaded: list[Path] = []

    def load(folder: Path) -> Tokenizer:
        loaded.append(folder)
        return small

    found = Vocabularies(load)
    first = found.get(Path("a"))
    assert found.get(Path("a")) is first
    assert found.get(Path("b"), small) is not first
    assert loaded == [Path("a")]
    assert isinstance(first.start(PERSON), Allowed)
