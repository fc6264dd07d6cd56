"""What the machine says of itself."""

from __future__ import annotations

import time

import pytest
import torch

from node.engine.exact import hardware_class
from node.engine.probe import probe, serving_dtype

CPU = torch.device("cpu")


def test_a_probe_is_short_and_plausible() -> None:
    began = time.process_time()
    speed = probe(1, "float32")
    assert time.process_time() - began < 1.0  # a third of it on a quiet machine
    assert 1e8 < speed.flops < 1e15
    assert 1e8 < speed.bandwidth < 1e13


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_a_dtype_asked_for_is_taken(asked: str) -> None:
    assert serving_dtype(asked) == asked


def test_auto_takes_what_the_device_multiplies_fast() -> None:
    assert serving_dtype("auto", "cuda:0") == "bfloat16"
    assert serving_dtype("auto") in ("float32", "bfloat16")


def test_the_hardware_class_is_stable_and_names_the_dtype() -> None:
    first = hardware_class(CPU, torch.float32)
    assert first == hardware_class(CPU, torch.float32)
    assert first.startswith("cpu/")
    assert "float32" in first
