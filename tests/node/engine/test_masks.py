"""Sequences with a grammar in the engine: valid texts, the same after a fault, and nobody waits for another's mask."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from mesh.types import LayerSpan, SamplingParams
from node.engine.engine import Engine, EngineConfig
from node.engine.masks import Guide, NoMask
from node.engine.sequence import Result, SequenceSpec, Work
from node.text.grammar import Vocabularies, Vocabulary
from node.text.tokenizer import Tokenizer, load_tokenizer
from tests.node.engine.chain import GREEDY, MODEL, info

Tiny = Callable[..., Path]
PROMPT = tuple(range(70, 100))
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "catfish"]},
        "legs": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "legs", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def sampling(grammar: dict[str, Any] | str = SCHEMA, **over: Any) -> SamplingParams:
    text = grammar if isinstance(grammar, str) else json.dumps({"grammars": [{"json_schema": grammar}]})
    return SamplingParams(
        **{"temperature": 1.0, "seed": 5, "max_tokens": 200, "stop_token_ids": (2,), **over}, grammar=text
    )


class Sampler:
    """One engine with all layers; drives its sequences as hop 0 and sampler in one."""

    def __init__(self, vocabularies: Vocabularies | None = None) -> None:
        self.engine = Engine(EngineConfig(exact="off"), vocabularies)
        self.engine.on_results = self._take
        self.drawn: dict[str, list[int]] = {}
        self.errors: dict[str, Result] = {}
        self.computed: dict[str, int] = {}
        self.moved = asyncio.Event()
        self._tags: dict[str, int] = {}

    def open(self, key: str, params: SamplingParams, drawn: tuple[int, ...] = ()) -> None:
        tokens = (*PROMPT, *drawn)
        self.drawn[key], self._tags[key] = list(drawn), 0
        self.engine.open(
            SequenceSpec(key, MODEL, 0, 4, len(PROMPT) + params.max_tokens, sampling=params, tokens=tokens)
        )
        self.engine.submit(Work(key, 0, 0, len(tokens), tokens, sample=True))

    def cut(self, key: str, drawn: int) -> None:
        """As after a fault on the route: so many drawn tokens were accepted, and the last one's row comes again."""
        self._tags[key] += 1
        kept = self.drawn[key] = self.drawn[key][:drawn]
        at = len(PROMPT) + drawn - 1
        self.engine.truncate(key, at)
        self.engine.submit(Work(key, self._tags[key], at, 1, ((*PROMPT, *kept)[at],), sample=True))

    def _take(self, results: list[Result]) -> None:
        for result in results:
            self.computed[result.key] = result.start + result.n
            if result.error:
                self.errors[result.key] = result
            elif result.sampled is not None and result.tag == self._tags[result.key]:
                self._on_token(result.key, result.sampled.position, result.sampled.token)
        self.moved.set()

    def _on_token(self, key: str, position: int, token: int) -> None:
        self.drawn[key].append(token)
        if token != 2 and len(self.drawn[key]) < 200:
            self.engine.submit(Work(key, self._tags[key], position, 1, (token,), sample=True))

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not done():
                self.moved.clear()
                await self.moved.wait()

    async def text(self, key: str) -> list[int]:
        """All tokens of ``key``, to its end."""
        await self.until(lambda: self.drawn[key][-1:] == [2])
        return self.drawn[key]


@pytest.fixture
def folder(tiny: Tiny) -> Path:
    return tiny("llama", tokenizer=True)


@pytest.fixture
async def make(folder: Path) -> AsyncIterator[Callable[..., Any]]:
    made: list[Sampler] = []

    async def start(vocabularies: Vocabularies | None = None) -> Sampler:
        made.append(Sampler(vocabularies))
        await made[-1].engine.load(info(), folder, LayerSpan(MODEL, 0, 4))
        return made[-1]

    yield start
    for sampler in made:
        await sampler.engine.stop()


@pytest.fixture(scope="module")
def tokenizer(tiny: Tiny) -> Tokenizer:
    return load_tokenizer(tiny("llama", tokenizer=True))


def read(tokenizer: Tokenizer, tokens: list[int]) -> Any:
    return json.loads(tokenizer.decode(tokens))


async def test_a_random_models_answers_are_valid_in_any_company(make: Callable[..., Any], tokenizer: Tokenizer) -> None:
    sampler = await make()
    kinds = {"greedy": sampling(temperature=0.0), **{f"s{seed}": sampling(seed=seed) for seed in range(6)}}
    kinds["hot"] = sampling(
        temperature=2.0, frequency_penalty=2.0, presence_penalty=2.0, logit_bias={2: 100.0, 93: -100.0}
    )
    for key, params in kinds.items():
        sampler.open(key, params)
    together = {key: list(await sampler.text(key)) for key in kinds}
    for tokens in together.values():
        jsonschema.validate(read(tokenizer, tokens), SCHEMA)
    assert len({tuple(tokens) for tokens in together.values()}) > 4
    for key in ("greedy", "s0", "hot"):
        sampler.engine.close(key)
        sampler.open(key, kinds[key])
        assert await sampler.text(key) == together[key], "alone"


