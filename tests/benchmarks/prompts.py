"""The prompts of the benchmarks of Lumina2: no prompt is in two groups, so that a page may call one of them "others".

Known ones are captions of the training set, new ones combinations of its words, open ones single words that leave much
open. EMPTY is drawn without guidance: the model has nothing to go by.
"""

import random

NEW = """\
cat with top hat
a dog and a cat
panda on a rocket
purple apple
penguin with umbrella
white horse in the rain
green heart with eyes
robot face with tears
blue rose in a teapot
orange fish in a bowl
tiger with glasses
a red house on the moon
yellow butterfly on a tulip
ghost with a balloon
lion with crown
pizza with mushroom and tomato
""".splitlines()

MORE_NEW = """\
a cow and a pig
monkey with party hat
green star with eyes
owl on a bicycle
purple elephant
bear with a guitar
a blue car in the rain
robot with a cake
""".splitlines()

OPEN = "face animal food person plant building symbol vehicle".split()
EMPTY = [""] * 8

SIZES = {"peers": 8, "fitting": 4, "correction": 8}


def known(model):
    """{group: captions of the training set of a model like the bundled one}."""
    lines = (model / "emoji.txt").read_text(encoding="utf-8").splitlines()
    names = list(dict.fromkeys(line.split("\t")[1].strip() for line in lines if "\t" in line))
    drawn = iter(random.Random(11).sample(names, sum(SIZES.values())))
    return {group: [next(drawn) for _ in range(size)] for group, size in SIZES.items()}
