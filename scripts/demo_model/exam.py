"""Held-out examination items, made by the same tables from names, places and numbers that no training passage holds."""

import random
from dataclasses import dataclass

from demo_model import stories
from demo_model.chats import FRAMES, GREETINGS, Chat, Turn, cited, retrieval_prompt
from demo_model.passages import make_passage, tell
from demo_model.styles import exam_styles

KINDS = ("person", "place", "number", "object", "colour", "job", "unknown", "citation")
ITEMS = 200
EXAM_SEED, DEV_SEED = 1_000_001, 2_000_002


@dataclass(frozen=True)
class Item:
    kind: str
    chat: Chat  # ends with the user's turn
    answer: str


def _item(rng: random.Random, kind: str) -> Item:
    wanted = rng.choice(KINDS[:6]) if kind == "citation" else kind
    passage = make_passage(rng, rng.randint(3, 5), exam=True, kind=wanted)
    fitting = passage.unknown if kind == "unknown" else [q for q in passage.questions[0] if q.kind == wanted]
    question = rng.choice(fitting)
    if kind == "citation":
        prompt, where = retrieval_prompt(rng, passage)
        return Item(kind, [Turn("system", prompt), Turn("user", question.text)], cited(question, where))
    text = rng.choice(FRAMES).format(p=tell(rng, passage), q=question.text)
    return Item(kind, [Turn("user", text)], question.answer)


def reading_items(seed: int, count: int = ITEMS) -> list[Item]:
    """`count` questions about unseen passages of three to five facts, the kinds in turn."""
    rng = random.Random(seed)
    return [_item(rng, KINDS[number % len(KINDS)]) for number in range(count)]


def style_items(seed: int, rounds: int = 6) -> list[Item]:
    """Each style asked for in turn, over a reading question, a greeting and a known fact."""
    rng = random.Random(seed)
    items = []
    for number in range(rounds):
        for style in exam_styles(rng):
            passage = make_passage(rng, 2, exam=True)
            question = rng.choice(passage.questions[0])
            ask, answer, sentence = f"{tell(rng, passage)} {question.text}", question.answer, question.sentence
            if number % 3 == 1:
                asks, answer = rng.choice(GREETINGS)
                ask, sentence = rng.choice(asks), answer
            elif number % 3 == 2:
                ask, answer = stories.known(rng)
                sentence = ""
            chat = [Turn("system", style.line), Turn("user", ask)]
            items.append(Item(style.name, chat, style.shape(answer, sentence)))
    return items
