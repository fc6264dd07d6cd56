"""Fetching: bring the tensors that a span needs from whichever peers have them.

Work is cut into jobs, runs of neighbouring tensors up to 8 MiB or one larger tensor; four jobs run at once, each
from the peer with the fewest under way.  A tensor counts when its SHA-256 agrees with the manifest.  A peer that
sent other bytes is reported and never asked again; one that does not answer gets three tries.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import msgspec

from mesh.errors import MeshError, PeerError
from mesh.types import NodeId
from node.weights.manifest import MANIFEST_NAME, Tensor, TensorFile
from node.weights.store import Files, Replica, Store, WeightsError

PIECE_BYTES = 8 * 1024 * 1024
IN_FLIGHT = 4
PIECE_TIMEOUT_S = 60.0
"""For one piece: 8 MiB at 1.1 Mbit/s."""
TRIES = 3
PAUSE_S = 0.2
"""Before a peer that failed is asked again, doubled each time."""

Progress = Callable[[int, int], None]
"""(bytes here, bytes in all) of what was asked for."""
BadPeer = Callable[[NodeId, str], None]
"""A peer sent bytes that are not the model's; why."""


class Have(msgspec.Struct, frozen=True):
    """Which tensors a peer can serve."""

    whole: bool = False
    tensors: frozenset[str] = frozenset()

    def has(self, names: Sequence[str]) -> bool:
        return self.whole or self.tensors.issuperset(names)


class PeerFiles(Protocol):
    """How files are read from peers.  Both raise ``MeshError`` (or ``OSError``, ``TimeoutError``) on failure."""

    async def have(self, peer: NodeId, manifest_id: str) -> Have: ...

    async def fetch_range(self, peer: NodeId, manifest_id: str, name: str, start: int, end: int | None) -> bytes:
        """Bytes [start, end) of a file; ``end`` ``None``: to its end (for the manifest, whose size is not known)."""
        ...


class Job(msgspec.Struct, frozen=True):
    """Neighbouring tensors of one file, fetched from one peer."""

    file: TensorFile
    tensors: tuple[Tensor, ...]

    @property
    def names(self) -> list[str]:
        return [tensor.name for tensor in self.tensors]

    @property
    def begin(self) -> int:
        return self.tensors[0].begin

    @property
    def end(self) -> int:
        return self.tensors[-1].end


def jobs(missing: Sequence[tuple[TensorFile, Tensor]]) -> list[Job]:
    """Cut tensors, in the order of their files, into jobs of at most ``PIECE_BYTES`` or one tensor."""
    found: list[Job] = []
    for file, tensor in missing:
        last = found[-1] if found else None
        joins = last and last.file is file and last.end == tensor.begin and tensor.end - last.begin <= PIECE_BYTES
        if last and joins:
            found[-1] = Job(file, (*last.tensors, tensor))
        else:
            found.append(Job(file, (tensor,)))
    return found


class _Peers:
    """The peers of one fetch: what each has, how many jobs it runs, how often it failed."""

    def __init__(self, fetcher: Fetcher, manifest_id: str, order: Sequence[NodeId]) -> None:
        self._fetcher = fetcher
        self.manifest_id = manifest_id
        self.order = [peer for peer in dict.fromkeys(order) if peer not in fetcher.bad]
        self.have: dict[NodeId, Have] = {}
        self.busy = dict.fromkeys(self.order, 0)
        self.failures = dict.fromkeys(self.order, 0)
        self.last_failure = ""

    async def learn(self) -> None:
        """Ask every peer what it has, all at once."""
        answers = await asyncio.gather(*(self._ask(peer) for peer in self.order))
        self.have = {peer: answer for peer, answer in zip(self.order, answers, strict=True) if answer is not None}

    async def _ask(self, peer: NodeId) -> Have | None:
        try:
            async with asyncio.timeout(PIECE_TIMEOUT_S / 6):
                return await self._fetcher.files.have(peer, self.manifest_id)
        except (MeshError, OSError, TimeoutError) as error:
            self.last_failure = f"{peer[:8]}: {error or type(error).__name__}"
            return None

    async def failed(self, peer: NodeId, why: str) -> None:
        """Count a failure, and wait before anybody asks this peer again."""
        self.last_failure = f"{peer[:8]}: {why}"
        await asyncio.sleep(PAUSE_S * 2 ** self.failures[peer])
        self.failures[peer] += 1

    def pick(self, names: Sequence[str] | None) -> NodeId | None:
        """The least busy peer that has all ``names`` (``None``: any peer) and may be asked."""
        fit = [
            (self.failures[peer], self.busy[peer], index, peer)
            for index, peer in enumerate(self.order)
            if peer not in self._fetcher.bad
            and self.failures[peer] < TRIES
            and (names is None or (peer in self.have and self.have[peer].has(names)))
        ]
        return min(fit)[3] if fit else None

    def none_left(self, what: str) -> WeightsError:
        asked = ", ".join(peer[:8] for peer in self.order) or "nobody: no peer is known to have any of it"
        why = f"; the last failure was {self.last_failure}" if self.last_failure else ""
        return WeightsError(f"no peer can give {what} of model {self.manifest_id[:12]} (asked: {asked}{why})")


