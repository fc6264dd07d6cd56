"""The examination: a saved model, plain transformers, greedy decoding."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from demo_model.chats import Chat
from demo_model.exam import Item


@dataclass(frozen=True)
class Mark:
    item: Item
    said: str

    @property
    def exact(self) -> bool:
        return self.said == self.item.answer

    @property
    def answer_exact(self) -> bool:
        """Exact when the number of the cited passage is left aside."""
        return self.said.partition(" [")[0] == self.item.answer.partition(" [")[0]


@dataclass
class Model:
    """A saved model with its tokenizer; answers a chat as any client of transformers would."""

    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, folder: Path) -> "Model":
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        return cls(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)

    def answer(self, chats: list[Chat], max_new_tokens: int) -> list[str]:
        messages = [[{"role": turn.role, "content": turn.text} for turn in chat] for chat in chats]
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
        )
        out = self.network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return self.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def examine(model: Model, items: list[Item], batch: int = 25, max_new_tokens: int = 80) -> list[Mark]:
    marks: list[Mark] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        said = model.answer([item.chat for item in part], max_new_tokens)
        marks += [Mark(item, text) for item, text in zip(part, said, strict=True)]
    return marks


def share(marks: list[Mark]) -> float:
    return sum(mark.exact for mark in marks) / len(marks)


def table(title: str, marks: list[Mark]) -> str:
    """Right answers by kind, then all."""
    asked = Counter(mark.item.kind for mark in marks)
    right = Counter(mark.item.kind for mark in marks if mark.exact)
    rows = [f"{kind:<14} {right[kind]:>4} / {asked[kind]:<4} {right[kind] / asked[kind]:>5.0%}" for kind in asked]
    return "\n".join([title, *rows, f"{'total':<14} {sum(right.values()):>4} / {len(marks):<4} {share(marks):>5.0%}"])


def failures(marks: list[Mark], count: int) -> str:
    wrong = [mark for mark in marks if not mark.exact][:count]
    return "\n".join(f"  {mark.item.kind}: asked for {mark.item.answer!r}, said {mark.said!r}" for mark in wrong)
