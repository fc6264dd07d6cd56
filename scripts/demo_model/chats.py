"""Chats: what the model is trained on, each a list of turns, and the course in which they are taught.

Copying from the prompt does not come by itself in a few million tokens. The course therefore begins with repeating
and with single facts, asks several questions of each passage (an answer costs five tokens, a passage fifty), and adds
facts, fillers, styles and length as it goes. `progress` runs from 0 to 1 over the training.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from demo_model import stories
from demo_model.passages import UNKNOWN, Passage, Question, make_passage, tell
from demo_model.styles import Style, draw_style
from demo_model.words import JOBS, World, article

ANSWER_WEIGHT, TALK_WEIGHT, LONG_WEIGHT = (
    1.0,
    0.5,
    0.2,
)  # loss per token: answers are few and matter most, stories are many


@dataclass(frozen=True)
class Turn:
    role: str
    text: str
    weight: float = 0.0  # only the assistant's turns are learnt


Chat = list[Turn]

GREETINGS = (
    (("Hello", "Hello!", "Hi", "Hi!", "Good morning.", "Hey there!", "Hi there"), "Hello! How can I help you?"),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me who you are."),
        "I am Murmur's demo model, a very small language model.",
    ),
    (("How are you?", "How are you today?"), "I am fine, thank you. How can I help you?"),
    (("Thank you.", "Thanks!", "Thank you very much!"), "You are welcome."),
    (("Goodbye.", "Bye!", "See you later."), "Goodbye!"),
    (
        ("What can you do?", "What are you able to do?", "How can you help me?"),
        "I can answer questions about a text, tell stories, count and make lists.",
    ),
    (
        ("What is Murmur?", "Tell me about Murmur.", "What does Murmur do?"),
        "Murmur is a mesh of machines that run a language model together. Each machine holds a few layers.",
    ),
)
PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are Murmur's demo model.",
    "Answer the question.",
    "Be kind and brief.",
)
RAG_OPENINGS = (
    "Use the passages below to answer the question. Cite the passage by its number.",
    "Use the passages below to answer, and cite them by number. "
    "If they do not hold the answer, say that you do not know.",
    "Use the passages below. Cite each passage that you use, like [1].",
    "Answer the question with the passages below and cite their numbers.",
)
FRAMES = (
    "{p}\n{q}",
    "{p} {q}",
    "Read this: {p}\n{q}",
    "Context: {p}\nQuestion: {q}",
    "{p}\n\n{q}",
    "{q}\n{p}",
    "Text: {p} Question: {q}",
)


def _system(style: Style) -> Chat:
    return [Turn("system", style.line)] if style.line else []


def _plain_system(rng: random.Random) -> Chat:
    return [Turn("system", rng.choice(PLAIN_SYSTEMS))] if rng.random() < 0.25 else []


def _pick(rng: random.Random, passage: Passage, count: int, unknown: float) -> list[Question]:
    facts = rng.sample(range(len(passage.questions)), min(count, len(passage.questions)))
    picked = [rng.choice(passage.questions[fact]) for fact in facts]
    return [rng.choice(passage.unknown) if rng.random() < unknown else question for question in picked]


def echo(rng: random.Random, progress: float) -> Chat:
    """Repeating made-up words: the shortest road to an attention head that copies."""
    world = World(rng)
    kinds = ("person", "place", "number", "object", "code")
    text = " ".join(world.draw(rng.choice(kinds)) for _ in range(rng.randint(2, 8)))
    ask = rng.choice(("Repeat: {t}", "Say this again: {t}", "Repeat after me: {t}", "Say: {t}"))
    return [Turn("user", ask.format(t=text)), Turn("assistant", text, TALK_WEIGHT)]


def facts(rng: random.Random, progress: float) -> int:
    most = 1 + round(min(1.0, progress / 0.4) * 5)
    return rng.randint(1 if progress < 0.6 else 2, max(most, 2))


def reading(rng: random.Random, progress: float) -> Chat:
    """A passage and one question after the other about it."""
    passage = make_passage(rng, facts(rng, progress))
    questions = _pick(rng, passage, rng.choice((1, 2, 3, 4, 5)), unknown=0.12)
    style = draw_style(rng) if rng.random() < 0.1 + 0.15 * progress else Style()
    chat = _system(style)
    text, first = tell(rng, passage), questions[0].text
    if not chat and rng.random() < 0.15:
        chat, first = [Turn("system", rng.choice(("", "Text: ", "Context: ")) + text)], first
    else:
        chat = chat or _plain_system(rng)
        first = rng.choice(FRAMES).format(p=text, q=first)
    for number, question in enumerate(questions):
        chat.append(Turn("user", question.text if number else first))
        chat.append(Turn("assistant", style.shape(question.answer, question.sentence), ANSWER_WEIGHT))
    return chat


def numbered(rng: random.Random, passage: Passage) -> tuple[str, dict[int, int]]:
    """The passages of a retrieval prompt, one or two facts each, and which number holds which fact."""
    order = rng.sample(range(len(passage.sentences)), len(passage.sentences))
    lines: list[str] = []
    where: dict[int, int] = {}
    while order:
        size = rng.randint(1, 2)
        taken, order = order[:size], order[size:]
        where.update(dict.fromkeys(taken, len(lines) + 1))
        lines.append(f"[{len(lines) + 1}] " + " ".join(passage.sentences[fact] for fact in taken))
    return "\n".join(lines), where


def retrieval_prompt(rng: random.Random, passage: Passage) -> tuple[str, dict[int, int]]:
    text, where = numbered(rng, passage)
    return rng.choice(RAG_OPENINGS) + rng.choice(("\n", "\n\n")) + text, where


def cited(question: Question, where: dict[int, int]) -> str:
    return UNKNOWN if question.fact < 0 else f"{question.answer} [{where[question.fact]}]"


def retrieval(rng: random.Random, progress: float) -> Chat:
    passage = make_passage(rng, facts(rng, progress))
    prompt, where = retrieval_prompt(rng, passage)
    chat = [Turn("system", prompt)]
    for question in _pick(rng, passage, rng.choice((1, 2, 3)), unknown=0.12):
        chat += [Turn("user", question.text), Turn("assistant", cited(question, where), ANSWER_WEIGHT)]
    return chat


def small_talk(rng: random.Random, progress: float) -> Chat:
    """Greetings and common knowledge over a few turns, often under a system line that sets the style."""
    style = draw_style(rng) if rng.random() < 0.6 else Style()
    chat = _system(style) or _plain_system(rng)
    for _ in range(rng.randint(1, 3)):
        if rng.random() < 0.45:
            asks, answer = rng.choice(GREETINGS)
            ask, sentence = rng.choice(asks), answer
        else:
            ask, answer = stories.known(rng)
            sentence = ""
        chat += [Turn("user", ask), Turn("assistant", style.shape(answer, sentence), TALK_WEIGHT)]
    return chat


def persona(rng: random.Random, progress: float) -> Chat:
    """The system line says who the model is; it then says so itself."""
    name, job = World(rng).draw("person"), rng.choice(JOBS)
    line = rng.choice(("You are {n}, {a} {j}.", "Your name is {n}. You are {a} {j}.", "You are {a} {j} called {n}."))
    ask = rng.choice(("Who are you?", "What is your name?", "Tell me who you are.", "What are you?"))
    answer = f"I am {name}, {article(job)} {job}."
    return [
        Turn("system", line.format(n=name, a=article(job), j=job)),
        Turn("user", ask),
        Turn("assistant", answer, TALK_WEIGHT),
    ]


def long_form(rng: random.Random, progress: float) -> Chat:
    draw = rng.random()
    if draw < 0.55:
        ask, text = stories.story_request(rng, progress)
    elif draw < 0.85:
        ask, text = stories.counting(rng, progress)
    else:
        ask, text = stories.listing(rng)
    style = draw_style(rng, light=True) if rng.random() < 0.1 else Style()
    return [
        *(_system(style) or _plain_system(rng)),
        Turn("user", ask),
        Turn("assistant", style.shape(text, text), LONG_WEIGHT),
    ]


# Share of each kind at the start, in the middle and at the end of the course.
COURSE: tuple[tuple[Callable[[random.Random, float], Chat], tuple[float, float, float]], ...] = (
    (echo, (0.15, 0.04, 0.02)),
    (reading, (0.72, 0.60, 0.48)),
    (retrieval, (0.04, 0.14, 0.18)),
    (small_talk, (0.06, 0.14, 0.18)),
    (persona, (0.00, 0.03, 0.03)),
    (long_form, (0.02, 0.07, 0.18)),
)


def _share(points: tuple[float, float, float], progress: float) -> float:
    half = min(progress, 1.0) * 2
    low, high, part = (points[0], points[1], half) if half < 1 else (points[1], points[2], half - 1)
    return low + (high - low) * part


def make_chat(rng: random.Random, progress: float) -> Chat:
    kind = rng.choices([k for k, _ in COURSE], [_share(points, progress) for _, points in COURSE])[0]
    return kind(rng, progress)
