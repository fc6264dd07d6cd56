"""Rotary embeddings that follow the longest sequence of a forward: nobody's tokens may depend on his company."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.node.engine.chain import Chain
from tests.tiny_models import write_tiny

FORMS = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_short_sequence_beside_a_long_one_has_its_own_tokens(tmp_path: Path, form: str) -> None:
    folder = write_tiny("llama", tmp_path, 2, max_position_embeddings=64, rope_parameters=FORMS[form])
    short, long = list(range(3, 33)), [3 + 7 * i % 250 for i in range(90)]
    chain = Chain((0, 1, 2))
    await chain.load(folder, 2)
    assert {loaded.mode for engine in chain.engines for loaded in engine.loaded} == {"compat"}
    assert form in chain.engines[0].loaded[0].why
    alone = [(await chain.generate([prompt], 12))[0] for prompt in (short, long)]
    assert await chain.generate([short, long], 12) == alone
    assert await chain.generate([long, short], 12) == alone[::-1]
    await chain.stop()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out = model.generate(
        torch.tensor([short]),
        attention_mask=torch.ones(1, len(short), dtype=torch.long),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=None,
    )
    assert out[0, len(short) :].tolist() == alone[0]
