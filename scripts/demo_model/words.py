"""Words of the synthetic world, and names that are made up on the spot.

A model that has seen a name can answer with it from memory. Names, places and numbers are therefore composed, and a
hash splits them once and for all: what falls into the held-out eighth never occurs in a training text, so that an
answer in the examination can only have been copied from the prompt.
"""

import random
import zlib
from dataclasses import dataclass

HELD_OUT_SHARE = 8  # one value in this many is kept for the examination


def split(words: str) -> list[str]:
    return words.split()


JOBS = split(
    "baker farmer teacher doctor sailor painter singer dancer miller tailor smith guard hunter cook driver pilot "
    "writer judge clerk nurse gardener fisher potter weaver builder carpenter plumber barber butcher librarian "
    "musician mayor captain"
)
ANIMALS = split(
    "dog cat goat sheep cow horse hen duck goose pig rabbit pigeon camel donkey parrot turtle bee frog fox bear"
)
PLURALS = {"sheep": "sheep", "goose": "geese", "fox": "foxes"}
OBJECTS = split(
    "lamp key book clock map ring coat hat boat bell drum flute kite ladder mirror basket bottle chair table "
    "blanket candle hammer knife spoon rope letter coin box bag scarf cart wheel violin umbrella apple"
)
COLOURS = split("red blue green yellow black white brown grey pink purple orange golden silver")
LANDMARKS = split(
    "bridge tower school market harbour library museum station garden mill castle temple well theatre bakery"
)
DRINKS = split("tea coffee milk water juice soup bread cheese honey rice fish cake")
EVENTS = split("fair concert race meeting party wedding feast lesson play match")
DOORS = split("door gate safe cellar garage shed cabin vault office attic")
REAL_NAMES = split(
    "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tina Victor "
    "Alice Bob Carol Daniel Eva Frank George Helen Ivan Julia Karl Laura Mark Nora Olga Peter Ruth Simon Tom Zoe "
    "Ada Alan Linus Mary John James"
)
REAL_PLACES = split(
    "Paris London Berlin Rome Madrid Vienna Prague Oslo Dublin Lisbon Athens Cairo Tokyo Delhi Lima Boston "
    "Chicago Geneva Zurich Munich Warsaw Milan Naples Kyoto Sydney Toronto Bergen Porto"
)

_ONSETS = split(
    "Mi To Bar Ke Lu Ra Sel Vo Da Fen Gor Ha Jo Kal Lem Mo Nar O Pe Rin Sa Tar U Ves Wi Yo Zan A E Bel Cor Dri Fa "
    "Gi Hel Is Ker Lo Mar Ni Or Pa Qui Ro Su Ti Vi Wen Xa Zo Bri Cla Dor Eli Fro Gal Hur Ja Kru"
)
_MIDDLES = split("ra li no ve ta mi do sa ri lo ka ne mu pi")
_PERSON_ENDS = split("ra lan vek do mis nor tha li gan sa ro ven dis ka min tor na bel rik la mo s n")
_PLACE_ENDS = split("holm wick mere ton by dale stow burg ham port field gate mar dor stad ville ria nia ros")
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"


def held_out(value: str) -> bool:
    """Whether a made-up value belongs to the examination and must not be trained on."""
    return zlib.crc32(value.encode()) % HELD_OUT_SHARE == 0


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _letters(rng: random.Random) -> str:
    """A name without any of the known syllables, so that copying is learnt letter by letter too."""
    name = "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3)))
    return (name + rng.choice(_CONSONANTS)).capitalize()


@dataclass
class World:
    """One passage's supply of values: no value is given out twice, so that each question has one answer."""

    rng: random.Random
    exam: bool = False

    def __post_init__(self) -> None:
        self._used: set[str] = set()

    def draw(self, kind: str) -> str:
        while True:
            value = self._make(kind)
            composed = kind in ("person", "place", "number", "code", "age")
            if value in self._used or (composed and held_out(value) != self.exam):
                continue
            self._used.add(value)
            return value

    def _make(self, kind: str) -> str:
        rng = self.rng
        match kind:
            case "person":
                return self._name(REAL_NAMES, _PERSON_ENDS, surname=0.15)
            case "place":
                return self._name(REAL_PLACES, _PLACE_ENDS, surname=0.0)
            case "number":
                return str(rng.choice((rng.randint(2, 99), rng.randint(10, 99), rng.randint(100, 999))))
            case "age":
                return str(rng.randint(2, 120))
            case "code":
                return str(rng.randint(1000, 9999))
            case "animals":
                return plural(rng.choice(ANIMALS))
            case _:
                return rng.choice(CLOSED[kind])

    def _name(self, real: list[str], ends: list[str], surname: float) -> str:
        rng = self.rng
        draw = rng.random()
        if draw < 0.15:
            return rng.choice(real)
        if draw < 0.4:
            return _letters(rng)
        middle = rng.choice(_MIDDLES) if rng.random() < 0.3 else ""
        name = rng.choice(_ONSETS) + middle + rng.choice(ends)
        return f"{name} {rng.choice(_ONSETS)}{rng.choice(_PERSON_ENDS)}" if rng.random() < surname else name


CLOSED = {
    "job": JOBS,
    "animal": ANIMALS,
    "object": OBJECTS,
    "colour": COLOURS,
    "landmark": LANDMARKS,
    "food": DRINKS,
    "event": EVENTS,
    "door": DOORS,
}
