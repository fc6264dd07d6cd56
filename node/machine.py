"""What this machine is and can do: memory, threads, measured speed; and the engine made for it.

torch is imported here and in ``node.engine`` only, and only on a node whose role holds layers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mesh.errors import CapacityError, ConfigError
from mesh.types import LayerSpan, Load, ModelInfo, NodeProfile
from node.config import NodeConfig
from node.engine.sequence import EngineStats
from node.loader import Loader
from node.own_thread import in_own_thread
from node.text.grammar import Vocabularies

MEMORY_SHARE = 0.6
"""Of the memory that is free at the start, where ``--memory`` is not given."""
WEIGHT_SHARE = 0.7
"""Of ``--memory``; the rest is for keys and values."""


class Machine:
    """One machine as its node uses it."""

    def __init__(
        self, config: NodeConfig, flops: float, bandwidth: float, device: str = "cpu", free: int | None = None
    ) -> None:
        """``free``: bytes of the device's memory; ``None``: what the system says of the CPU's."""
        self.holds_layers = holds_layers(config)
        self.device = device
        self.memory_bytes = config.memory or int((free_memory() if free is None else free) * MEMORY_SHARE)
        self.weight_bytes = min(self.memory_bytes, config.weight_memory or int(self.memory_bytes * WEIGHT_SHARE))
        self.kv_bytes = self.memory_bytes - self.weight_bytes if self.holds_layers else 0
        self.threads = config.threads or os.cpu_count() or 1
        self._flops, self._bandwidth = flops, bandwidth

    async def measure_again(self, config: NodeConfig) -> None:
        """What else ran on the machine before can only have made it look slower than it is."""
        found = await measure(config)
        self._flops, self._bandwidth = max(self._flops, found._flops), max(self._bandwidth, found._bandwidth)

    def dtype(self, config: NodeConfig) -> str:
        """The dtype that this node offers models in: what its processor multiplies fast (docs/decisions/0011)."""
        from node.engine.probe import serving_dtype

        return serving_dtype(config.dtype, self.device)

    @staticmethod
    def quantize(config: NodeConfig) -> str:
        """How the weights of models that this node offers are held."""
        return "" if config.quantize == "none" else config.quantize

    def make_engine(self, config: NodeConfig, vocabularies: Vocabularies) -> Any:
        if not self.holds_layers:
            return NoEngine()
        from node.engine.engine import Engine, EngineConfig

        wanted = EngineConfig(kv_bytes=self.kv_bytes, threads=self.threads, device=self.device, exact=config.exact)
        return Engine(wanted, vocabularies)

    async def check_servable(self, model: ModelInfo, folder: Path) -> None:
        """Load one layer and check it, before the model is offered.  Raises ``ConfigError`` naming a kind that no mode
        serves.  A layer that does not fit here is checked by the nodes that it will be placed on."""
        if self.holds_layers and model.layer_bytes + model.embed_bytes <= self.memory_bytes / 2:
            from node.engine.loading import prepare
            from node.engine.span import Part

            part = Part.of_span(0, 1, model.n_layers)
            how = ("off", self.threads, model.quantize, self.device)
            await in_own_thread(prepare, folder, part, model.dtype, *how)

    @staticmethod
    def needed_tensors(folder: Path, names: Sequence[str], start: int, end: int) -> list[str]:
        from node.engine.span import needed_tensors

        return needed_tensors(folder, names, start, end)

    def profile(
        self,
        config: NodeConfig,
        *,
        peer: str,
        api: str,
        models: tuple[ModelInfo, ...],
        loader: Loader,
        engine: Any,
        seal_key: bytes,
        draining: bool,
        rtt_ms: float,
        lag_ms: float,
    ) -> NodeProfile:
        """What the node says of itself."""
        stats = engine.stats()
        return NodeProfile(
            name=config.name,
            peer=peer,
            api=api if config.role != "stage" else "",
            role=config.role,
            memory_bytes=self.memory_bytes if self.holds_layers else 0,
            weight_bytes=self.weight_bytes if self.holds_layers else 0,
            flops=self._flops,
            bandwidth=self._bandwidth,
            rtt_ms=rtt_ms,
            hardware=engine.hardware,
            exact=engine.exact,
            models=models,
            spans=loader.spans,
            loading=(loader.loading,) if loader.loading else (),
            fetched=loader.fetched,
            refused=tuple(f"{s.model}[{s.start}:{s.end}]: {why}" for s, why in loader.refused.items()),
            seal_key=seal_key,
            draining=draining,
            load=Load(
                running=stats.running,
                waiting=stats.waiting,
                free_tokens=stats.free_tokens,
                tokens_per_s=stats.tokens_per_s,
                step_ms=stats.step_ms,
                lag_ms=lag_ms,
            ),
        )


class NoEngine:
    """In the place of an engine where a role holds no layers: there is room for nothing."""

    on_results: Callable[[list[Any]], None]
    exact = False
    hardware = ""
    failed = None

    async def stop(self) -> None:
        """Nothing to stop."""

    def stats(self) -> EngineStats:
        return EngineStats()

    async def load(self, model: ModelInfo, folder: Path, span: LayerSpan) -> None:
        raise ConfigError(f"this node's role holds no layers of {model.id}")

    async def unload(self, span: LayerSpan) -> None:
        raise ConfigError(f"this node holds no layers of {span.model}")

    def open(self, spec: Any) -> None:
        raise CapacityError("this node's role holds no layers")


def holds_layers(config: NodeConfig) -> bool:
    return config.role in ("any", "stage")


def free_memory() -> int:
    """Bytes that new processes may take without swapping; half of the physical memory where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


async def measure(config: NodeConfig) -> Machine:
    """A small product and a small matrix-vector product on the device that will serve (well under a second).

    Raises ``ConfigError`` where there is no such device.
    """
    if not holds_layers(config):
        return Machine(config, 0.0, 0.0)
    return await in_own_thread(_measured, config)


def _measured(config: NodeConfig) -> Machine:
    from node.engine.probe import device_memory, probe, serving_device, serving_dtype

    device = serving_device(config.device)
    free = None if device == "cpu" else device_memory(device)
    threads = config.threads or os.cpu_count() or 1
    found = probe(threads, serving_dtype(config.dtype, device), device)
    return Machine(config, found.flops, found.bandwidth, device, free)
