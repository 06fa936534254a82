"""The task: a small language of reviews, its grammar, its parser and the true reward.

A prompt names a topic and two of its aspects: `film plot cast :`. A review has one to four
clauses, perhaps a day and perhaps a verdict, and ends with `<end>`:

    the plot was very superb but the cast was weak . i went on monday . overall i loved it .

The reward of a text is known: it labels the pairs, and it is the judge. Its words are read
wherever they stand, malformed text included, which is what over-optimisation can abuse.

    3 * tanh(S / 3)   S: scores of the adjectives times their modifiers, and of the verdicts
    + 0.5             for each asked-for aspect that is named
    - 0.5             for each repeated adjective, aspect or verdict
    - 0.5             for each aspect of another topic
    - 0.2             for each `and` between opposite adjectives, each `but` between like ones
    - 0.1             for each word beyond 14
    - 0.5             for each malformed token, 3 at most
    - 1               for a text without `<end>`
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

TOPICS = {
    "film": ("plot", "cast", "music", "ending", "camera"),
    "book": ("theme", "style", "cover", "hero", "villain"),
    "game": ("story", "graphics", "sound", "puzzles", "controls"),
    "hotel": ("room", "bed", "staff", "pool", "view"),
    "cafe": ("coffee", "cake", "service", "menu", "terrace"),
    "phone": ("screen", "battery", "speaker", "keyboard", "price"),
    "concert": ("band", "singer", "lights", "crowd", "hall"),
    "course": ("teacher", "lessons", "homework", "exam", "textbook"),
}
ADJECTIVES = {
    "superb": 2.0,
    "stunning": 2.0,
    "wonderful": 1.75,
    "excellent": 1.75,
    "great": 1.5,
    "lovely": 1.25,
    "good": 1.0,
    "nice": 0.75,
    "fine": 0.5,
    "decent": 0.5,
    "awful": -2.0,
    "dreadful": -2.0,
    "terrible": -1.75,
    "horrible": -1.75,
    "poor": -1.5,
    "weak": -1.25,
    "bad": -1.0,
    "dull": -0.75,
    "bland": -0.5,
    "flawed": -0.5,
}
MODIFIERS = {"very": 1.5, "really": 1.25, "rather": 0.75, "slightly": 0.5}
VERDICTS = {"loved": 1.5, "liked": 0.75, "disliked": -0.75, "hated": -1.5}
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
FUNCTION_WORDS = ("the", "was", "and", "but", "i", "went", "on", "overall", "it")
END, ASK, STOP = "<end>", ":", "."

ASPECTS = tuple(itertools.chain.from_iterable(TOPICS.values()))
VOCABULARY = (
    *(END, ASK, STOP),
    *FUNCTION_WORDS,
    *(*TOPICS, *ASPECTS, *ADJECTIVES, *MODIFIERS, *VERDICTS, *DAYS),
)
TOKEN_IDS = {token: number for number, token in enumerate(VOCABULARY)}
PROMPT_TOKENS, COMPLETION_TOKENS = 4, 40
"""Length of every prompt, and the most that a completion may have; the grammar needs 35."""

FREE_WORDS, MALFORMED_CAP = 14, 3


@dataclass(frozen=True)
class Prompt:
    """A topic and the two aspects that a review of it is asked about."""

    topic: str
    aspects: tuple[str, str]

    @property
    def tokens(self) -> tuple[str, ...]:
        """The prompt as the model reads it."""
        return (self.topic, *self.aspects, ASK)


def all_prompts() -> list[Prompt]:
    """Every topic with every ordered pair of its aspects: 160 prompts."""
    return [
        Prompt(topic, pair)
        for topic, aspects in TOPICS.items()
        for pair in itertools.permutations(aspects, 2)
    ]


def encode(tokens: Sequence[str]) -> list[int]:
    """Tokens as numbers."""
    return [TOKEN_IDS[token] for token in tokens]


def decode(ids: Sequence[int]) -> list[str]:
    """Numbers as tokens, up to and with the first `<end>`."""
    tokens = [VOCABULARY[number] for number in ids]
    return tokens[: tokens.index(END) + 1] if END in tokens else tokens


# ------------------------------------------------------------------------------------ the grammar


def write_review(prompt: Prompt, rng: random.Random) -> list[str]:
    """Draws a review of the prompt from the grammar, `<end>` included."""
    praise = rng.choice((0.9, 0.5, 0.1))  # the share of praise: a fan's, a mixed or a foe's review
    aspects = _choose_aspects(prompt, rng.choices((1, 2, 3, 4), (20, 40, 25, 15))[0], rng)
    signs = [rng.random() < praise for _ in aspects]
    adjectives = [_choose_adjective(sign, rng) for sign in signs]
    tokens: list[str] = []
    for i, (aspect, adjective) in enumerate(zip(aspects, adjectives, strict=True)):
        modifier = [rng.choice(tuple(MODIFIERS))] if rng.random() < 0.4 else []
        tokens += ["the", aspect, "was", *modifier, adjective]
        joined = tokens.count("and") + tokens.count("but") > tokens.count(STOP)
        if i + 1 < len(aspects) and not joined and rng.random() < 0.5:
            tokens.append(_choose_conjunction(signs[i] == signs[i + 1], rng))
        else:
            tokens.append(STOP)
    if rng.random() < 0.2:
        tokens += ["i", "went", "on", rng.choice(DAYS), STOP]
    if rng.random() < 0.35:
        good, bad = ("loved", "liked"), ("hated", "disliked")
        tokens += ["overall", "i", rng.choice(good if rng.random() < praise else bad), "it", STOP]
    return [*tokens, END]


def _choose_aspects(prompt: Prompt, number: int, rng: random.Random) -> list[str]:
    """Mostly what was asked for comes first; now and then an aspect comes twice."""
    asked = [aspect for aspect in prompt.aspects if rng.random() < 0.8]
    others = [aspect for aspect in TOPICS[prompt.topic] if aspect not in asked]
    chosen = (asked + rng.sample(others, len(others)))[:number]
    return [rng.choice(chosen) if rng.random() < 0.05 else aspect for aspect in chosen]


def _choose_adjective(praise: bool, rng: random.Random) -> str:
    return rng.choice([word for word, score in ADJECTIVES.items() if (score > 0) == praise])


def _choose_conjunction(alike: bool, rng: random.Random) -> str:
    right = rng.random() < 0.9
    return "and" if alike == right else "but"


# ------------------------------------------------------------------------ the parser, the reward


def _terminal(token: str) -> str:
    """What a token is to the grammar; punctuation and function words are themselves."""
    classes: dict[str, Collection[str]] = {
        "aspect": ASPECTS,
        "adjective": ADJECTIVES,
        "modifier": MODIFIERS,
        "conjunction": ("and", "but"),
        "verdict": VERDICTS,
        "day": DAYS,
    }
    return next((name for name, words in classes.items() if token in words), token)


TERMINALS = {token: _terminal(token) for token in VOCABULARY}
OPENINGS = {"the", "i", "overall"}
FOLLOWERS = {
    "": OPENINGS,
    STOP: {*OPENINGS, END},
    "the": {"aspect"},
    "aspect": {"was"},
    "was": {"modifier", "adjective"},
    "modifier": {"adjective"},
    "adjective": {"conjunction", STOP},
    "conjunction": {"the"},
    "i": {"went"},
    "went": {"on"},
    "on": {"day"},
    "day": {STOP},
    "overall": {"overall i"},
    "overall i": {"verdict"},
    "verdict": {"it"},
    "it": {STOP},
}
"""The grammar: which terminals may follow which. The empty one is the beginning."""


@dataclass
class Reading:
    """What the parser finds in a completion, token by token.

    A token that may not stand where it stands is malformed, and reading goes on as if it had been
    expected there; a token that no review has is malformed and skipped. A text that ends without
    a clause has one malformed token: its end.
    """

    adjectives: list[str] = field(default_factory=list)
    aspects: list[str] = field(default_factory=list)
    verdicts: list[str] = field(default_factory=list)
    sentiment: float = 0.0
    wrong_conjunctions: int = 0
    words: int = 0
    malformed: int = 0
    finished: bool = False
    _terminal: str = ""
    _modifier: float = 1.0
    _conjunction: str = ""

    def read(self, token: str) -> None:
        """Takes in the next token."""
        terminal = TERMINALS[token]
        if self._terminal == "overall" and terminal == "i":
            terminal = "overall i"
        expected = terminal in FOLLOWERS[self._terminal]
        if terminal == END:
            self.finished = True
            self.malformed += not (expected and self.adjectives)
            return
        self.malformed += not expected
        self.words += terminal != STOP
        self._take(token, terminal)
        if terminal in FOLLOWERS:
            self._terminal = terminal

    def _take(self, token: str, terminal: str) -> None:
        if terminal == "aspect":
            self.aspects.append(token)
        elif terminal == "verdict":
            self.verdicts.append(token)
            self.sentiment += VERDICTS[token]
        elif terminal == "adjective":
            self._take_adjective(token)
        elif terminal in ("conjunction", STOP):
            self._conjunction = token
        self._modifier = MODIFIERS.get(token, 1.0)

    def _take_adjective(self, token: str) -> None:
        score = ADJECTIVES[token]
        if self._conjunction in ("and", "but") and self.adjectives:
            alike = score * ADJECTIVES[self.adjectives[-1]] > 0
            self.wrong_conjunctions += alike != (self._conjunction == "and")
        self._conjunction = ""
        self.adjectives.append(token)
        self.sentiment += score * self._modifier


def parse(completion: Iterable[str]) -> Reading:
    """Reads a completion, malformed or not, up to its `<end>`."""
    reading = Reading()
    for token in completion:
        reading.read(token)
        if reading.finished:
            break
    return reading


def reward(prompt: Prompt, reading: Reading) -> float:
    """The true reward of a completion of the prompt; the module's docstring has the formula."""
    named = set(reading.aspects)
    on_topic = TOPICS[prompt.topic]
    repeated = sum(
        len(words) - len(set(words)) for words in (reading.adjectives, reading.aspects)
    ) + max(0, len(reading.verdicts) - 1)
    off_topic = sum(aspect not in on_topic for aspect in reading.aspects)
    total = (
        3.0 * math.tanh(reading.sentiment / 3.0)
        + 0.5 * sum(aspect in named for aspect in prompt.aspects)
        - 0.5 * (repeated + off_topic)
        - 0.2 * reading.wrong_conjunctions
        - 0.1 * max(0, reading.words - FREE_WORDS)
        - 0.5 * min(reading.malformed, MALFORMED_CAP)
        - 1.0 * (not reading.finished)
    )
    # Two texts of equal merit must tie, whatever the order in which their terms were added.
    return round(total, 9)
