"""Stand-ins that keep the contracts of the real things: the node as the HTTP API sees it, and a small tokenizer."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from mesh.errors import MeshError, RequestError, SessionLost
from mesh.types import ModelId, ModelInfo
from node.api.service import (
    Caller,
    CancelReason,
    EndEvent,
    Event,
    GenerationRequest,
    PromptEvent,
    Recovery,
    Scope,
    TokenEvent,
    Top,
)
from node.text.grammar import Vocabulary
from node.text.tokenizer import Tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('bad role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}{% if not loop.last or not continue_final_message %}<|end|>{% endif %}"
    "{% endfor %}{% if tools %}<|tools|>{{ tools | length }}{% endif %}"
    "{% if mood %}<|mood|>{{ mood }}{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs!",
    "A mesh of machines answers a question together; when one dies, the others go on.",
    "def answer(question: str) -> str: return 'one two three four five six seven eight nine ten'",
] * 8
SPECIALS = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>", "<|tools|>", "<|mood|>"]


@functools.cache
def make_tokenizer(*, byte_fallback: bool = False) -> Tokenizer:
    """A byte-level BPE of some 400 words (or one with sentencepiece's spaces and bytes) with a chat template."""
    from tokenizers import Tokenizer as Rust
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if byte_fallback:
        specials = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        rust = Rust(models.BPE(unk_token="<unk>", byte_fallback=True))
        rust.pre_tokenizer = pre_tokenizers.Metaspace()
        rust.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        rust.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=specials[:10]))
        rust.add_tokens(specials[10:])
        rust = _with_bytes(rust, specials[10:])
    else:
        rust = Rust(models.BPE())
        rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        rust.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet)
        rust.train_from_iterator(CORPUS, trainer)
    hf = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    hf.add_special_tokens({"additional_special_tokens": SPECIALS[2:]})
    hf.chat_template = TEMPLATE
    return Tokenizer(hf, eos_ids=(1, 6))


@functools.cache
def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    return Vocabulary(tokenizer)


def _with_bytes(rust: Any, bytes_: list[str]) -> Any:
    """The same tokenizer with byte words in the model's own vocabulary, as sentencepiece conversions have them."""
    state = msgspec.json.decode(rust.to_str())
    vocab = state["model"]["vocab"]
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in bytes_]
    for word in bytes_:
        vocab.setdefault(word, len(vocab))
    return type(rust).from_str(msgspec.json.encode(state).decode())


MODEL = ModelInfo(
    id=ModelId("demo"), manifest="0" * 64, n_layers=8, layer_bytes=1, embed_bytes=1, head_bytes=1, hidden_size=8,
    kv_bytes=1, vocab_size=1_000, max_context=256, dtype="float32",
)  # fmt: skip


