"""scripts/bench_gpu without a GPU: what it counts, what it says where there is none, and one run on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

from scripts.gpu_figures import NO_DEVICE, Cost, Limits, main, measure_limits, shares

LLAMA_8B = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}


def test_what_a_token_costs_at_the_least() -> None:
    cost = Cost.of(LLAMA_8B)
    assert cost.weights == pytest.approx(7.5e9, rel=0.01), "8.03 G without the embedding"
    assert cost.kv_bytes == 2 * 32 * 8 * 128 * 2
    limits = Limits(bandwidth=cost.weights * 2.0, flops=cost.weights * 2.0 * 100)
    assert cost.decode(limits, 1, 0) == (1.0, 100.0)
    assert cost.decode(limits, 8, 0) == (8.0, 100.0), "weights are read once for all streams, each computes for itself"
    by_bandwidth, by_flops = cost.decode(limits, 8, 1000)
    assert by_bandwidth == pytest.approx(8 / (1 + 8 * 1000 * cost.kv_bytes / (2 * cost.weights)))
    assert by_flops == pytest.approx(100 / (1 + 4 * 32 * 4096 * 1000 / (2 * cost.weights)))
    assert cost.prefill(limits, 2000)[1] < 100 * cost.weights / (cost.weights - cost.head)


def test_a_goal_that_is_missed() -> None:
    assert shares("", 71.0, (100.0, 1e6), 1.0, (0.7, None))["holds"]
    assert not shares("", 69.0, (100.0, 1e6), 1.0, (0.7, None))["holds"]
    assert not shares("", 69.0, (100.0, 1e6), 1.0, (None, 0.5))["holds"]
    assert shares("", 1.0, (100.0, 1e6), 1.0, (None, None))["goal"] == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == NO_DEVICE
    said = capsys.readouterr()
    assert not said.out
    assert said.err.count("\n") == 1
    assert "--device cuda:0" in said.err


def test_limits_of_this_cpu() -> None:
    limits = measure_limits("cpu", rounds=1)
    assert limits.bandwidth > 1e6
    assert limits.flops > 1e6


def test_a_run_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--device cpu --model tiny --json --streams 1 3 --prompt 9 --tokens 4 --prefill 40 --rounds 1"
    code = main(words.split(" "))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert set(found) == {"bandwidth_tiny", "flops_tiny", "decode_tiny_1", "decode_tiny_3", "prefill_tiny"}
    for name in ("decode_tiny_1", "decode_tiny_3", "prefill_tiny"):
        value = found[name]["value"]
        assert value["tokens_per_s"] > 0
        assert value["generate_tokens_per_s"] > 0
        assert value.keys() >= {"of_bandwidth", "of_flops"}
    assert code == (0 if all(figure["holds"] for figure in found.values()) else 3)
    assert found["decode_tiny_3"]["goal"] == ""
    assert found["decode_tiny_1"]["goal"]
