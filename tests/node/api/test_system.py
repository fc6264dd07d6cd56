"""Probes, models, metrics, tokenizing, status."""

from __future__ import annotations

import io
import json
import logging

import pytest
import structlog

from node.telemetry import Telemetry, get_logger, setup_logging
from tests.fakes import make_tokenizer
from tests.node.api.conftest import Http, chat_body


async def test_probes(http: Http) -> None:
    assert await http.get("/health") == (200, {"status": "ok"})
    assert await http.get("/ready") == (200, {"ready": True, "degraded": None})
    assert await http.get("/version") == (200, {"version": "0.0.test"})
    http.service.degraded = "no majority"
    assert await http.get("/ready") == (200, {"ready": True, "degraded": "no majority"})
    http.service.is_ready = (False, "layers [4, 8) of demo are held by nobody")
    status, body = await http.get("/ready")
    assert (status, body["ready"], body["why"]) == (503, False, "layers [4, 8) of demo are held by nobody")
    assert body["error"]["code"] == "not_ready"


async def test_models(http: Http) -> None:
    status, body = await http.get("/v1/models")
    assert (status, body["object"]) == (200, "list")
    assert [(m["id"], m["object"], m["max_model_len"]) for m in body["data"]] == [("demo", "model", 256)]
    assert (await http.get("/v1/models/demo"))[1] == body["data"][0]


async def test_status_is_the_services(http: Http) -> None:
    assert (await http.get("/mesh/status"))[1]["name"] == "ann"


async def test_tokenizing_there_and_back(http: Http) -> None:
    text = "The quick brown fox 😀"
    _, body, _ = await http.post("/tokenize", {"model": "demo", "prompt": text, "return_token_strs": True})
    assert body["tokens"] == make_tokenizer().encode(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    _, back, _ = await http.post("/detokenize", {"tokens": body["tokens"]})
    assert back["prompt"] == text
    _, body, _ = await http.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]})
    assert make_tokenizer().decode(body["tokens"], special=True) == "<|user|>Hi<|end|><|assistant|>"
    status, body, _ = await http.post("/detokenize", {"tokens": [-1]})
    assert (status, body["error"]["param"]) == (400, "tokens")
    status, body, _ = await http.post("/tokenize", {})
    assert (status, body["error"]["param"]) == (400, "prompt")
    _, info = await http.get("/tokenizer_info")
    assert info["eos_token_ids"] == [1, 6]


async def test_a_long_text_is_tokenized_off_the_loop(http: Http) -> None:
    text = "The quick brown fox. " * 5_000
    _, body, _ = await http.post("/tokenize", {"prompt": text})
    assert body["tokens"] == make_tokenizer().encode(text)


async def test_metrics_count_what_happened(http: Http) -> None:
    await http.chat()
    await http.chat(max_tokens=2)
    await http.chat(temperature=-1)
    async with http.session.get("/metrics") as answer:
        assert answer.content_type == "text/plain"
        lines = (await answer.text()).splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['mesh_request_success_total{finished_reason="stop"}'] == "1.0"
    assert values['mesh_request_success_total{finished_reason="length"}'] == "1.0"
    assert values['mesh_request_failure_total{code="out_of_range"}'] == "1.0"
    assert values["mesh_time_to_first_token_seconds_count"] == "2.0"
    assert values["mesh_e2e_request_latency_seconds_count"] == "2.0"
    assert values["mesh_num_requests_running"] == "0.0"
    assert float(values["mesh_generation_tokens_total"]) == sum(g.drawn for g in http.service.opened)
    assert not any("_created" in line for line in lines)


def test_the_vocabulary_of_metrics() -> None:
    names = {metric.name for metric in Telemetry().registry.collect()}
    wanted = [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_ratio",
        "time_to_first_token_seconds",
        "inter_token_latency_seconds",
        "e2e_request_latency_seconds",
        "queue_time_seconds",
        "prompt_tokens",
        "generation_tokens",
        "request_success",
        "num_preemptions",
        "prefix_cache_queries",
        "prefix_cache_hits",
        "members",
        "hop_latency_seconds",
        "hop_bytes",
        "recoveries",
        "recovery_pause_seconds",
        "positions_replayed",
        "checkpoint_bytes",
        "checkpoint_disk_bytes",
        "checkpoint_disk_read_bytes",
        "checkpoint_dropped_bytes",
        "suspicions",
        "elections",
        "cert_expiry_seconds",
        "rag_chunks",
    ]
    assert {f"mesh_{name}" for name in wanted} <= names


def test_two_nodes_in_one_process_count_apart() -> None:
    one, other = Telemetry(), Telemetry()
    one.prompt_tokens.inc(5)
    assert b"mesh_prompt_tokens_total 5.0" in one.render()
    assert b"mesh_prompt_tokens_total 0.0" in other.render()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.mark.parametrize("form", ["text", "json"])
def test_logs(log: io.StringIO, form: str) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        setup_logging(form, "info", log)  # type: ignore[arg-type]
        get_logger("api").info("request", status=200)
        get_logger("api").debug("not shown")
        logging.getLogger("aiohttp.server").error("a library speaks")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        structlog.reset_defaults()
    first, second = log.getvalue().strip().splitlines()
    if form == "json":
        assert {"event": "request", "status": 200, "level": "info"}.items() <= json.loads(first).items()
        assert json.loads(second)["event"] == "a library speaks"
    else:
        assert "request" in first
        assert "status=200" in first


async def test_no_text_of_prompts_or_answers_is_logged(http: Http, capsys: pytest.CaptureFixture[str]) -> None:
    await http.chat()
    await http.post("/v1/chat/completions", chat_body(messages=[{"role": "user", "content": "secretword"}]))
    out = capsys.readouterr()
    assert "secretword" not in out.out + out.err
    assert "Hello there" not in out.out + out.err
