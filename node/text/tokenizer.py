"""One model's tokenizer and chat template, loaded from its folder.

Loading imports transformers and takes a second: do it off the loop (``Tokenizers.get``).  Encoding and decoding
go to the Rust tokenizer directly where there is one (a few microseconds a token, no shared state, so safe from
any thread); transformers' own wrappers are ten times slower and not thread-safe.  A tokenizer in plain Python
works too, under a lock.

A text of megabytes takes seconds and half a kilobyte of memory a token, so three things bound it: callers refuse what
cannot fit (``least``) unread, long work goes to few threads, and encoding there lets go of the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import json
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mesh.errors import ConfigError, RequestError
from mesh.types import ModelId
from node.lazy import transformers

LONG_TEXT = 16_384
"""Characters past which encoding leaves the event loop (about 5 ms of work)."""
LONG_AT_ONCE = 2
"""Long texts in work at the same time; more wait.  Threads, so that one whose client hung up still counts."""

T = TypeVar("T")


class Tokenizer:
    """Text to ids and back.  ``eos_ids``: every id that ends a generation, by the model's own files."""

    def __init__(self, hf: Any, eos_ids: tuple[int, ...]) -> None:
        self._hf = hf
        self._rust = getattr(hf, "backend_tokenizer", None)
        self._lock = threading.Lock()
        self.eos_ids = eos_ids
        self.size = len(hf)
        """Ids are below this; the model's own vocabulary may be padded past it."""
        self._longest = max(map(len, hf.get_vocab()), default=1)
        self.special_ids = _special_ids(hf, self._rust)
        self.has_chat_template = bool(getattr(hf, "chat_template", None))
        self._byte_level = self._rust is not None and '"ByteLevel"' in _decoder_of(self._rust)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text``; ``special`` adds what the model expects around it (a BOS, say)."""
        if self._rust is not None:
            # Not ``encode``: that one holds the interpreter's lock, and with it the event loop, to the end of the text.
            return list(self._rust.encode_batch([text], add_special_tokens=special)[0].ids)
        with self._lock:
            return list(self._hf.encode(text, add_special_tokens=special))

    def least(self, text: str) -> int:
        """Fewer ids than this cannot spell ``text``: a word of the vocabulary, in characters or in printable stand-ins
        for bytes, is never longer than the longest."""
        return -(-len(text) // self._longest)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ``ids``, bytes that are no UTF-8 as U+FFFD; ``special`` shows special tokens as well."""
        if self._rust is not None:
            return str(self._rust.decode(list(ids), skip_special_tokens=not special))
        with self._lock:
            return str(self._hf.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False))

    def token_bytes(self, token: int) -> bytes:
        """The bytes that ``token`` stands for, whole characters or not."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._spell(token)
        return found

    def _spell(self, token: int) -> bytes:
        word = self._hf.convert_ids_to_tokens(token) if 0 <= token < self.size else None
        if word is None:
            return b""
        if token in self.special_ids:
            return str(word).encode()
        if self._byte_level:
            table = _byte_table()
            if all(c in table for c in word):
                return bytes(table[c] for c in word)
        if len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            return bytes([int(word[3:5], 16)])
        return str(word).replace("\u2581", " ").encode()

    def to_json(self) -> str:
        """As a tokenizer.json file has it, added tokens included; for libraries that read such.  RequestError: one in
        plain Python has no such form."""
        if self._rust is None:
            raise RequestError("this model's tokenizer is not a fast one", code="unsupported_parameter")
        plain = copy.copy(self._rust)
        plain.no_padding()
        plain.no_truncation()
        return str(plain.to_str())

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        extra: dict[str, Any] | None = None,
    ) -> str:
        """The prompt's text by the model's chat template.  RequestError: no template, or it refused the messages."""
        if not self.has_chat_template:
            raise RequestError(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        try:
            text = self._hf.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **(extra or {}),
            )
        except Exception as error:  # a template is the model author's program: whatever it raises, it refused
            raise RequestError(
                f"the model's chat template refused the messages: {error}", param="messages", code="chat_template"
            ) from error
        return str(text)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model folder.  ConfigError where there is none that can be used without its own code."""
    auto_tokenizer = transformers().AutoTokenizer
    try:
        hf = auto_tokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise ConfigError(f"{folder}: no usable tokenizer: {error}") from error
    return Tokenizer(hf, eos_ids(folder, hf.eos_token_id))


def eos_ids(folder: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Every end-of-sequence id: generation_config.json's, else config.json's, and always the tokenizer's."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(folder / name).get("eos_token_id")
        found = [value] if isinstance(value, int) else [v for v in value or () if isinstance(v, int)]
        if found:
            break
    if tokenizer_eos is not None and tokenizer_eos not in found:
        found.append(tokenizer_eos)
    return tuple(found)


class Tokenizers:
    """Loaded tokenizers by model; each is loaded once, off the loop, however many ask at the same time."""

    def __init__(self, load: Callable[[Path], Tokenizer] = load_tokenizer) -> None:
        self._load = load
        self._tasks: dict[tuple[ModelId, Path], asyncio.Task[Tokenizer]] = {}

    async def get(self, model: ModelId, folder: Path) -> Tokenizer:
        key = (model, folder)
        task = self._tasks.get(key)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._tasks[key] = asyncio.create_task(asyncio.to_thread(self._load, folder))
        # Shielded: one caller that hangs up must not take the tokenizer from the others.
        return await asyncio.shield(task)

    def forget(self, model: ModelId) -> None:
        """Drop a model that is no longer served."""
        self._tasks = {key: task for key, task in self._tasks.items() if key[0] != model}


_threads = ThreadPoolExecutor(LONG_AT_ONCE, thread_name_prefix="text")


async def off_loop(long: bool, call: Callable[[], T]) -> T:
    """``call()``, in one of a few worker threads when it would hold up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(_threads, call) if long else call()


def encode_off_loop(tokenizer: Tokenizer, text: str, *, special: bool, long: bool = False) -> Awaitable[list[int]]:
    """``long``: off the loop even where ``text`` is short, as one of many."""
    return off_loop(long or len(text) > LONG_TEXT, functools.partial(tokenizer.encode, text, special=special))


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object file, or nothing where it is missing; ConfigError where it is broken."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return {}
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {error}") from error
    return value if isinstance(value, dict) else {}


def _special_ids(hf: Any, rust: Any) -> frozenset[int]:
    """Tokens that ``decode`` leaves out."""
    if rust is None:
        return frozenset(hf.all_special_ids)
    return frozenset(at for at, token in rust.get_added_tokens_decoder().items() if token.special)


def _decoder_of(rust: Any) -> str:
    """The decoder part of a Rust tokenizer, as JSON; the vocabulary is not serialised for it."""
    decoder = rust.decoder
    if decoder is None:
        return ""
    state = decoder.__getstate__()
    return state.decode() if isinstance(state, bytes) else json.dumps(state)


@functools.cache
def _byte_table() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, reversed (Radford et al. 2019, ``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