class Fetcher:
    """Brings models' files into a store.  One fetch of a model runs at a time; a second waits for it."""

    def __init__(self, store: Store, files: PeerFiles, on_bad_peer: BadPeer) -> None:
        self.store = store
        self.files = files
        self.bad: set[NodeId] = set()
        self._on_bad_peer = on_bad_peer
        self._locks: dict[str, asyncio.Lock] = {}

    async def skeleton(self, manifest_id: str, peers: Sequence[NodeId]) -> Files:
        """Everything but the weights: manifest, configuration, tokenizer, headers.  Raises ``WeightsError``."""
        async with self._locks.setdefault(manifest_id, asyncio.Lock()):
            found = await asyncio.to_thread(self.store.find, manifest_id)
            sources = _Peers(self, manifest_id, peers)
            if found is None:
                found = await self._manifest(manifest_id, sources)
            if isinstance(found, Replica):
                await self._small(found, sources)
            return found

    async def tensors(
        self, files: Files, names: Sequence[str], peers: Sequence[NodeId], progress: Progress | None = None
    ) -> None:
        """Bring these tensors; those that are here already are not fetched again.  Raises ``WeightsError``.

        What was verified before a failure or a cancellation stays, so that the next call goes on from there.
        """
        if not isinstance(files, Replica):
            return
        async with self._locks.setdefault(files.id, asyncio.Lock()):
            missing = files.missing(names)
            todo = sum(tensor.size for _, tensor in missing)
            total = sum(tensor.size for _, tensor in map(files.manifest.tensors().__getitem__, dict.fromkeys(names)))
            report = _Reporter(progress, total - todo, total)
            if missing:
                await asyncio.to_thread(files.require_space, todo)
                await self._run(files, jobs(missing), _Peers(self, files.id, peers), report)

    async def _manifest(self, manifest_id: str, sources: _Peers) -> Files:
        while (peer := sources.pick(None)) is not None:
            raw = await self._read(sources, peer, MANIFEST_NAME, 0, None)
            if raw is None:
                continue
            try:
                return await asyncio.to_thread(self.store.create, manifest_id, raw)
            except PeerError as error:
                self._report(peer, str(error))
        raise sources.none_left("the manifest")

    async def _small(self, replica: Replica, sources: _Peers) -> None:
        for small in replica.missing_small():
            await self._part(sources, small.name, small.size, partial(replica.put_small, small))
        for file in replica.missing_headers():
            await self._part(sources, file.name, file.header_bytes, partial(replica.put_header, file))

    async def _part(self, sources: _Peers, name: str, size: int, put: Callable[[bytes], None]) -> None:
        """Bring the first ``size`` bytes of a file from any peer, and ``put`` them, which checks them."""
        while (peer := sources.pick(None)) is not None:
            data = await self._all_of(sources, peer, name, size)
            if data is None:
                continue
            try:
                return await asyncio.to_thread(put, data)
            except PeerError as error:
                self._report(peer, str(error))
        raise sources.none_left(name)

    async def _all_of(self, sources: _Peers, peer: NodeId, name: str, size: int) -> bytes | None:
        """The first ``size`` bytes of a file from ``peer``, or ``None`` after a failure."""
        data = bytearray()
        for start, end in _pieces(0, size):
            piece = await self._read(sources, peer, name, start, end)
            if piece is None:
                return None
            data += piece
        return bytes(data)

    async def _run(self, replica: Replica, todo: Sequence[Job], sources: _Peers, report: _Reporter) -> None:
        """Work off the jobs, ``IN_FLIGHT`` at a time."""
        await sources.learn()
        queue = deque(todo)

        async def worker() -> None:
            while queue:
                await self._do(replica, queue.popleft(), sources, report)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(IN_FLIGHT, len(queue))):
                    group.create_task(worker())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _do(self, replica: Replica, job: Job, sources: _Peers, report: _Reporter) -> None:
        """Bring one job's tensors, from as many peers after one another as it takes."""
        while names := [name for name in job.names if not replica.holds(name)]:
            peer = sources.pick(names)
            if peer is not None:
                await self._transfer(replica, job, sources, peer, report)
            elif len(job.tensors) == 1:
                raise sources.none_left(f"tensor {names[0]}")
            else:
                for tensor in job.tensors:
                    await self._do(replica, Job(job.file, (tensor,)), sources, report)

    async def _transfer(self, replica: Replica, job: Job, sources: _Peers, peer: NodeId, report: _Reporter) -> None:
        """Bring a job from ``peer``; what arrives whole and right is entered into the ledger."""
        check = _Check(job)
        sources.busy[peer] += 1
        try:
            for start, end in _pieces(job.begin, job.end):
                data = await self._read(sources, peer, job.file.name, start, end)
                if data is None:
                    break
                await asyncio.to_thread(check.take, replica, start, data)
        finally:
            sources.busy[peer] -= 1
        good, wrong = check.verdict()
        await asyncio.to_thread(replica.record, job.file, good)
        report.add(sum(tensor.size for tensor in job.tensors if tensor.name in good))
        if wrong:
            self._report(peer, f"sent other bytes for tensor {wrong[0]} of model {replica.id[:12]}")

    async def _read(self, sources: _Peers, peer: NodeId, name: str, start: int, end: int | None) -> bytes | None:
        """One piece from ``peer``; ``None`` after a failure, which was counted and slept off."""
        try:
            async with asyncio.timeout(PIECE_TIMEOUT_S):
                data = await self.files.fetch_range(peer, sources.manifest_id, name, start, end)
            if end is None or len(data) == end - start:
                return data
            why = f"{len(data)} bytes came instead of {end - start}"
        except (MeshError, OSError, TimeoutError) as error:
            why = str(error) or type(error).__name__
        await sources.failed(peer, why)
        return None

    def _report(self, peer: NodeId, why: str) -> None:
        self.bad.add(peer)
        self._on_bad_peer(peer, why)


