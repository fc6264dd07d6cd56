"""From a training state to a model folder that transformers opens."""

import os
import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model.decoder import Decoder

DTYPE = torch.bfloat16
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def to_transformers(decoder: Decoder) -> LlamaForCausalLM:
    """The same model as transformers' class; a network that has not yet grown is grown first, which changes nothing."""
    if len(decoder.model.layers) < decoder.config.num_hidden_layers:
        decoder.grow()
    model = LlamaForCausalLM(decoder.config)
    model.load_state_dict({**decoder.state_dict(), "lm_head.weight": decoder.model.embed_tokens.weight})
    model.generation_config = GenerationConfig(
        bos_token_id=decoder.config.bos_token_id,
        eos_token_id=decoder.config.eos_token_id,
        pad_token_id=decoder.config.pad_token_id,
        do_sample=False,
    )
    return model


def export(decoder: Decoder, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes beside the folder first, then moves file by file: a reader never sees half a file."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as part:
        to_transformers(decoder).to(DTYPE).save_pretrained(part)
        tokenizer.save_pretrained(part)
        for name in MODEL_FILES:
            (Path(part) / name).chmod(0o644)
            os.replace(Path(part) / name, folder / name)
