"""A byte-level BPE tokenizer of 1,024 tokens with a chat template.

The cut before a capital letter is the point: " Mira" in a passage and "Mira" at the start of an answer have the same
tokens (the space is a token of its own), and so have the digits of a number. An answer then is a literal copy of
tokens of the prompt.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.chats import Chat, make_chat

VOCABULARY = 1024  # tokens
PAD, BOS, SYSTEM, USER, ASSISTANT, END = SPECIAL = (
    "<|pad|>",
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_WORDS = Regex(r" ?\p{Ll}+|\p{Lu}\p{Ll}*|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\s\S)|\s")


def _texts(seed: int, chats: int) -> Iterator[str]:
    rng = random.Random(seed)
    for number in range(chats):
        for turn in make_chat(rng, number / chats):
            yield turn.text


def train_tokenizer(seed: int, chats: int = 20_000) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(_texts(seed, chats), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def encode(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> tuple[list[int], list[float]]:
    """Token ids as the chat template lays them out, and the loss weight of each; an answer includes its end token."""
    special = tokenizer.convert_tokens_to_ids
    ids, weights = [special(BOS)], [0.0]
    for turn in chat:
        content = tokenizer.encode(turn.text.strip(), add_special_tokens=False)
        ids += [special(f"<|{turn.role}|>"), *content, special(END)]
        weights += [0.0, *[turn.weight] * len(content), turn.weight]
    return ids, weights
