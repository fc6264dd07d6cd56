"""``Weights``: a node's model files behind three verbs: offer, outline, bring."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from mesh.types import LayerSpan, ModelInfo, NodeId
from node.weights.fetch import BadPeer, Fetcher, PeerFiles, Progress
from node.weights.offer import Offer, offer
from node.weights.store import Store

NeededTensors = Callable[[Path, Sequence[str], int, int], list[str]]
"""(model folder, names of all tensors, start, end) -> names that layers [start, end) need.  Called on a thread."""


class Weights:
    """All model files of one node, kept under ``root`` (``<data>/models``)."""

    def __init__(self, root: Path, files: PeerFiles, needed: NeededTensors, on_bad_peer: BadPeer) -> None:
        self.store = Store(root)
        self._hashes = root / "hashes"
        self._needed = needed
        self._fetcher = Fetcher(self.store, files, on_bad_peer)

    async def offer(self, source: str | Path, name: str, dtype: str, quantize: str = "") -> Offer:
        """Offer the model at ``source`` (folder or hub id): from now on it is served to peers from where it lies.

        Raises ``ConfigError``.  Seconds of hashing for a large model, once.
        """
        offered = await offer(source, name, dtype, self._hashes, quantize)
        self.store.add_whole(offered.manifest, offered.folder)
        return offered

    async def outline(self, model: ModelInfo, peers: Sequence[NodeId]) -> Path:
        """A folder with the model's configuration and tokenizer, but no weights to rely on.

        ``peers`` as ``MeshView.sources`` lists them.  Raises ``WeightsError``.
        """
        return (await self._fetcher.skeleton(model.manifest, peers)).folder

    async def bring(
        self, model: ModelInfo, span: LayerSpan, peers: Sequence[NodeId], progress: Progress | None = None
    ) -> Path:
        """A folder with all weights that ``span`` needs; what is here already is not fetched again.

        Raises ``WeightsError``; the next call goes on where this one ended.
        """
        files = await self._fetcher.skeleton(model.manifest, peers)
        if not files.whole:
            names = sorted(files.manifest.tensors())
            needed = await asyncio.to_thread(self._needed, files.folder, names, span.start, span.end)
            await self._fetcher.tensors(files, needed, peers, progress)
        return files.folder
