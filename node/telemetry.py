"""Metrics (one Prometheus registry per node object) and logs (structlog).

Names are vLLM's with the prefix ``mesh_``, so that dashboards carry over.  Labels are bounded: never an address, a
session or a request id.  No prompt or completion text is ever logged.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Literal, TextIO

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

LogFormat = Literal["text", "json"]

REQUEST_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
TOKEN_BUCKETS = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5, 5, 10)
HOP_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Telemetry:
    """All metrics of one node.  Durations are seconds of one process's monotonic clock."""

    def __init__(self) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests()
        self._engine()
        self._mesh()

    def _requests(self) -> None:
        self.running = self._gauge("num_requests_running", "Generations that hold a slot at this node")
        self.waiting = self._gauge("num_requests_waiting", "Generations in this node's queue", "class")
        self.limit = self._gauge("admission_limit", "Generations that run at once before a class waits", "class")
        self.paused = self._gauge("num_requests_paused", "Generations that wait for room in the mesh", "class")
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token", FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a stream", TOKEN_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its end", REQUEST_BUCKETS
        )
        self.queue_time = self._histogram("queue_time_seconds", "Waited for a slot", REQUEST_BUCKETS)
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens taken in")
        self.generation_tokens = self._counter("generation_tokens_total", "Tokens generated")
        self.success = self._counter("request_success_total", "Generations that ended well", "finished_reason")
        self.failure = self._counter("request_failure_total", "Requests answered with an error, by its code", "code")

    def _engine(self) -> None:
        self.kv_usage = self._gauge("kv_cache_usage_ratio", "Used share of key and value memory")
        self.preemptions = self._counter("num_preemptions_total", "Sessions paused to make room")
        self.prefix_queries = self._counter("prefix_cache_queries_total", "Tokens looked up in the prefix cache")
        self.prefix_hits = self._counter("prefix_cache_hits_total", "Tokens found in the prefix cache")
        self.prefix_bytes = self._gauge("prefix_cache_bytes", "Shared pages held, with their checkpointed activations")
        self.rows = self._counter("engine_rows_total", "Positions computed by this node's layers")
        self.checkpoint_bytes = self._gauge("checkpoint_bytes", "Checkpointed activations in memory")
        self.checkpoint_disk_bytes = self._gauge("checkpoint_disk_bytes", "Checkpointed activations on disk")
        self.checkpoint_disk_read = self._counter(
            "checkpoint_disk_read_bytes_total", "Checkpointed activations that were read from disk"
        )
        self.checkpoint_dropped = self._counter(
            "checkpoint_dropped_bytes_total", "Checkpointed activations given up for want of room"
        )

    def _mesh(self) -> None:
        self.members = self._gauge("members", "Members of the mesh", "state")
        self.hop_latency = self._histogram("hop_latency_seconds", "One step at one hop and its way", HOP_BUCKETS)
        self.hop_bytes = self._counter("hop_bytes_total", "Frames between hops, in bytes", "dir")
        self.recoveries = self._counter("recoveries_total", "Faults that sessions outlived", "cause")
        self.recovery_pause = self._histogram("recovery_pause_seconds", "Pause of a recovered stream", HOP_BUCKETS)
        self.positions_replayed = self._counter("positions_replayed_total", "Positions computed again")
        self.suspicions = self._counter("suspicions_total", "Members that this node came to suspect")
        self.elections = self._counter("elections_total", "Elections seen")
        self.cert_expiry = self._gauge("cert_expiry_seconds", "Until the node's certificate ends")
        self.rag_chunks = self._gauge("rag_chunks", "Chunks in the node's collections")

    def _gauge(self, name: str, what: str, *labels: str) -> Gauge:
        return Gauge(f"mesh_{name}", what, labels, registry=self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"mesh_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"mesh_{name}", what, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The registry in Prometheus' text form."""
        return generate_latest(self.registry)


def setup_logging(form: LogFormat = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """structlog for us and, through the same renderer, the standard library's loggers for the libraries."""
    out = sys.stderr if stream is None else stream
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if form == "json"
        else [structlog.dev.ConsoleRenderer(colors=out.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(out)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[remove, *last]))
    logging.basicConfig(handlers=[handler], level=max(logging.INFO, _level(level)), force=True)
    logging.getLogger("node").setLevel(_level(level))


def _level(name: str) -> int:
    return logging.getLevelNamesMapping()[name.upper()]


def get_logger(part: str) -> Any:
    """A logger of one part of the node, as ``api`` or ``gossip``."""
    return structlog.get_logger(f"node.{part}")
