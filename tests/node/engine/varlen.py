"""torch's attention over pages, written out in plain torch: it runs on every device."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

SIGNATURE = inspect.signature(varlen_attn)


def written_out(*args: Any, **kwargs: Any) -> torch.Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` says that it does, and what its kernel refuses."""
    given = SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    query, table, used = a["query"], a["block_table"], a["seqused_k"]
    assert a["num_splits"] == 1
    assert {t.dtype for t in (table, used, a["cu_seq_q"], a["cu_seq_k"])} == {torch.int32}
    assert all(t.is_contiguous() for t in (table, used, a["key"], a["value"]))
    assert query.stride(-1) == 1
    assert a["key"].shape[1] % 256 == 0
    count = used.shape[0]
    assert a["cu_seq_q"].shape == a["cu_seq_k"].shape == (count + 1,)
    assert table.shape[0] == count
    assert a["cu_seq_q"].tolist()[-1] == query.shape[0], "rows without a sequence are not written"
    out = torch.empty_like(query)
    left, right = a["window_size"]
    assert right == 0
    for i, (first, end) in enumerate(itertools.pairwise(a["cu_seq_q"].tolist())):
        length = used.tolist()[i]
        assert end - first <= a["max_q"]
        assert length <= a["max_k"]
        keys, values = (a[name][table[i].long()].flatten(0, 1)[:length].transpose(0, 1) for name in ("key", "value"))
        positions = torch.arange(length - (end - first), length, device=query.device)[:, None]
        columns = torch.arange(length, device=query.device)
        seen = (columns <= positions) & ((columns >= positions - left) | (left < 0))
        rows = query[first:end].transpose(0, 1)
        found = F.scaled_dot_product_attention(
            rows, keys, values, attn_mask=seen, scale=a["scale"], enable_gqa=a["enable_gqa"]
        )
        out[first:end] = found.transpose(0, 1)
    return out
