"""Writes pairs.jsonl: four hundred preference pairs with a known preference.

The preference in one sentence: a good answer says what was asked, politely, and nothing else.

Every prompt is a small kitchen question: a situation, one of twenty foods and one of four topics.
Each pair has two random answers from the same distribution. Some answer another question, are
impolite, or contain padding. `reward` scores both answers, the better one is `chosen`, and
`reward_gap` is the difference. So the labels have no noise, and `reward` can also judge a trained
model.

Run it without arguments to write pairs.jsonl in this folder, or with a path to write elsewhere. The
seed is fixed, so it writes the same bytes each time.
"""

import json
import random
import sys
from pathlib import Path

SEED = 0
HELD_OUT_SHARE = 0.1

SITUATIONS = (
    "",
    "We have guests tonight. ",
    "I am new to cooking. ",
    "I cook for one. ",
    "My son wants to help. ",
)

# One row of four facts per food, in the order of TOPICS.
TOPICS = (
    ("How long do I cook {food}?", "Cook {food} for {fact}."),
    ("Where do I keep {food}?", "Keep {food} {fact}."),
    ("What goes well with {food}?", "Serve {food} with {fact}."),
    ("How do I choose {food} at the shop?", "Choose {food} that {fact}."),
)
FOODS = {
    "rice": ("eighteen minutes", "in a dry jar", "beans and lime", "looks whole and clean"),
    "lentils": ("half an hour", "in a tin with a lid", "carrots and cumin", "are of one size"),
    "potatoes": ("twenty minutes", "in the dark", "butter and chives", "are firm and not green"),
    "carrots": ("ten minutes", "in the fridge drawer", "honey and thyme", "snap when bent"),
    "eggs": ("eight minutes", "in their own box", "toast and cress", "feel heavy in the hand"),
    "mushrooms": ("seven minutes", "in a paper bag", "garlic and parsley", "are dry and closed"),
    "spinach": ("two minutes", "in a damp cloth", "nutmeg and cream", "has crisp leaves"),
    "leeks": ("a quarter of an hour", "wrapped in paper", "ham and mustard", "are straight"),
    "beans": ("an hour", "in a glass jar", "tomato and sage", "are shiny and unbroken"),
    "noodles": ("four minutes", "in a closed packet", "ginger and soy", "are made of plain flour"),
    "pumpkin": ("forty minutes", "on a cool shelf", "chilli and feta", "sounds hollow"),
    "cabbage": ("twelve minutes", "in the cellar", "apple and caraway", "is tight and heavy"),
    "peas": ("three minutes", "in the freezer", "mint and lemon", "have bright full pods"),
    "beetroot": ("fifty minutes", "in a box of sand", "walnuts and dill", "has fresh red stalks"),
    "salmon": ("fourteen minutes", "on ice", "fennel and orange", "smells of the sea"),
    "chicken": ("ninety minutes", "on the lowest fridge shelf", "rosemary", "is plump and pale"),
    "asparagus": ("six minutes", "upright in water", "eggs and oil", "squeaks when rubbed"),
    "broccoli": ("five minutes", "in an open bag", "almonds and chilli", "is dark green"),
    "pears": ("nine minutes", "on the window sill", "cheese and honey", "give at the neck"),
    "oats": ("eleven minutes", "in the cupboard", "berries and milk", "smell sweet and nutty"),
}

POLITE = (
    "Of course!",
    "Happy to help.",
    "Gladly.",
    "Thank you for asking.",
)
BRUSQUE = (
    "You should know that.",
    "Not that again.",
    "Look it up next time.",
)
WISHES = (
    "Enjoy your meal!",
    "I wish you a lovely evening.",
)
PADDING = (
    "There is a lot that one could say about food.",
    "Many people cook and many people eat.",
    "Tastes differ, as they always have.",
    "Kitchens come in all shapes and sizes.",
    "This is a large subject with a long history.",
)

# The preference in numbers. The right answer counts more than politeness.
ANSWERED = 4.0
COURTESY = 1.0
RUDENESS = -1.0
PADDED = -1.0
# The rewards of a pair differ by at least two points, like a polite and a brusque answer.
CLEARLY_BETTER = 2.0


def question_and_answer(food: str, topic: int) -> tuple[str, str]:
    """Returns the question about a food and a topic, and its right answer."""
    question, answer = TOPICS[topic]
    return question.format(food=food), answer.format(food=food, fact=FOODS[food][topic])


ANSWERS = dict(question_and_answer(food, topic) for food in FOODS for topic in range(len(TOPICS)))


def reward(prompt: str, completion: str) -> float:
    """Scores a completion: what was asked, politely, and nothing else.

    Args:
      prompt: a situation and a question, as in pairs.jsonl.
      completion: any text.

    Returns:
      4 if it contains the right answer, plus 1 if it is polite, minus 1 if it is brusque, and minus
      1 for every sentence of padding.

    Raises:
      KeyError: the prompt does not end with a question from TOPICS.
    """
    right = ANSWERS[prompt.rsplit(". ", 1)[-1]]
    return (
        ANSWERED * (right in completion)
        + COURTESY * any(phrase in completion for phrase in POLITE + WISHES)
        + RUDENESS * any(phrase in completion for phrase in BRUSQUE)
        + PADDED * sum(completion.count(phrase) for phrase in PADDING)
    )


def write_answer(rng: random.Random, food: str, topic: int) -> str:
    """Draws one answer to a topic of a food."""
    aim = rng.random()
    if aim < 0.2:
        food = rng.choice([other for other in FOODS if other != food])
    elif aim < 0.4:
        topic = rng.choice([other for other in range(len(TOPICS)) if other != topic])
    opening = rng.choice([POLITE, BRUSQUE, ("",)])
    closing = rng.choice([WISHES, ("",), ("",)])
    filling = rng.sample(PADDING, rng.choice([0, 0, 1, 2]))
    answer = question_and_answer(food, topic)[1]
    sentences = [rng.choice(opening), answer, *filling, rng.choice(closing)]
    return " ".join(sentence for sentence in sentences if sentence)


def draw_pair(rng: random.Random, situation: str, food: str, topic: int) -> dict[str, str | float]:
    """Draws two answers to one prompt until one is clearly better. That one is chosen."""
    prompt = situation + question_and_answer(food, topic)[0]
    while True:
        worse, better = sorted(
            (write_answer(rng, food, topic) for _ in range(2)),
            key=lambda completion: reward(prompt, completion),
        )
        gap = reward(prompt, better) - reward(prompt, worse)
        if gap >= CLEARLY_BETTER:
            return {"prompt": prompt, "chosen": better, "rejected": worse, "reward_gap": gap}


def make_pairs(seed: int = SEED) -> list[dict[str, str | float]]:
    """Makes one pair for every prompt and holds a tenth of them out, in random order."""
    rng = random.Random(seed)
    pairs = [
        draw_pair(rng, situation, food, topic)
        for situation in SITUATIONS
        for food in FOODS
        for topic in range(len(TOPICS))
    ]
    rng.shuffle(pairs)
    held_out = round(HELD_OUT_SHARE * len(pairs))
    for index, pair in enumerate(pairs):
        pair["split"] = "test" if index < held_out else "train"
    return pairs


def main() -> None:
    """Writes the pairs to the given path, or to this folder."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("pairs.jsonl")
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in make_pairs())
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
