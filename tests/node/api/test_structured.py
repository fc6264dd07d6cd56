"""Structured output from a schema to drawn tokens: whatever the logits, the text is an instance of the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.types import SamplingParams
from node.api import structured
from node.engine.masks import Guide
from node.engine.sampler import Row, draw
from node.text.grammar import Vocabulary
from node.text.tokenizer import Tokenizer, load_tokenizer

DEMO = Path(__file__).parents[3] / "models" / "demo"
PADDING = 7
"""Rows of the logits past the tokenizer's vocabulary."""
MOST_TOKENS = 4000

texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=6)
scalars = st.one_of(texts, st.integers(-(10**6), 10**6), st.booleans(), st.none())
names = st.text('abcé"\\/ _', min_size=1, max_size=4)


def bounded(low: int, high: int, *keys: str) -> st.SearchStrategy[dict[str, int]]:
    """A lower and an upper bound under ``keys``."""
    pairs = st.tuples(st.integers(low, high), st.integers(low, high)).map(sorted)
    return pairs.map(lambda pair: dict(zip(keys, pair, strict=True)))


leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    bounded(0, 8, "minLength", "maxLength").map(lambda bounds: {"type": "string", **bounds}),
    st.sampled_from(["[a-c]{1,3}", "x|yy|zzz", "[0-9]{4}-[0-9]{2}"]).map(
        lambda p: {"type": "string", "pattern": f"^({p})$"}
    ),
    bounded(-1000, 1000, "minimum", "maximum").map(lambda bounds: {"type": "integer", **bounds}),
    bounded(-9, 9, "minimum", "maximum").map(lambda bounds: {"type": "number", **bounds}),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"], "minimum": 0, "maximum": 7}]),
    st.lists(scalars, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    scalars.map(lambda value: {"const": value}),
)


@st.composite
def objects(any_schema: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = any_schema(st.dictionaries(names, inner, max_size=4))
    required = [name for name in properties if any_schema(st.booleans())]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def composed(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    sizes = bounded(0, 3, "minItems", "maxItems")
    return st.one_of(
        st.tuples(inner, sizes).map(lambda found: {"type": "array", "items": found[0], **found[1]}),
        objects(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda found: {"anyOf": found}),
    )


schemas = st.recursive(leaves, composed, max_leaves=8)


@pytest.fixture(scope="module")
def demo() -> tuple[Tokenizer, Vocabulary]:
    tokenizer = load_tokenizer(DEMO)
    return tokenizer, Vocabulary(tokenizer)


def answer(demo: tuple[Tokenizer, Vocabulary], schema: dict[str, Any], seed: int) -> str:
    """The text that a model of random logits gives under ``schema``, to its end."""
    tokenizer, vocabulary = demo
    guide = Guide(None, lambda: vocabulary.start(structured._grammar(structured._json(schema))))  # type: ignore[arg-type]
    guide.size = tokenizer.size + PADDING
    params, chance = SamplingParams(temperature=1.0, seed=seed), torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    while len(drawn) < MOST_TOKENS:
        logits = 4 * torch.randn(1, guide.size, generator=chance)
        logits[:, tokenizer.size :] = 50.0  # what the grammar hides is the likeliest
        sampled = draw(logits, [Row(params, len(drawn), drawn, 0, guide._make(drawn))])
        if sampled[0].token in tokenizer.eos_ids:
            return b"".join(tokenizer.token_bytes(token) for token in drawn).decode()
        drawn.append(sampled[0].token)
    raise AssertionError(f"no end within {MOST_TOKENS} tokens")


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(schema=schemas, seed=st.integers(0, 2**32))
def test_random_logits_under_any_schema_give_an_instance_of_it(
    demo: tuple[Tokenizer, Vocabulary], schema: dict[str, Any], seed: int
) -> None:
    text = answer(demo, schema, seed)
    jsonschema.validate(json.loads(text), schema)