class _Check:
    """Hashes a job's tensors as their bytes pass on to the disk."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._digests = [hashlib.sha256() for _ in job.tensors]
        self._reached = job.begin

    def take(self, replica: Replica, start: int, data: bytes) -> None:
        view = memoryview(data)
        for tensor, digest in zip(self._job.tensors, self._digests, strict=True):
            digest.update(view[max(0, tensor.begin - start) : max(0, tensor.end - start)])
        replica.write(self._job.file, start, data)
        self._reached = start + len(data)

    def verdict(self) -> tuple[list[str], list[str]]:
        """(tensors that are right, tensors that came whole but wrong)"""
        good: list[str] = []
        wrong: list[str] = []
        for tensor, digest in zip(self._job.tensors, self._digests, strict=True):
            if tensor.end <= self._reached:
                (good if digest.hexdigest() == tensor.sha256 else wrong).append(tensor.name)
        return good, wrong


class _Reporter:
    """Adds up what is here and tells whoever asked."""

    def __init__(self, progress: Progress | None, here: int, total: int) -> None:
        self._progress, self._here, self._total = progress, here, total
        self.add(0)

    def add(self, size: int) -> None:
        self._here += size
        if self._progress is not None:
            self._progress(self._here, self._total)


def _pieces(begin: int, end: int) -> list[tuple[int, int]]:
    return [(start, min(start + PIECE_BYTES, end)) for start in range(begin, end, PIECE_BYTES)]
