"""How much memory a model's parts take, and its other vital figures, from its configuration and its tensor table.

Tensors belong to a layer by the first number in their name (``model.layers.7.mlp...``, ``transformer.h.7...``);
whatever has none belongs to the first span when it embeds, else to the last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from mesh.capacity import DTYPE_BYTES
from mesh.errors import ConfigError
from mesh.types import ModelId, ModelInfo
from node.lazy import transformers
from node.weights.manifest import ITEM_BYTES, Manifest, Tensor

_NUMBERED = re.compile(r"(?P<prefix>(?:[^.]+\.)*?)(?P<index>\d+)\.")
_EMBEDDING = re.compile(r"embed_tokens|word_embeddings|wte|wpe|embed_in\b|embed_positions|embeddings?\b|embed\b")
_HEAD = re.compile(r"lm_head|embed_out|output_layer|score\b")
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
WIDENED = {"fp8", "mxfp8", "mxfp4"}
"""Quantized checkpoints (``quant_method``) that transformers widens by itself when it loads them, on any device."""


def model_info(name: str, folder: Path, manifest: Manifest, dtype: str, quantize: str = "") -> ModelInfo:
    """The figures of ``manifest``'s model when served in ``dtype`` (``float32``, ``bfloat16``, ``float16``).

    ``quantize``: ``int8`` or empty.

    Raises ``ConfigError`` for a kind of model that transformers does not know as a causal language model, and for
    a configuration that lacks what is needed.  Imports transformers: call it off the event loop.
    """
    config = _text_config(folder)
    tensors = [tensor for file in manifest.files for tensor in file.tensors]
    n_layers = int(_need(config, folder, "num_hidden_layers", "n_layer", "num_layers"))
    held = partial(served_bytes, dtype=dtype, quantize=quantize)
    layers, outside = _by_layer(tensors, n_layers, held)
    embed = sum(held(tensor) for tensor in outside if _is_embedding(tensor.name))
    head = sum(held(tensor) for tensor in outside if not _is_embedding(tensor.name))
    tied = 0
    if not any(_HEAD.search(tensor.name) for tensor in outside):
        tied = max((held(t) for t in outside if _is_embedding(t.name)), default=0)
    return ModelInfo(
        id=ModelId(name),
        manifest=manifest.id,
        n_layers=n_layers,
        layer_bytes=max(layers),
        embed_bytes=embed,
        head_bytes=head + tied,
        tied_bytes=tied,
        hidden_size=int(_need(config, folder, "hidden_size", "n_embd", "d_model")),
        kv_bytes=_kv_values(config, folder) * DTYPE_BYTES[dtype],
        vocab_size=int(_need(config, folder, "vocab_size")),
        max_context=int(_need(config, folder, "max_position_embeddings", "n_positions", "max_seq_len", "seq_length")),
        dtype=dtype,
        quantize=quantize,
    )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands; raises ``ConfigError``."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        raise ConfigError(f"model folder {folder} has no config.json") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{folder / 'config.json'} names no model_type")
    return config


def served_bytes(tensor: Tensor, dtype: str, quantize: str = "") -> int:
    """Bytes of a tensor in memory: floating-point weights are held in ``dtype``, others as they are.

    Quantized, matrices take a byte a number and a scale of two bytes a row.
    """
    packed = tensor.dtype == "U8" and tensor.name.endswith("_blocks")  # mxfp4: two numbers a byte
    if tensor.dtype not in _FLOATS and not packed:
        return tensor.size
    numbers = tensor.size * 2 if packed else tensor.size // ITEM_BYTES[tensor.dtype]
    if quantize and len(tensor.shape) > 1 and tensor.shape[-1]:
        return numbers * DTYPE_BYTES[quantize] + numbers // tensor.shape[-1] * 2
    return numbers * DTYPE_BYTES[dtype]


def _text_config(folder: Path) -> Any:
    """transformers' configuration object of the language model in the folder."""
    raw = read_config(folder)
    kind = raw["model_type"]
    _require_loadable(folder, raw)
    auto_config = transformers().AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ConfigError(
            f"model folder {folder}: model_type {kind!r} is not a causal language model that the installed "
            "transformers knows (code that comes with a model is never run)"
        )
    try:
        return auto_config.from_pretrained(folder, trust_remote_code=False, local_files_only=True).get_text_config()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{folder / 'config.json'} is not a configuration of kind {kind!r}: {error}") from None


def _require_loadable(folder: Path, raw: dict[str, Any]) -> None:
    text = raw.get("text_config")
    stored = raw.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if stored and method not in WIDENED:
        raise ConfigError(
            f"model folder {folder}: its weights are quantized by {str(method or 'bitsandbytes')!r}, which needs "
            "libraries or devices that this version does not use: offer the unquantized checkpoint, with --quantize "
            f"int8 to hold it in 8 bits (quantized ones that can be loaded: {', '.join(sorted(WIDENED))})"
        )


def _need(config: Any, folder: Path, *names: str) -> Any:
    """The first of these fields that is a positive number."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value > 0:
            return value
    raise ConfigError(f"{folder / 'config.json'} has no usable {names[0]}")


def _kv_values(config: Any, folder: Path) -> int:
    """Numbers kept of one token in one layer: keys and values of all key-value heads.

    Latent attention (``qk_nope_head_dim``) is counted expanded, as transformers caches it.
    """
    heads = int(_need(config, folder, "num_attention_heads", "n_head", "n_heads"))
    if getattr(config, "qk_nope_head_dim", None):
        return heads * int(config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    kv_heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    hidden = int(_need(config, folder, "hidden_size", "n_embd", "d_model"))
    return 2 * int(kv_heads) * int(getattr(config, "head_dim", None) or hidden // heads)


def _by_layer(
    tensors: Iterable[Tensor], n_layers: int, held: Callable[[Tensor], int]
) -> tuple[list[int], list[Tensor]]:
    """Bytes of each layer, and the tensors outside any; the numbered family with the most bytes are the layers."""
    families: dict[str, dict[int, list[Tensor]]] = {}
    outside = []
    for tensor in tensors:
        match = _NUMBERED.match(tensor.name)
        if match is None:
            outside.append(tensor)
        else:
            families.setdefault(match["prefix"], {}).setdefault(int(match["index"]), []).append(tensor)
    if not families:
        raise ConfigError("the weights have no numbered layers: not a model that can be split")
    sizes = {
        prefix: [sum(held(t) for t in family.get(i, [])) for i in range(n_layers)]
        for prefix, family in families.items()
    }
    layers = max(sizes, key=lambda prefix: sum(sizes[prefix]))
    if not all(sizes[layers]):
        absent = [i for i, size in enumerate(sizes[layers]) if not size]
        raise ConfigError(f"the weights lack layers {absent[:8]} of {n_layers} ({layers}N...)")
    others = [t for prefix, family in families.items() if prefix != layers for ts in family.values() for t in ts]
    return sizes[layers], outside + others


def _is_embedding(name: str) -> bool:
    return _EMBEDDING.search(name) is not None and _HEAD.search(name) is None
