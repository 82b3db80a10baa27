"""Write the prompts of six tasks for circuits, made from templates.

    python benchmarks/circuit_prompts.py

Every task is a file of 60 lines in ``benchmarks/data/circuits``: a prompt, the right
next word and a wrong one, which differ in one thing that the prompt decides.
"""

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "data" / "circuits"
NUM = 60
NOUNS = "key dog teacher author farmer car letter picture window child"
OTHERS = "cabinet house road garden table school river city field church"
SPANS = "war strike drought project dispute journey programme festival"
WOMEN = "Mary Anna Susan Laura Emma Alice Helen Sarah Julia Karen"
MEN = "John Peter David Paul Mark James Robert Thomas George Henry"
WORDS = (
    "apple river chair stone paper horse glass bread music light water table money "
    "green plant train bird ship road wind"
)
CAPITALS = (
    "France Paris,Italy Rome,Germany Berlin,Spain Madrid,England London,Russia Moscow,"
    "Japan Tokyo,China Beijing,Egypt Cairo,Greece Athens,Austria Vienna,Ireland Dublin,"
    "Cuba Havana,Iran Tehran,Peru Lima,Portugal Lisbon,Norway Oslo,Iraq Baghdad,"
    "Poland Warsaw,Hungary Budapest,Sweden Stockholm,Denmark Copenhagen,Turkey Ankara,"
    "India Delhi,Scotland Edinburgh"
)

Row = dict[str, str]


def agreement(rng: np.random.Generator) -> Row:
    """Number of the subject, with a noun of the other number in between."""
    places = ["near", "behind", "beside", "above", "by"]
    noun, other = rng.choice(NOUNS.split()), rng.choice(OTHERS.split())
    place = rng.choice(places)
    plural = bool(rng.integers(2))
    many = "children" if noun == "child" else f"{noun}s"
    subject = many if plural else noun
    object_ = other if plural else f"{other}s".replace("citys", "cities")
    object_ = object_.replace("churchs", "churches")
    verbs = (" are", " is") if plural else (" is", " are")
    return row(f"The {subject} {place} the {object_}", *verbs)


def greater_than(rng: np.random.Generator) -> Row:
    """Decade of the last year of a span, given the first."""
    decade, year = int(rng.integers(3, 7)), int(rng.integers(2, 9))
    century = int(rng.choice([16, 17, 18, 19]))
    gap = int(rng.integers(1, 3))
    text = (
        f"The {rng.choice(SPANS.split())} lasted from the year {century}{decade}{year}"
    )
    text += f" to the year {century}"
    return row(text, str(decade + gap), str(decade - gap))


def pronouns(rng: np.random.Generator) -> Row:
    """Pronoun of a name."""
    places = ["home", "to work", "to the market", "to school", "outside"]
    woman = bool(rng.integers(2))
    name, place = rng.choice((WOMEN if woman else MEN).split()), rng.choice(places)
    answers = (" she", " he") if woman else (" he", " she")
    return row(f"{name} went {place} because", *answers)


def capitals(rng: np.random.Generator) -> Row:
    """Capital of a country, against that of another."""
    words = [pair.split(" ") for pair in CAPITALS.split(",")]
    right, wrong = rng.choice(len(words), 2, replace=False)
    forms = "The capital of {} is,The capital city of {} is,In {} the capital is"
    text = str(rng.choice(forms.split(","))).format(words[right][0])
    return row(text, f" {words[right][1]}", f" {words[wrong][1]}")


def induction(rng: np.random.Generator) -> Row:
    """Word that followed the last one earlier, against another of the same list."""
    a, b, c, d = rng.choice(WORDS.split(), 4, replace=False)
    return row(f"{a} {b} {c} {d} {a} {b}", f" {c}", f" {d}")


def brackets(rng: np.random.Generator) -> Row:
    """Bracket that closes the one that is open."""
    names = ["x", "y", "values", "total", "data", "result"]
    numbers = ", ".join(str(n) for n in rng.integers(0, 10, 3))
    round_ = bool(rng.integers(2))
    opened, answers = ("(", (")", "]")) if round_ else ("[", ("]", ")"))
    return row(f"{rng.choice(names)} = {opened}{numbers}", *answers)


TASKS = {
    "agreement": agreement,
    "greater_than": greater_than,
    "pronouns": pronouns,
    "capitals": capitals,
    "induction": induction,
    "brackets": brackets,
}


def row(prompt: str, right: str, wrong: str) -> Row:
    """Make a line."""
    return {"prompt": prompt, "right": right, "wrong": wrong}


def make_task(name: str) -> list[Row]:
    """Draw different prompts of a task."""
    rng = np.random.default_rng(len(name))
    rows = {
        line["prompt"]: line for line in (TASKS[name](rng) for _ in range(10 * NUM))
    }
    if len(rows) < NUM:
        raise ValueError(f"{name}: wanted {NUM} different prompts, got {len(rows)}")
    return list(rows.values())[:NUM]


def read_task(name: str) -> list[Row]:
    """Read the prompts of a task."""
    text = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def main() -> None:
    """Write all tasks."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in TASKS:
        lines = [json.dumps(line) for line in make_task(name)]
        (FOLDER / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{name}: {len(lines)}")


if __name__ == "__main__":
    main()
