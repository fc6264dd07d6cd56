"""Tool calls out of text: the same pieces however the text was cut, and text that is no call is shown."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from node.api.calls import CallPiece, CallReader, ToolMode, call_id, joined_calls

NAMES = ("weather", "say")
ARGUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab"\\{}[]<>é\n/', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def read(text: str, mode: ToolMode, size: int = 10_000) -> tuple[str, list[CallPiece]]:
    """Shown text and whole calls of ``text`` in pieces of ``size`` characters."""
    reader, shown, pieces = CallReader(mode, NAMES, "s"), "", []
    for at in range(0, len(text), size):
        more, found = reader.push(text[at : at + size])
        shown, pieces = shown + more, pieces + found
    more, found = reader.end()
    return shown + more, joined_calls([*pieces, *found])


def said(calls: list[CallPiece]) -> list[tuple[int, str, str]]:
    assert [call.id for call in calls] == [call_id("s", at) for at in range(len(calls))]
    return [(call.index, call.name, call.arguments) for call in calls]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    arguments=st.dictionaries(st.text(max_size=5), ARGUMENTS, max_size=4), size=st.integers(1, 12), indent=st.booleans()
)
def test_a_forced_call(arguments: dict[str, object], size: int, indent: bool) -> None:
    literal = json.dumps(arguments, indent=2 if indent else None, ensure_ascii=False)
    text = f'{{ "name" : "weather",\n "arguments": {literal} }}'
    for mode in ("required", "named"):
        shown, calls = read(text, mode, size)
        assert (shown, said(calls)) == ("", [(0, "weather", literal)])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arguments=st.dictionaries(st.text(max_size=5), ARGUMENTS, max_size=4), size=st.integers(1, 30))
def test_calls_of_the_models_own_choice(arguments: dict[str, object], size: int) -> None:
    literal = json.dumps(arguments, ensure_ascii=False)
    text = (
        f'I look: 3 < 4 <tool_call>\n{{"name": "weather", "arguments": {literal}}}\n</tool_call>'
        '\n<tool_call>{"arguments": {"a": 1}, "name": "unheard"}</tool_call><tool_call>nonsense</tool_call>'
        '<tool_call>{"name": "say", "arguments": {}}</tool_call> <tool_'
    )
    if "</tool_call>" in literal:
        return
    shown, calls = read(text, "auto", size)
    assert shown == "I look: 3 < 4 \n<tool_call>nonsense</tool_call> <tool_"
    assert said(calls) == [(0, "weather", literal), (1, "unheard", '{"a":1}'), (2, "say", "{}")]


@pytest.mark.parametrize(
    ("text", "mode", "shown", "calls"),
    [
        ('{"name": "weather", "arguments": {"a": "x', "named", "", [(0, "weather", '{"a": "x')]),
        ('{"name": "weat', "named", '{"name": "weat', []),
        ('{"name": "weather", "arguments": ', "required", '{"name": "weather", "arguments": ', []),
        ('so <tool_call>{"name": "say", "arguments": {"a"', "auto", "so ", [(0, "say", '{"a"')]),
        ('so <tool_call>{"name": "sa', "auto", 'so <tool_call>{"name": "sa', []),
        ('so <tool_call>{"name": "no", "arguments": {}}', "auto", 'so <tool_call>{"name": "no", "arguments": {}}', []),
        ("<tool_call>", "auto", "<tool_call>", []),
        ('{"name": "weather", "arguments": {}}', "none", '{"name": "weather", "arguments": {}}', []),
        ("", "auto", "", []),
    ],
)  # fmt: skip
def test_a_text_that_ends_early(text: str, mode: ToolMode, shown: str, calls: list[tuple[int, str, str]]) -> None:
    for size in (1, 3, 1000):
        found = read(text, mode, size)
        assert (found[0], said(found[1])) == (shown, calls)


def test_arguments_come_as_they_grow() -> None:
    reader = CallReader("named", NAMES, "s")
    assert reader.push('{"name": "weather", ') == ("", [])
    (begin, first) = reader.push('"arguments": {"ci')[1]
    assert begin.as_delta() == {
        "index": 0, "id": call_id("s", 0), "type": "function", "function": {"name": "weather", "arguments": ""}
    }  # fmt: skip
    assert first.as_delta() == {"index": 0, "function": {"arguments": '{"ci'}}
    assert [piece.arguments for piece in reader.push('ty": "Rome"}')[1]] == ['ty": "Rome"}']
    assert reader.push("}") == reader.end() == ("", [])
