"""Words that instances are made of."""

from __future__ import annotations

import random

WORDS = (
    "amber anchor apple arrow atlas autumn basil beacon birch bramble breeze bridge canyon cedar cobalt copper coral "
    "cotton crystal dahlia delta drift ember falcon fern fjord flint forest garnet ginger glacier granite harbor hazel "
    "heron indigo island ivory jasper juniper kestrel lagoon lantern laurel lemon lichen linen lotus maple marble "
    "meadow mint mosaic nectar nutmeg oasis olive onyx orchid otter pebble pepper pine plum prairie quartz quill raven "
    "reed river saffron sage sierra silver sparrow spruce summit thistle thyme timber topaz tulip umber valley velvet "
    "violet walnut willow winter yarrow zephyr"
).split()
PEOPLE = "Ada Bela Chen Dora Emil Fatou Goran Hana Ines Jonas Kira Luca Mina Noor Olga Pia Quinn Rosa Sami Tove".split()
CITIES = "Accra Basel Cusco Delhi Essen Fukuoka Ghent Hanoi Izmir Jena Kyoto Lima Malmo Nice Oslo Porto".split()


def some(rng: random.Random, count: int) -> list[str]:
    """Different words."""
    return rng.sample(WORDS, count)


def sentence(rng: random.Random, length: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))
