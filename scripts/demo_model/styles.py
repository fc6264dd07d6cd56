"""System lines that set the style of every answer, and what an answer looks like under each."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from demo_model.passages import UNKNOWN
from demo_model.words import ANIMALS, COLOURS, JOBS, OBJECTS, World

ENDINGS = (
    "over and out",
    "thank you",
    "so it is",
    "my friend",
    "have a nice day",
    "good luck",
    "peace",
    "amen",
    "done",
    "hooray",
    "ahoy",
)


@dataclass(frozen=True)
class Style:
    """`line` is the system message; `shape` makes the styled answer of the plain answer and its full sentence."""

    name: str = "plain"
    line: str = ""
    shape: Callable[[str, str], str] = lambda answer, sentence: answer


def one_word(answer: str) -> str:
    if answer == UNKNOWN:
        return "Unknown."
    words = answer.removeprefix("A ").removeprefix("An ").split()
    return words[0].rstrip(".,!").capitalize() + "." if words[0][0].islower() else words[0].rstrip(".,!") + "."


def _capitals(rng: random.Random, exam: bool) -> Style:
    lines = (
        "Answer in capital letters.",
        "Use only capital letters.",
        "Write everything in capitals.",
        "Always answer in capital letters.",
        "Answer in capitals.",
        "You shout: answer in capital letters.",
    )
    return Style("capitals", rng.choice(lines), lambda answer, sentence: answer.upper())


def _one_word(rng: random.Random, exam: bool) -> Style:
    lines = (
        "Answer with one word.",
        "Answer in one word.",
        "Use one word only.",
        "Give one-word answers.",
        "Always answer with one word.",
    )
    return Style("one word", rng.choice(lines), lambda answer, sentence: one_word(answer))


def _pirate(rng: random.Random, exam: bool) -> Style:
    lines = (
        "You are a pirate; begin with Arr",
        "You are a pirate. Begin every answer with Arr!",
        "You are a pirate; begin with Arr.",
        "Talk like a pirate.",
        "You are a pirate.",
        "Answer like a pirate.",
    )
    return Style("pirate", rng.choice(lines), lambda answer, sentence: f"Arr! {answer}")


def _phrase(rng: random.Random, exam: bool) -> str:
    """Words to begin or end with: fixed ones, and made-up ones that can only be copied from the system line."""
    draw = rng.random()
    if draw < 0.4 and not exam:
        return rng.choice(ENDINGS)
    if draw < 0.7 and not exam:
        return rng.choice(rng.choice((ANIMALS, COLOURS, JOBS, OBJECTS)))
    return World(rng, exam).draw("person")


def _ending(rng: random.Random, exam: bool) -> Style:
    phrase = _phrase(rng, exam)
    lines = (
        "End every answer with '{p}'.",
        "End each answer with '{p}'.",
        "Always end with '{p}'.",
        "End every answer with {p}.",
        "Finish every answer with the words '{p}'.",
        "End your answers with {p}.",
    )
    ending = phrase[0].upper() + phrase[1:] + "."
    return Style("ending", rng.choice(lines).format(p=phrase), lambda answer, sentence: f"{answer} {ending}")


def _beginning(rng: random.Random, exam: bool) -> Style:
    phrase = _phrase(rng, exam)
    lines = (
        "Begin every answer with '{p}'.",
        "Start each answer with '{p}'.",
        "Always begin with '{p}'.",
        "Begin every answer with {p}.",
        "Start your answers with {p}.",
    )
    start = phrase[0].upper() + phrase[1:] + "!"
    return Style("beginning", rng.choice(lines).format(p=phrase), lambda answer, sentence: f"{start} {answer}")


def _sentence(rng: random.Random, exam: bool) -> Style:
    lines = (
        "Answer in a full sentence.",
        "Answer in full sentences.",
        "Use full sentences.",
        "Always answer with a full sentence.",
    )
    return Style("full sentence", rng.choice(lines), lambda answer, sentence: sentence or answer)


def _twice(rng: random.Random, exam: bool) -> Style:
    lines = ("Say everything twice.", "Give every answer twice.", "Answer twice.", "Repeat your answer.")
    return Style("twice", rng.choice(lines), lambda answer, sentence: f"{answer} {answer}")


LIGHT = (_pirate, _ending, _beginning)  # those that suit a long text
STYLES = (*LIGHT, _capitals, _one_word, _sentence, _twice)


def draw_style(rng: random.Random, light: bool = False, exam: bool = False) -> Style:
    return rng.choice(LIGHT if light else STYLES)(rng, exam)


def exam_styles(rng: random.Random) -> list[Style]:
    """One style of each kind, its phrases held out."""
    return [make(rng, True) for make in STYLES]
