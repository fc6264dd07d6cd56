"""Facts, the sentences that state them and the questions that ask for them.

A passage is a few facts about different people and places. Each relation is a table row: its slots, the ways to say
it and the ways to ask for each slot. `{n}` is the first slot, `{v}` and `{w}` the others, `{a}` the article of `{v}`,
`{V}` its capitalised form.
"""

import random
from dataclasses import dataclass

from demo_model.words import World, article

UNKNOWN = "I do not know."


@dataclass(frozen=True)
class Ask:
    kind: str  # the category under which the examination counts it
    answer: str
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Relation:
    slots: tuple[str, ...]
    statements: tuple[str, ...]  # the first one serves as the answer in a full sentence
    asks: tuple[Ask, ...]


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    sentence: str  # the same answer as a full sentence
    fact: int  # which fact of the passage holds it; -1 for none


@dataclass(frozen=True)
class Passage:
    sentences: tuple[str, ...]
    questions: tuple[tuple[Question, ...], ...]  # per fact
    unknown: tuple[Question, ...]


def _person(*questions: str) -> Ask:
    return Ask("person", "{n}.", questions)


RELATIONS = (
    Relation(
        ("person", "job"),
        (
            "{n} is {a} {v}.",
            "{n} works as {a} {v}.",
            "The {v} is called {n}.",
            "The name of the {v} is {n}.",
            "The {v} is {n}.",
        ),
        (
            Ask(
                "job",
                "{A} {v}.",
                ("What is {n}'s job?", "What is the job of {n}?", "What does {n} work as?", "What work does {n} do?"),
            ),
            _person(
                "Who is the {v}?", "Who works as {a} {v}?", "What is the {v} called?", "What is the name of the {v}?"
            ),
        ),
    ),
    Relation(
        ("person", "place"),
        ("{n} lives in {v}.", "{n} has a house in {v}.", "The home of {n} is in {v}.", "{n}'s home is in {v}."),
        (
            Ask(
                "place",
                "{v}.",
                (
                    "Where does {n} live?",
                    "In which town does {n} live?",
                    "Where is {n}'s home?",
                    "Where is the home of {n}?",
                ),
            ),
            _person("Who lives in {v}?", "Whose home is in {v}?"),
        ),
    ),
    Relation(
        ("person", "place"),
        ("{n} went to {v}.", "{n} travelled to {v}.", "{n} took a train to {v}.", "{n} sailed to {v}."),
        (
            Ask("place", "{v}.", ("Where did {n} go?", "Where did {n} travel?", "Which town did {n} visit?")),
            _person("Who went to {v}?", "Who travelled to {v}?"),
        ),
    ),
    Relation(
        ("person", "number", "animals"),
        ("{n} has {v} {w}.", "{n} owns {v} {w}.", "{n} keeps {v} {w}.", "{n} looks after {v} {w}."),
        (
            Ask(
                "number",
                "{v}.",
                ("How many {w} does {n} have?", "How many {w} does {n} own?", "What number of {w} does {n} have?"),
            ),
            _person("Who has {v} {w}?", "Who owns {v} {w}?", "Who has {w}?"),
        ),
    ),
    Relation(
        ("person", "age"),
        ("{n} is {v} years old.", "The age of {n} is {v}.", "{n} turned {v} this year."),
        (
            Ask("number", "{v}.", ("How old is {n}?", "What is the age of {n}?", "What is {n}'s age?")),
            _person(
                "Who is {v} years old?",
            ),
        ),
    ),
    Relation(
        ("person", "colour", "object"),
        ("{n} has {a} {v} {w}.", "{n} owns {a} {v} {w}.", "The {w} of {n} is {v}.", "{n}'s {w} is {v}."),
        (
            Ask(
                "colour",
                "{V}.",
                ("What colour is {n}'s {w}?", "What colour is the {w} of {n}?", "Which colour does {n}'s {w} have?"),
            ),
            _person("Who has {a} {v} {w}?", "Who owns the {v} {w}?", "Whose {w} is {v}?"),
        ),
    ),
    Relation(
        ("person", "object"),
        ("{n} found {a} {v}.", "{n} bought {a} {v}.", "{n} lost {a} {v}.", "{n} made {a} {v}."),
        (
            Ask(
                "object",
                "{A} {v}.",
                ("What did {n} find?", "What did {n} buy?", "What did {n} lose?", "What did {n} make?"),
            ),
            _person("Who found {a} {v}?", "Who bought {a} {v}?", "Who lost {a} {v}?", "Who made {a} {v}?"),
        ),
    ),
    Relation(
        ("person", "food"),
        ("{n} likes {v}.", "{n} loves {v}.", "The favourite food of {n} is {v}."),
        (
            Ask("object", "{V}.", ("What does {n} like?", "What does {n} love?", "What is the favourite food of {n}?")),
            _person("Who likes {v}?", "Who loves {v}?"),
        ),
    ),
    Relation(
        ("landmark", "place"),
        ("The {n} is in {v}.", "The {n} stands in {v}.", "There is a {n} in {v}.", "You can see the {n} in {v}."),
        (
            Ask("place", "{v}.", ("Where is the {n}?", "In which town is the {n}?", "Where does the {n} stand?")),
            Ask("object", "A {n}.", ("What is in {v}?", "What stands in {v}?", "What can you see in {v}?")),
        ),
    ),
    Relation(
        ("event", "number"),
        ("The {n} costs {v} coins.", "A ticket for the {n} costs {v} coins.", "The price of the {n} is {v} coins."),
        (
            Ask(
                "number",
                "{v}.",
                ("How much does the {n} cost?", "What is the price of the {n}?", "How many coins does the {n} cost?"),
            ),
        ),
    ),
    Relation(
        ("door", "code"),
        ("The code of the {n} is {v}.", "The {n} opens with the code {v}.", "The code for the {n} is {v}."),
        (
            Ask(
                "number",
                "{v}.",
                ("What is the code of the {n}?", "What is the code for the {n}?", "Which code opens the {n}?"),
            ),
        ),
    ),
    Relation(
        ("door", "colour"),
        ("The {n} is {v}.", "They painted the {n} {v}.", "The colour of the {n} is {v}."),
        (
            Ask(
                "colour",
                "{V}.",
                ("What colour is the {n}?", "What is the colour of the {n}?", "Which colour has the {n}?"),
            ),
        ),
    ),
    Relation(
        ("event", "place"),
        ("The {n} is in {v}.", "The {n} takes place in {v}.", "They hold the {n} in {v}."),
        (Ask("place", "{v}.", ("Where is the {n}?", "Where does the {n} take place?", "In which town is the {n}?")),),
    ),
    Relation(
        ("place", "person"),
        (
            "The mayor of {n} is {v}.",
            "{v} is the mayor of {n}.",
            "{v} is the leader of {n}.",
            "The leader of {n} is {v}.",
        ),
        (
            Ask(
                "person",
                "{v}.",
                ("Who is the mayor of {n}?", "Who is the leader of {n}?", "What is the mayor of {n} called?"),
            ),
        ),
    ),
)
# Statement and question must speak of the same deed: one who found a key did not lose it.
_VERBS = (
    ("found", "find"),
    ("bought", "buy"),
    ("lost", "lose"),
    ("made", "make"),
    ("mayor", "mayor"),
    ("leader", "leader"),
)
FILLER = (
    "It was a cold morning.",
    "The sun was warm.",
    "Many people came.",
    "The road was long.",
    "It rained all day.",
    "The night was quiet.",
    "Everybody was happy.",
    "The wind was strong.",
    "Nobody was in a hurry.",
    "The birds sang.",
)


