"""Held-out examination items, made by the same tables from names, places and numbers that no training passage holds."""

import random
from dataclasses import dataclass

from demo_model import stories
from demo_model.chats import FRAMES, GREETINGS, Chat, Turn, cited, retrieval_prompt
from demo_model.passages import Passage, Question, make_passage, tell
from demo_model.styles import exam_styles

KINDS = ("person", "place", "number", "object", "colour", "job", "unknown")
ITEMS = 200
EXAM_SEED, DEV_SEED = 1_000_001, 2_000_002


@dataclass(frozen=True)
class Item:
    kind: str
    chat: Chat  # ends with the user's turn
    answer: str


def _question(rng: random.Random, kind: str) -> tuple[Passage, Question]:
    passage = make_passage(rng, rng.randint(3, 5), exam=True, kind=kind)
    fitting = passage.unknown if kind == "unknown" else [q for q in passage.questions[0] if q.kind == kind]
    return passage, rng.choice(fitting)


def _item(rng: random.Random, kind: str) -> Item:
    passage, question = _question(rng, kind)
    text = rng.choice(FRAMES).format(p=tell(rng, passage), q=question.text)
    return Item(kind, [Turn("user", text)], question.answer)


def reading_items(seed: int, count: int = ITEMS) -> list[Item]:
    """`count` questions about unseen passages of three to five facts, the kinds in turn."""
    rng = random.Random(seed)
    return [_item(rng, KINDS[number % len(KINDS)]) for number in range(count)]


def citation_items(seed: int, count: int = 48) -> list[Item]:
    """Questions over numbered passages in the system message, as retrieval asks them: the answer, then its passage."""
    rng = random.Random(seed)
    items = []
    for number in range(count):
        passage, question = _question(rng, KINDS[number % len(KINDS)])
        prompt, where = retrieval_prompt(rng, passage)
        chat = [Turn("system", prompt), Turn("user", question.text)]
        items.append(Item(question.kind, chat, cited(question, where)))
    return items


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
