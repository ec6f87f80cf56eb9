"""Which changed files do not count: tests, and what decides how tests are run.

Pure: knows names of files. Git says which files a patch changes (`grading`), so that no second reader of patches can be
talked past.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

TEST_WORDS = frozenset({"test", "tests", "testing", "e2e", "conftest"})
"""A file is a test's if one of these is a word of its path: `tests/a.py`, `src/test_b.py`, `c.test.ts`."""

CONFIGURATION = frozenset(
    "pytest.ini .pytest.ini pytest.toml .pytest.toml tox.ini setup.cfg setup.py pyproject.toml noxfile.py .coveragerc "
    "package.json .mocharc.json .mocharc.js karma.conf.js Makefile".split()
)
RUNNERS = frozenset(
    "pytest _pytest py pluggy iniconfig packaging pygments unittest doctest nose coverage sitecustomize "
    "usercustomize".split()
)
"""Python's modules that run tests: one of that name at the top of a source tree would be taken for it."""

_WORD = re.compile(r"[a-z0-9]+")
_SPEC = re.compile(r".+[._]spec\.\w+")
_NAMES = re.compile(r"(jest|vitest|playwright|cypress|babel)\.config\.\w+|.+\.pth")


def not_counting(changed: Iterable[str], solution: Collection[str], tests: Collection[str]) -> list[str]:
    """The changed files that are put back before the tests run, in order.

    solution: files of the gold patch, which count whatever they are called; tests: files of the tests' own patch, which
    never do.
    """
    return [
        path
        for path in changed
        if path in tests or (path not in solution and (is_test(path) or is_configuration(path)))
    ]


def is_test(path: str) -> bool:
    """By the words of its path, as swebench tells tests from sources."""
    return bool(TEST_WORDS.intersection(_WORD.findall(path.lower()))) or _SPEC.fullmatch(path) is not None


def is_configuration(path: str) -> bool:
    """Whether it decides how tests are run: a known file's name, or a module that Python would take for the runner."""
    top, name = re.sub("^(src|lib)/", "", path).split("/")[0], path.rpartition("/")[2]
    return name in CONFIGURATION or _NAMES.fullmatch(name) is not None or top.partition(".")[0] in RUNNERS
