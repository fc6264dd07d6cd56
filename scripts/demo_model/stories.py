"""Stories, counting and lists: text that goes on for a while and then ends."""

import random

from demo_model.words import ANIMALS, COLOURS, DRINKS, JOBS, OBJECTS, World, article, plural, split

MOODS = split("happy brave kind clever quiet old young hungry tired friendly")
PLACES = split("forest valley village garden mountain river island meadow harbour castle")
WEATHERS = split("warm cold windy rainy sunny foggy")
HELPS = (
    "{f} gave {h} some {d}.",
    "{f} showed {h} the way to the {p}.",
    "{f} helped {h} to look for the {o}.",
    "{f} told {h} about a {p} far away.",
    "{f} sang a song, and {h} danced.",
)
DEEDS = (
    "{h} walked to the {p}.",
    "{h} sat down and ate some {d}.",
    "{h} looked under a {c} stone, but the {o} was not there.",
    "{h} asked {article} {j} for help.",
    "{h} climbed a tall tree and saw the {p}.",
    "{h} slept under a tree.",
    "{h} crossed the {p} on a small boat.",
    "{h} found a {c} feather and kept it.",
)
DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split("January February March April May June July August September October November December")
NUMBER_WORDS = split("zero one two three four five six seven eight nine ten eleven twelve")
ORDINALS = split("first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth")


def story(rng: random.Random, hero: str, animal: str, thing: str, days: int) -> str:
    """A search that takes `days` days of about 25 tokens each; hero, friend and thing stay the same throughout."""
    world = World(rng)
    friend = world.draw("person")
    home, colour, mood = rng.choice(PLACES), rng.choice(COLOURS), rng.choice(MOODS)
    lines = [
        f"Once upon a time there was {article(mood)} {mood} {animal} called {hero}, who lived in a {home}.",
        f"{hero} had {article(colour)} {colour} {thing} and loved it very much.",
        f"One {rng.choice(WEATHERS)} day the {thing} was gone.",
    ]
    for day in range(days):
        deed, help_ = rng.choice(DEEDS), rng.choice(HELPS)
        job = rng.choice(JOBS)
        words = {
            "h": hero,
            "f": friend,
            "o": thing,
            "p": rng.choice(PLACES),
            "d": rng.choice(DRINKS),
            "c": rng.choice(COLOURS),
            "j": job,
            "article": article(job),
        }
        when = f"On the {ORDINALS[day]} day" if days > 1 else "That day"
        lines.append(f"{when} {deed.format(**words)}")
        if day == 0:
            lines.append(f"There {hero} met a friend called {friend}.")
        else:
            lines.append(help_.format(**words))
    lines.append(f"At last {hero} found the {thing} in the {rng.choice(PLACES)}.")
    lines.append(f"{hero} and {friend} were happy and went home. The end.")
    return " ".join(lines)


def story_request(rng: random.Random, progress: float) -> tuple[str, str]:
    """A request and its story; half of the requests name the hero, which the story must then pick up."""
    world = World(rng)
    hero, animal, thing = world.draw("person"), rng.choice(ANIMALS), rng.choice(OBJECTS)
    long = rng.random() < 0.25 + 0.25 * progress
    size = "long" if long else rng.choice(("short", ""))
    days = rng.randint(6, 12 if progress > 0.5 else 8) if long else rng.randint(1, 3)
    ask = rng.choice(("Tell me a {s} story", "Tell a {s} story", "Write a {s} story", "Please tell me a {s} story"))
    about = rng.choice(
        (
            " about {a} {t} called {h}",
            " about {a} {t} called {h} and {b} {o}",
            " about {a} {t}",
            " about {a} {t} and {b} {o}",
            "",
        )
    )
    request = (
        (ask + about).format(s=size, a=article(animal), t=animal, h=hero, b=article(thing), o=thing).replace("  ", " ")
    )
    if size == "":
        request = request.replace("a story", "a story")
    return request + rng.choice((".", ".", "")), story(rng, hero, animal, thing, days)


def counting(rng: random.Random, progress: float) -> tuple[str, str]:
    start = rng.choice((1, 1, rng.randint(1, 60)))
    span = rng.randint(3, 20) if rng.random() < 0.8 or progress < 0.5 else rng.randint(20, 100)
    end = min(start + span, 120)
    ask = rng.choice(("Count from {a} to {b}.", "Please count from {a} to {b}.", "Count up from {a} to {b}."))
    return ask.format(a=start, b=end), ", ".join(map(str, range(start, end + 1))) + "."


def listing(rng: random.Random) -> tuple[str, str]:
    """A fixed list, or so many things of a kind, numbered line by line."""
    if rng.random() < 0.3:
        what, items = rng.choice((("days of the week", DAYS), ("months of the year", MONTHS)))
        ask = rng.choice(("What are the {w}?", "List the {w}.", "Name the {w}."))
        return ask.format(w=what), ", ".join(items) + "."
    count = rng.randint(2, 10)
    what, pool = rng.choice((("animals", ANIMALS), ("colours", COLOURS), ("jobs", JOBS), ("things", OBJECTS)))
    ask = rng.choice(("List {n} {w}.", "Name {n} {w}.", "Give me a list of {n} {w}.", "Write down {n} {w}."))
    number = rng.choice((str(count), NUMBER_WORDS[count]))
    lines = [f"{i}. {word.capitalize()}" for i, word in enumerate(rng.sample(pool, count), start=1)]
    return ask.format(n=number, w=what), "\n".join(lines)


# What everybody knows: the few facts that the model holds in its weights.
KNOWN = (
    ("What colour is the sky?", "Blue."),
    ("What colour is grass?", "Green."),
    ("What colour is snow?", "White."),
    ("What colour is the night?", "Black."),
    ("What colour is the sun?", "Yellow."),
    ("What colour is a ripe tomato?", "Red."),
    ("What does a cow give?", "Milk."),
    ("What do bees make?", "Honey."),
    ("Where do fish live?", "In water."),
    ("What comes after Monday?", "Tuesday."),
    ("What is the first month of the year?", "January."),
    ("How many days are in a week?", "Seven."),
    ("How many months are in a year?", "Twelve."),
    ("Is fire hot or cold?", "Hot."),
    ("Is ice hot or cold?", "Cold."),
    ("What do you drink in the morning?", "Coffee."),
    ("Who bakes bread?", "A baker."),
    ("Who heals the sick?", "A doctor."),
    ("Who sails a ship?", "A sailor."),
    ("What opens a lock?", "A key."),
    ("What tells the time?", "A clock."),
    ("What is the capital of France?", "Paris."),
    ("What is the capital of Italy?", "Rome."),
    ("What is the capital of Germany?", "Berlin."),
    ("What is the capital of Spain?", "Madrid."),
    ("What is the capital of England?", "London."),
)


def known(rng: random.Random) -> tuple[str, str]:
    draw = rng.random()
    if draw < 0.6:
        return rng.choice(KNOWN)
    if draw < 0.8:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        return rng.choice(("What is {a} plus {b}?", "How much is {a} plus {b}?", "{a} + {b} = ?")).format(
            a=a, b=b
        ), f"{a + b}."
    animal = rng.choice(ANIMALS)
    legs = {"duck": 2, "goose": 2, "hen": 2, "pigeon": 2, "parrot": 2, "bee": 6}.get(animal, 4)
    ask = rng.choice((f"How many legs does {article(animal)} {animal} have?", f"How many legs have {plural(animal)}?"))
    return ask, f"{NUMBER_WORDS[legs].capitalize()}."
