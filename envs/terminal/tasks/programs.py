"""Families about small programs: write them, mend them, build them."""

from __future__ import annotations

import random

from envs.terminal.tasks.family import Made, holds_in, unchanged
from envs.terminal.tasks.words import some

_BUGS = {
    "mean": ("the mean of a list of numbers", "return sum(xs) / (len(xs) + 1)", "return sum(xs) / len(xs)",
             "[1, 2, 3, 6]", "3"),
    "largest": ("the largest number of a list, which may be negative", "return max([0, *xs])", "return max(xs)",
                "[-5, -2, -9]", "-2"),
    "reverse": ("the list in reverse order", "return xs[:0:-1]", "return xs[::-1]", "[4, 5, 6]", "[6, 5, 4]"),
    "count_even": ("how many numbers of the list are even", "return sum(x % 2 for x in xs)",
                   "return sum(x % 2 == 0 for x in xs)", "[1, 3, 4, 5]", "1"),
}  # fmt: skip

_SPECS = {
    "a function {n}(text) that gives the number of vowels (a, e, i, o, u; either case) in a string": (
        "def {n}(text):\n    return sum(c in 'aeiou' for c in text.lower())",
        ["{n}('Education') == 5", "{n}('rhythm') == 0", "{n}('') == 0"],
    ),
    "a function {n}(number) that gives the digits of a whole number above 0 added up": (
        "def {n}(number):\n    return sum(map(int, str(number)))",
        ["{n}(9875) == 29", "{n}(10) == 1", "{n}(7) == 7"],
    ),
    "a function {n}(items) that gives a list's items each once, in the order they first come": (
        "def {n}(items):\n    return list(dict.fromkeys(items))",
        ["{n}([3, 1, 3, 2, 1]) == [3, 1, 2]", "{n}([]) == []", "{n}('abca') == ['a', 'b', 'c']"],
    ),
    "a function {n}(text) that says whether a string reads the same in both directions, letters only, in either case": (
        "def {n}(text):\n    s = [c for c in text.lower() if c.isalpha()]\n    return s == s[::-1]",
        ["{n}('Never odd or even!')", "not {n}('clawrl')", "{n}('')"],
    ),
}


def mend_function(rng: random.Random) -> Made:
    name = rng.choice(list(_BUGS))
    told, wrong, right, given, wanted = _BUGS[name]
    module, shift = some(rng, 1)[0], rng.randrange(2, 9)
    text = f'def {name}(xs):\n    """{told.capitalize()}."""\n    {wrong}\n\n\ndef shift(x):\n    return x + {shift}\n'
    return Made(
        f"The function {name} in /work/{module}.py must give {told}, but it does not. Correct it.",
        f"sed -i 's|{wrong.replace('[', chr(92) + '[').replace('*', chr(92) + '*')}|{right}|' {module}.py",
        files={f"{module}.py": text},
        goals=[holds_in(f"import {module} as m; assert m.{name}({given}) == {wanted}")],
        guards=[holds_in(f"import {module} as m; assert m.shift(1) == {1 + shift}")],
        difficulty="medium",
    )


def write_function(rng: random.Random) -> Made:
    told = rng.choice(list(_SPECS))
    body, tests = _SPECS[told]
    module, name = some(rng, 2)
    tests = " and ".join(test.replace("{n}", name) for test in tests)
    return Made(
        f"Write the Python module /work/{module}.py with {told.replace('{n}', name)}.",
        f"cat > {module}.py <<'E'\n{body.replace('{n}', name)}\nE",
        goals=[holds_in(f"from {module} import {name}; assert {tests}")],
        difficulty="medium",
    )


def write_filter(rng: random.Random) -> Made:
    name, *words = some(rng, 4)
    smallest = rng.randrange(3, 7)
    given = f"{words[0]} a of {words[1]}\\nit {words[2]}\\n"
    wanted = " ".join(sorted({w for w in words if len(w) >= smallest}))
    return Made(
        f"Write an executable script /work/{name}, in bash or Python. It reads text from standard input and prints "
        f"every different word of at least {smallest} letters, sorted, one a line.",
        f"cat > {name} <<'E'\n#!/bin/bash\ntr -s ' ' '\\n' | grep -E '^.{{{smallest},}}$' | LC_ALL=C sort -u || true\n"
        f"E\nchmod +x {name}",
        goals=[f"[ -x {name} ] && [ \"$(printf '{given}' | ./{name} | xargs)\" = '{wanted}' ]"],
        difficulty="hard",
    )


def mend_makefile(rng: random.Random) -> Made:
    target, *parts = some(rng, 4)
    sources = {f"{part}.txt": f"{part}\n" for part in parts}
    text = f"{target}.txt: {' '.join(sources)}\n        cat {' '.join(list(sources)[:2])} > $@\n"
    return Made(
        f"`make` in /work should join {', '.join(sources)}, in this order, into {target}.txt, but the Makefile is "
        f"broken. Correct it, and build {target}.txt.",
        f"printf '{target}.txt: {' '.join(sources)}\\n\\tcat $^ > $@\\n' > Makefile\nmake",
        files={**sources, "Makefile": text},
        expect={f"{target}.txt": "".join(sources.values())},
        goals=[f"rm -f {target}.txt; make && [ \"$(cat {target}.txt | xargs)\" = '{' '.join(parts)}' ]"],
        guards=[unchanged(name, content) for name, content in sources.items()],
        difficulty="medium",
    )
