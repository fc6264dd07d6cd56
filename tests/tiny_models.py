"""Tiny models with random weights, of many architectures: written like any checkpoint, for tests.

``write_tiny("llama", folder)`` writes the same bytes on every machine of one torch build (seed 0).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

VOCABULARY = 256
MOST_PARAMETERS = 10_000_000
"""A configuration that the common sizes below do not make tiny is refused before it is built."""
_COMMON: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "ffn_dim": 96},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "num_heads": 4},
    **{"n_embd": 64, "n_head": 4, "n_positions": 512, "d_model": 64, "n_heads": 4, "max_seq_len": 512, "d_ff": 96},
    **{"embedding_size": 64, "word_embed_proj_dim": 64, "rotary_dim": 8, "is_decoder": True},
    # experts
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_k": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1},
    # attention of many kinds
    **{"sliding_window": 24, "use_sliding_window": True, "query_pre_attn_scalar": 16, "attention_chunk_size": 24},
    **{"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    **{"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8},
    **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0},
    # state spaces and linear attention
    **{"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2},
    **{"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "state_size": 8},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_SAME_HEADS = {"num_key_value_heads": 4}
_LATENT = {**_SAME_HEADS, "head_dim": 8}
"""Latent attention: as many key heads as query heads, and the rotary part's size as the head's."""
_OWN: dict[str, dict[str, Any]] = {
    "qwen3": {"max_window_layers": 2},
    "qwen2": {"max_window_layers": 2},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "bloom": {"num_attention_heads": None, "num_hidden_layers": None},
    "gpt2": {"num_attention_heads": None},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("youtu", "minicpm3", "longcat_flash", "axk1", "axk2", "bailing_hybrid"), _LATENT),
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": _SAME_HEADS,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]], "window_size": 24},
    "mamba2": {"num_heads": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2}, "ffn_config": {"ffn_hidden_size": 32}},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 3},
}


def tiny_config(model_type: str, layers: int = 4, **over: Any) -> Any:
    """The configuration of a tiny model of ``model_type``; ``over`` wins over everything."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    wanted = {**_COMMON, **dict.fromkeys(_LAYER_COUNTS, layers)}
    known = _fields(kind)
    values = {name: value for name, value in wanted.items() if name in known}
    values |= _OWN.get(model_type, {}) | over
    return kind(**{name: value for name, value in values.items() if value is not None})


def _fields(kind: type) -> set[str]:
    names: set[str] = set()
    for base in kind.__mro__:
        names |= set(getattr(base, "__annotations__", {}))
        if "__init__" in vars(base):
            names |= set(inspect.signature(base.__init__).parameters)
    return names | set(getattr(kind, "attribute_map", None) or {})


def write_tiny(
    model_type: str,
    folder: Path,
    layers: int = 4,
    *,
    tokenizer: bool = False,
    dtype: str = "float32",
    shard_size: str = "200KB",
    **over: Any,
) -> Path:
    """Write a tiny ``model_type`` into ``folder`` (made if missing) and return it.

    Weights are large enough that logits differ clearly: a wrong mask or position changes tokens.
    """
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = tiny_config(model_type, layers, **over)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"a tiny configuration still has {size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = kind(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim < 2:
                weight.add_(noise * 0.1)
            else:
                weight.copy_(noise * (0.5 if "embed" in name or "wte" in name else 0.12))
    model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    if tokenizer:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of ``VOCABULARY`` ids with a chat template: ids 0-2 are special, bytes follow."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - len(specials)]
    vocabulary = {token: i for i, token in enumerate([*specials, *letters])}
    model = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder)


def write_words(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A tokenizer that spells token 17 as the word ``t17``: a random model's text then names its tokens."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *(f"t{index}" for index in range(3, vocabulary))]
    words = Tokenizer(WordLevel({name: index for index, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    fast.save_pretrained(folder)
    return folder