class FakeGeneration:
    """Plays a script of tokens under the rules of a real session: stops, lengths, run-ahead, cancelling."""

    run_ahead = 32

    def __init__(self, service: FakeService, request: GenerationRequest, script: list[int]) -> None:
        self.request, self.cancelled = request, ""
        self.route = "ann:0-4,bob:4-8"
        self.recoveries: tuple[Recovery, ...] = service.recoveries
        self.cached_tokens = 0
        self.acknowledged = len(request.prompt) - 1
        self.drawn = 0
        self._service, self._script = service, script
        self._moved = asyncio.Event()

    def acknowledge(self, position: int) -> None:
        assert position < len(self.request.prompt) + self.drawn, "acknowledged what was never shown"
        self.acknowledged = max(self.acknowledged, position)
        self._moved.set()

    async def cancel(self, reason: CancelReason) -> None:
        self.cancelled = self.cancelled or reason
        self._moved.set()
        self._service.end(self)

    async def __aiter__(self) -> AsyncIterator[Event]:
        try:
            async for event in self._events():
                yield event
        finally:
            self._service.end(self)

    async def _events(self) -> AsyncIterator[Event]:
        request, sampling = self.request, self.request.sampling
        if request.prompt_logprobs >= 0:
            for event in self._prompt_events():
                yield event
        while self.drawn < sampling.max_tokens:
            if self.drawn < len(request.resume):
                position, token = len(request.prompt) + self.drawn, request.resume[self.drawn]
                self.drawn += 1
                yield TokenEvent(position, token, None)
                continue
            await self._turn()
            if self.cancelled:
                yield EndEvent("cancelled")
                return
            token = self._script[self.drawn % len(self._script)]
            position = len(request.prompt) + self.drawn
            self.drawn += 1
            if self.drawn <= self._service.forgotten:
                yield TokenEvent(position, token, None)
            else:
                yield TokenEvent(position, token, logprob_of(position, token), tops(position, token, sampling.logprobs))
            if token in sampling.stop_token_ids and self.drawn >= sampling.min_tokens:
                yield EndEvent("stop")
                return
        yield EndEvent("length")

    async def _turn(self) -> None:
        """Wait for the next token as the mesh would: for the hop (the gate), and for the acknowledgements."""
        if self._service.break_after is not None and self.drawn >= self._service.break_after:
            raise self._service.breaks_with
        await self._wait_for(self._service.may_draw(self.drawn))
        while self.drawn - (self.acknowledged - len(self.request.prompt) + 1) >= self.run_ahead and not self.cancelled:
            self._moved.clear()
            await self._moved.wait()

    async def _wait_for(self, gate: asyncio.Event) -> None:
        moved = asyncio.create_task(self._moved_for_good())
        opened = asyncio.create_task(gate.wait())
        try:
            await asyncio.wait({moved, opened}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            moved.cancel()
            opened.cancel()

    async def _moved_for_good(self) -> None:
        while not self.cancelled:
            self._moved.clear()
            await self._moved.wait()

    def _prompt_events(self) -> list[PromptEvent]:
        """In two chunks, as a chunked prefill brings them."""
        prompt, n = self.request.prompt, self.request.prompt_logprobs
        half, made = max(1, len(prompt) // 2), []
        for start, end in ((1, half), (half, len(prompt))):
            at = range(max(1, start), end)
            values = tuple(logprob_of(p, prompt[p]) for p in at)
            made.append(PromptEvent(max(1, start), values, tuple(tops(p, prompt[p], n) for p in at)))
        return made


def logprob_of(position: int, token: int) -> float:
    """Pure, distinct enough to tell entries apart."""
    return -0.125 * (1 + (position * 31 + token) % 64)


def tops(position: int, token: int, n: int) -> Top:
    """The token itself first, then lesser ones."""
    value = logprob_of(position, token)
    return tuple((token + at, value - at) for at in range(max(0, n)))


Script = Callable[[GenerationRequest], list[int]]


class FakeService:
    """A node of one model.  Tests set the public attributes; ``live`` shows what was not released."""

    version = "0.0.test"
    name = "ann"

    def __init__(self, tokenizer: Tokenizer | None = None, reply: str = "Hello there, how are you?") -> None:
        self._tokenizer = tokenizer or make_tokenizer()
        self.script: Script = lambda request: [*self._tokenizer.encode(reply, special=False), 1]
        self.known: list[ModelInfo] = [MODEL]
        self.opened: list[FakeGeneration] = []
        self.mesh: dict[str, GenerationRequest] = {}
        """Sessions by name; give several nodes the same to make them one mesh."""
        self.claims: dict[tuple[str, str], tuple[str, str]] = {}
        self.live: set[FakeGeneration] = set()
        self.refuse: list[MeshError] = []
        """Errors for the next calls of ``open``."""
        self.break_after: int | None = None
        self.breaks_with: MeshError = SessionLost("the route was lost after 3 tokens")
        self.hold_after: int | None = None
        """Tokens past this many wait for ``gate``."""
        self.gate = asyncio.Event()
        self.forgotten = 0
        """So many tokens of each session lost their log-probabilities with an owner."""
        self.recoveries: tuple[Recovery, ...] = ()
        self.grammar = True
        self.is_ready: tuple[bool, str] = (True, "")
        self.degraded = ""
        self.calls: list[tuple[Any, ...]] = []
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self.members: list[dict[str, Any]] = []
        admin = Caller("admin", frozenset({"infer", "rag", "admin"}))
        pairs: list[tuple[str, Caller]] = [("mk-admin", admin), ("mk-infer", Caller("k1", frozenset({"infer"})))]
        pairs.append(("mk-rag", Caller("k2", frozenset({"rag"}))))
        self._keys = dict(pairs)
        self._open = asyncio.Event()
        self._open.set()

    def may_draw(self, drawn: int) -> asyncio.Event:
        return self.gate if self.hold_after is not None and drawn >= self.hold_after else self._open

    def end(self, generation: FakeGeneration) -> None:
        self.live.discard(generation)
        self.ended.set()

    def models(self) -> list[ModelInfo]:
        return self.known

    async def tokenizer(self, model: ModelId) -> Tokenizer:
        return self._tokenizer

    async def check_grammar(self, model: ModelId, grammar: str, drawn: tuple[int, ...] = ()) -> None:
        if not self.grammar:
            raise RequestError("this model's tokenizer is of another kind", code="unsupported_parameter")
        await asyncio.to_thread(vocabulary_of(self._tokenizer).check, grammar, drawn)

    async def open(self, request: GenerationRequest) -> FakeGeneration:
        if self.refuse:
            raise self.refuse.pop(0)
        generation = FakeGeneration(self, request, self.script(request))
        self.mesh[request.session] = request
        self.opened.append(generation)
        self.live.add(generation)
        self.began.set()
        return generation

    async def attach(self, session: str, caller: Caller, patience_s: float) -> FakeGeneration | None:
        """A reader that gets the same events again from the first on, as a log or a journal gives them."""
        asked = self.mesh.get(session)
        if asked is None or (asked.caller != caller.id and "admin" not in caller.scopes):
            return None
        generation = FakeGeneration(self, asked, self.script(asked))
        self.live.add(generation)
        return generation

    async def claim(self, request: GenerationRequest) -> str:
        session, body = self.claims.setdefault(
            (request.caller, request.idempotency_key), (request.session, request.body_hash)
        )
        if body != request.body_hash:
            raise RequestError("another body", code="idempotency_key_reused", status=409)
        return session

    async def cancel(self, session: str, caller: Caller) -> bool:
        found = [g for g in self.live if g.request.session.split("-")[0] == session]
        mine = [g for g in found if g.request.caller == caller.id or "admin" in caller.scopes]
        for generation in mine:
            await generation.cancel("cancelled")
        return bool(mine)

    def draw_seed(self, idempotency_key: str) -> int:
        return 1000 + len(idempotency_key)

    def status(self) -> dict[str, Any]:
        return {"mesh_id": "0" * 32, "node_id": "1" * 32, "name": self.name, "members": self.members}

    def ready(self) -> tuple[bool, str]:
        return self.is_ready

    def check_key(self, key: str) -> Caller | None:
        return self._keys.get(key)

    async def token_create(self, ttl_s: float, uses: int | None) -> dict[str, Any]:
        self.calls.append(("token_create", ttl_s, uses))
        return {"token": "t", "id": "t1", "expires_at": 0, "uses": uses, "command": "python -m node join t"}

    async def token_list(self) -> list[dict[str, Any]]:
        return [{"id": "t1"}]

    async def token_revoke(self, token_id: str) -> bool:
        return token_id == "t1"

    async def key_create(self, scopes: frozenset[Scope], ttl_s: float | None, name: str) -> dict[str, Any]:
        self.calls.append(("key_create", scopes, ttl_s, name))
        return {"key": "mk-x", "id": "x", "scopes": sorted(scopes), "expires_at": None, "name": name}

    async def key_list(self) -> list[dict[str, Any]]:
        return [{"id": "x"}]

    async def key_revoke(self, key_id: str) -> bool:
        return key_id == "x"

    async def model_list(self) -> list[dict[str, Any]]:
        return [{"id": "demo"}]

    async def model_add(self, path: str, name: str) -> dict[str, Any]:
        return {"id": name or path}

    async def model_remove(self, model: ModelId) -> bool:
        return model == "demo"

    async def leave(self) -> dict[str, Any]:
        self.calls.append(("leave",))
        return {"leaving": True}

    async def revoke(self, node: str) -> dict[str, Any]:
        return {"revoked": node}

    async def takeover(self) -> dict[str, Any]:
        return {"term": 2}