@pytest.mark.parametrize("params", [sampling(), sampling(temperature=0.0)], ids=["seeded", "greedy"])
async def test_a_sampler_that_takes_over_or_was_cut_back_draws_the_same(
    make: Callable[..., Any], params: SamplingParams
) -> None:
    first = await make()
    first.open("a", params)
    whole = list(await first.text("a"))
    second = await make()
    for n in (1, len(whole) // 2, len(whole) - 1):
        second.open(f"at {n}", params, tuple(whole[:n]))
        assert await second.text(f"at {n}") == whole, "a new sampler, from the journal's tokens"
    for n in (len(whole) - 1, len(whole) // 2, 3, 1):
        first.cut("a", n)
        assert await first.text("a") == whole, "the same sampler, cut back"


async def test_a_cut_in_the_middle_of_the_prompt_loses_no_token(make: Callable[..., Any]) -> None:
    """The rows come again, the tokens do not: penalties and grammars count all of them."""
    params = sampling(temperature=0.0, repetition_penalty=1.8, presence_penalty=1.0)
    sampler = await make()
    for number, grammar in enumerate((params.grammar, "")):
        cut, straight = f"cut{number}", f"straight{number}"  # keys are never used again: late results may bear them
        wanted = msgspec.structs.replace(params, grammar=grammar, stop_token_ids=())
        spec = SequenceSpec(cut, MODEL, 0, 4, 230, sampling=wanted, tokens=PROMPT)
        sampler.open(straight, wanted)
        await sampler.until(lambda key=straight: len(sampler.drawn[key]) > 8)
        sampler.drawn[cut], sampler.computed[cut], sampler._tags[cut] = [], 0, 1
        sampler.engine.open(spec)
        sampler.engine.submit(Work(cut, 0, 0, 12, PROMPT[:12]))
        await sampler.until(lambda key=cut: sampler.computed[key] == 12)
        sampler.engine.truncate(cut, 7)
        sampler.engine.submit(Work(cut, 1, 7, len(PROMPT) - 7, PROMPT[7:], sample=True))
        await sampler.until(lambda key=cut: len(sampler.drawn[key]) > 8)
        assert sampler.drawn[cut][:8] == sampler.drawn[straight][:8]
        for key in (cut, straight):
            sampler.engine.close(key)


async def test_nobody_waits_for_the_mask_of_another(make: Callable[..., Any], tokenizer: Tokenizer) -> None:
    gate, asked = threading.Event(), threading.Event()

    class Slow(Vocabularies):
        def get(self, folder: Path, tokenizer: Tokenizer | None = None) -> Vocabulary:
            asked.set()
            assert gate.wait(60)
            return super().get(folder, tokenizer)

    sampler = await make(Slow())
    sampler.open("constrained", sampling(max_tokens=200))
    sampler.open("plain", msgspec.structs.replace(GREEDY, max_tokens=100))
    await sampler.until(lambda: len(sampler.drawn["plain"]) > 40)
    assert asked.is_set()
    assert sampler.drawn["constrained"] == []
    sampler.engine.close("plain")
    gate.set()  # with nothing else to compute, the mask itself wakes the device thread
    jsonschema.validate(read(tokenizer, await sampler.text("constrained")), SCHEMA)


async def test_a_dead_end_ends_its_sequence_with_a_final_error(make: Callable[..., Any]) -> None:
    sampler = await make()
    # U+00AD begins with a byte that the vocabulary has and ends with one that it lacks.
    sampler.open("a", sampling(json.dumps({"grammars": [{"lark_grammar": 'start: "x\u00ad"'}]})))
    sampler.open("b", sampling("no grammar at all"))
    sampler.open("c", sampling())
    await sampler.until(lambda: {"a", "b"} <= sampler.errors.keys())
    assert len(sampler.drawn["a"]) == 2
    for key, why in (("a", "no token of the vocabulary"), ("b", "cannot be enforced")):
        assert why in sampler.errors[key].error
        assert sampler.errors[key].final
    assert (await sampler.text("c"))[-1] == 2
    for key in "abc":
        sampler.engine.close(key)
    await sampler.engine._on_thread(lambda done: done())
    sampler.engine.assert_idle()


async def test_a_tokenizer_that_cannot_be_loaded_is_this_nodes_own_failure(make: Callable[..., Any]) -> None:
    def broken(folder: Path) -> Tokenizer:
        raise OSError("the disk is gone")

    sampler = await make(Vocabularies(broken))
    sampler.open("a", sampling())
    await sampler.until(lambda: "a" in sampler.errors)
    assert "the disk is gone" in sampler.errors["a"].error
    assert not sampler.errors["a"].final


def test_a_panic_of_the_library_ends_the_sequence_that_it_befell() -> None:
    """Rust's panics arrive as a BaseException; unsaid, the sequence would wait for ever."""

    class Panic(BaseException):
        """As pyo3's."""

    def start() -> Any:
        raise Panic("index out of bounds")

    with ThreadPoolExecutor(1) as pool:
        guide, found = Guide(pool, start), []
        guide.post = found.append
        guide.size = 8
        guide.ask(3, [])
    assert found == [NoMask("the grammar's mask failed: Panic: index out of bounds", final=False)]
