"""Writes train.jsonl and validation.jsonl: a shop's messages, and the same as one line of JSON.

    python examples/make_data.py [FOLDER]

Made up from word lists, so the files can be shared freely. One narrow skill that a 135M model
visibly lacks before and has after: answer with exactly this object, nothing else. The things a
customer bought in the validation rows never occur in the training rows.
"""

import json
import random
import sys
from pathlib import Path

SYSTEM = "Turn the message into one line of JSON."
BOUGHT = """
kettle lamp backpack router keyboard jacket blender drill tent speaker charger desk umbrella watch
suitcase toaster helmet monitor scooter printer mattress camera headset fan
"""
HELD_OUT_ITEMS = ["vacuum", "bicycle", "microscope", "piano", "sofa", "telescope"]
PROBLEMS = {
    "broken": ("arrived broken", "broke on the first day", "came in two pieces"),
    "missing parts": ("has parts missing", "came without its screws", "is incomplete"),
    "late": ("still has not come", "is a week late", "never arrived"),
    "wrong item": ("is not the one I chose", "is the wrong model", "is somebody else's order"),
    "noisy": ("makes a terrible noise", "rattles all day", "hums loudly"),
}
WISHES = {
    "refund": ("I want my money back.", "Please refund me.", "Give me a refund."),
    "replacement": ("Please send a new one.", "I would like another one.", "Swap it, please."),
    "help": ("What should I do?", "Can someone help me?", "Please call me."),
}
URGENT = {True: ("It is urgent.", "I need it today!", "Quickly, please."), False: ("No hurry.", "Thanks!", "")}
OPENINGS = ("Hello,", "Hi,", "Good morning,", "Hey there,", "Dear shop,")
SHAPES = (
    "{opening} order {order}: the {item} {problem}. {wish} {urgent}",
    "{opening} my {item} {problem}. The order was {order}. {wish} {urgent}",
    "{opening} the {item} from {order} {problem}. {wish} {urgent}",
)


def row(draw: random.Random, items: list[str]) -> dict[str, object]:
    """One chat example."""
    order = f"{draw.choice('ABCDEFGH')}{draw.randint(100, 999)}"
    item, problem, wish = draw.choice(items), draw.choice(list(PROBLEMS)), draw.choice(list(WISHES))
    urgent = draw.random() < 0.5
    message = draw.choice(SHAPES).format(
        opening=draw.choice(OPENINGS),
        order=order,
        item=item,
        problem=draw.choice(PROBLEMS[problem]),
        wish=draw.choice(WISHES[wish]),
        urgent=draw.choice(URGENT[urgent]),
    )
    answer = {"order": order, "item": item, "problem": problem, "wants": wish, "urgent": urgent}
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message.strip()},
            {"role": "assistant", "content": json.dumps(answer)},
        ]
    }


def main(folder: Path) -> None:
    """Write both files."""
    draw = random.Random(20261122)
    for name, count, items in (("train", 200, BOUGHT.split()), ("validation", 40, HELD_OUT_ITEMS)):
        lines = [json.dumps(row(draw, items)) + "\n" for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