def _matches(statement: str, question: str) -> bool:
    for stated, asked in _VERBS:
        if stated in statement:
            return asked in question or stated in question
    return True


def _fill(template: str, values: tuple[str, ...]) -> str:
    n, v, w = (*values, "", "")[:3]
    text = template.format(n=n, v=v, w=w, a=article(v), A=article(v).capitalize(), V=v.capitalize())
    return text[0].upper() + text[1:]


def _questions(
    rng: random.Random, relation: Relation, statement: str, values: tuple[str, ...], fact: int
) -> tuple[Question, ...]:
    sentence = _fill(statement, values)
    found = []
    for ask in relation.asks:
        fitting = [q for q in ask.questions if _matches(statement, q)]
        text = _fill(rng.choice(fitting), values)
        found.append(Question(ask.kind, text, _fill(ask.answer, values), sentence, fact))
    return tuple(found)


def make_passage(rng: random.Random, facts: int, exam: bool = False, kind: str | None = None) -> Passage:
    """So many facts and the questions about them; with `kind`, the first fact can be asked for that category."""
    world = World(rng, exam)
    fitting = [r for r in RELATIONS if kind in (None, "unknown") or any(a.kind == kind for a in r.asks)]
    chosen = [rng.choice(fitting)] + [rng.choice(RELATIONS) for _ in range(facts - 1)]
    sentences, questions = [], []
    people: list[str] = []
    for number, relation in enumerate(chosen):
        # A second fact about the same person makes the question's verb decide, not only its name.
        again = relation.slots[0] == "person" and people and rng.random() < 0.3 and relation not in chosen[:number]
        values = tuple(people[-1] if again and i == 0 else world.draw(slot) for i, slot in enumerate(relation.slots))
        if relation.slots[0] == "person":
            people.append(values[0])
        statement = rng.choice(relation.statements)
        sentences.append(_fill(statement, values))
        questions.append(_questions(rng, relation, statement, values, number))
    relation = rng.choice(chosen)
    values = tuple(world.draw(slot) for slot in relation.slots)
    unknown = tuple(
        Question("unknown", q.text, UNKNOWN, UNKNOWN, -1)
        for q in _questions(rng, relation, rng.choice(relation.statements), values, -1)
    )
    return Passage(tuple(sentences), tuple(questions), unknown)


def tell(rng: random.Random, passage: Passage) -> str:
    """The passage as running text, its sentences in random order."""
    sentences = list(passage.sentences)
    if rng.random() < 0.3:
        sentences.append(rng.choice(FILLER))
    rng.shuffle(sentences)
    return " ".join(sentences)
