"""Ids that people can say: randomness in, ``amber-otter-42`` out. 64 x 64 x 100 of them; whoever stores one asks for another if it is taken."""

from __future__ import annotations

from random import Random
from typing import Final

_FIRST_WORDS: Final = (
    "agile amber ample azure basic blithe bold brave bright brisk calm candid clear clever coral crisp daring deft dusty eager early easy "
    "fair fancy fleet fresh gentle glad golden grand happy hardy honest humble ideal jolly keen kind lively lucid lucky lunar mellow merry "
    "misty noble olive plain proud quick quiet rapid ready rosy royal rustic silver sober solar steady sunny tidy vivid warm"
)
_SECOND_WORDS: Final = (
    "adder alpaca badger beaver bison bobcat camel cheetah condor cougar coyote crane dingo dolphin donkey eagle egret falcon ferret finch "
    "gazelle gecko gibbon goose grouse heron hornet ibex iguana impala jackal jaguar koala lemur leopard lizard llama lynx magpie marmot "
    "marten mole moose newt ocelot osprey otter panda parrot pelican penguin pigeon puffin puma quail rabbit raven robin salmon seal "
    "sparrow stork tapir weasel"
)
_FIRST: Final = tuple(_FIRST_WORDS.split())
_SECOND: Final = tuple(_SECOND_WORDS.split())


def speakable(random: Random) -> str:
    """A new id, e.g. ``amber-otter-42``."""
    return f"{random.choice(_FIRST)}-{random.choice(_SECOND)}-{random.randrange(100):02d}"
