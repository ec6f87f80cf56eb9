"""MiniWoB++ tasks with their own pages and their own reward, from the PyPI package `miniwob` (MIT).

    page ─► Math.seedrandom(seed), core.startEpisodeReal() ─► instruction      WOB_DONE_GLOBAL, WOB_RAW_REWARD_GLOBAL

Knows the package's folder of pages and their protocol; imports none of its code, which drives selenium. The reward is
the page's own without its discount for time, which the rollout limits: in [-1, 1], and -1 where the page has not ended.
"""

from __future__ import annotations

import importlib.util
import mimetypes
import random
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from playwright.async_api import Page

from clawrl.errors import EnvError
from clawrl.rollout.env import message_of
from clawrl.types import Message
from envs.gui.site import GuiTask, Site

READABLE = """
    book-flight book-flight-nodelay button-delay buy-ticket choose-date choose-date-easy choose-date-medium
    choose-date-nodelay choose-list click-button click-button-sequence click-checkboxes click-checkboxes-large
    click-checkboxes-soft click-checkboxes-transfer click-collapsible click-collapsible-2 click-collapsible-2-nodelay
    click-collapsible-nodelay click-dialog click-dialog-2 click-link click-menu click-option click-scroll-list
    click-tab click-tab-2 click-tab-2-easy click-tab-2-hard click-tab-2-medium click-test click-test-2
    click-test-transfer click-widget copy-paste copy-paste-2 drag-box drag-items email-inbox email-inbox-delete
    email-inbox-forward email-inbox-forward-nl email-inbox-forward-nl-turk email-inbox-important email-inbox-nl-turk
    email-inbox-noscroll email-inbox-reply email-inbox-star-reply enter-date enter-password enter-text enter-text-2
    enter-text-dynamic enter-time find-word focus-text focus-text-2 form-sequence form-sequence-2 form-sequence-3
    generate-number guess-number login-user login-user-popup multi-layouts multi-orderings navigate-tree odd-or-even
    order-food phone-book read-table read-table-2 scroll-text scroll-text-2 search-engine sign-agreement simple-algebra
    simple-arithmetic social-media social-media-all social-media-some terminal text-transform unicode-test
    use-autocomplete use-autocomplete-nodelay use-slider use-slider-2 use-spinner
""".split()
"""Can be done from the page's text."""
SEEN_ONLY = """
    ascending-numbers bisect-angle circle-center click-color click-menu-2 click-pie click-pie-nodelay click-shades
    click-shape count-shape count-sides daily-calendar drag-circle drag-cube drag-items-grid drag-shapes drag-shapes-2
    drag-single-shape drag-sort-numbers draw-circle draw-line find-greatest find-midpoint grid-coordinate highlight-text
    highlight-text-2 hot-cold identify-shape number-checkboxes resize-textarea right-angle text-editor tic-tac-toe
    use-colorwheel use-colorwheel-2 visual-addition
""".split()
"""Shapes, places and colours, which only an image shows. Left out are tasks against the clock: chase-circle,
hover-shape, moving-items, simon-says, stock-market."""
SEEN = frozenset(f"miniwob/{name}" for name in SEEN_ONLY)

_FOREVER_MS = 2**31 - 1
"""The page's own time limit: as long as a browser's timers go."""
_BEGIN = """([seed, most]) => {
    if (window.jQuery) jQuery.fx.off = true;
    const style = document.createElement('style');
    style.textContent = '#reward-display, #click-canvas, #sync-task-cover { display: none !important }';
    document.head.append(style);
    Math.seedrandom(seed);
    core.EPISODE_MAX_TIME = most;
    core.startEpisodeReal();
    window.clawrlBegun = true;
}"""
_SAID = "() => { const said = core.getUtterance(); return said.utterance ?? said }"


@cache
def pages() -> Path:
    """The folder of pages. Raises EnvError if the package is missing."""
    found = importlib.util.find_spec("miniwob")
    if found is None or found.origin is None:
        raise EnvError("gui: MiniWoB's pages are missing; pip install --no-deps miniwob")
    return Path(found.origin).parent / "html"


class MiniWob(Site):
    """One task of a seed."""

    host = "miniwob.test"

    def __init__(self, name: str, seed: str) -> None:
        self._name, self._seed, self._root = name, seed, pages()

    @property
    def start_url(self) -> str:
        return f"http://{self.host}/miniwob/{self._name}.html"

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = (self._root / environ["PATH_INFO"].lstrip("/")).resolve()
        if not path.is_relative_to(self._root.resolve()) or not path.is_file():
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"not found"]
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        start_response("200 OK", [("Content-Type", kind)])
        return [path.read_bytes()]

    async def begin(self, page: Page) -> str:
        await page.evaluate(_BEGIN, [self._seed, _FOREVER_MS])
        await page.wait_for_function("WOB_TASK_READY", timeout=10_000)
        return await page.evaluate(_SAID)

    async def over(self, page: Page) -> bool:
        return (await _end(page)) is not None

    async def verdict(self, page: Page) -> float:
        reward = await _end(page)
        return -1.0 if reward is None else max(-1.0, min(1.0, reward))

    async def gold(self, page: Page) -> Sequence[Message]:
        solve = SOLUTIONS.get(self._name)
        if solve is None:
            raise EnvError(f"gui: no solution of miniwob/{self._name} is known; known are {', '.join(SOLUTIONS)}")
        return solve(await page.evaluate(_SAID), await page.inner_text("#area"))


async def _end(page: Page) -> float | None:
    """The reward once the page on which the episode began has ended it. Another page, or that one anew, cannot."""
    return await page.evaluate("() => window.clawrlBegun && WOB_DONE_GLOBAL ? WOB_RAW_REWARD_GLOBAL : null")


# -- solutions: from the instruction and the text of the page --------------------------------------------------------

Solution = Callable[[str, str], Sequence[Message]]


def _css(selector: str) -> Message:
    return message_of("click", target=f"css=#area {selector}")


def _fill(text: str, selector: str = "input") -> Message:
    return message_of("fill", target=f"css=#area {selector}", text=text)


def _quoted(said: str) -> list[str]:
    return re.findall(r'"([^"]*)"', said)


SUBMIT = _css("#subbtn")
POSITIONS = {"1st": 1, "2nd": 2, "3rd": 3}


def _enter_text(said: str, area: str) -> Sequence[Message]:
    return [_fill(_quoted(said)[0]), SUBMIT]


def _enter_text_2(said: str, area: str) -> Sequence[Message]:
    word = _quoted(said)[0]
    return [_fill(word.upper() if "upper case" in said else word.lower()), SUBMIT]


def _enter_password(said: str, area: str) -> Sequence[Message]:
    return [_fill(_quoted(said)[0], "#password"), _fill(_quoted(said)[0], "#verify"), SUBMIT]


def _enter_date(said: str, area: str) -> Sequence[Message]:
    month, day, year = re.findall(r"\d+", said)
    return [_fill(f"{year}-{month}-{day}"), SUBMIT]


def _login(said: str, area: str) -> Sequence[Message]:
    name, password = _quoted(said)
    return [_fill(name, "#username"), _fill(password, "#password"), SUBMIT]


def _checkboxes(said: str, area: str) -> Sequence[Message]:
    names = re.fullmatch(r"Select (.*) and click Submit\.", said)
    chosen = [] if names is None or names[1] == "nothing" else names[1].split(", ")
    return [*(_css(f'label:text-is("{name}") input') for name in chosen), SUBMIT]


def _option(said: str, area: str) -> Sequence[Message]:
    name = said.removeprefix("Select ").removesuffix(" and click Submit.")
    return [_css(f'label:text-is("{name}") input'), SUBMIT]


def _choose_list(said: str, area: str) -> Sequence[Message]:
    name = said.removeprefix("Select ").removesuffix(" from the list and click Submit.")
    return [message_of("select", target="css=#area select", options=[name]), _css("button")]


def _focus(said: str, area: str) -> Sequence[Message]:
    return [_css(f"input >> nth={POSITIONS[said.split()[3]] - 1}")]


def _read_table(said: str, area: str) -> Sequence[Message]:
    key = said.removeprefix("Enter the value of ").removesuffix(" into the text field and press Submit.")
    values = dict(line.split("\t", 1) for line in area.splitlines() if "\t" in line)
    return [_fill(values[key].strip(), "#tt"), SUBMIT]


def _find_word(said: str, area: str) -> Sequence[Message]:
    place = int(re.findall(r"(\d+)(?:st|nd|rd|th) word", said)[0])
    return [_fill(re.findall(r"[a-zA-Z]+", area)[place - 1]), SUBMIT]


SOLUTIONS: dict[str, Solution] = {
    "choose-list": _choose_list,
    "click-button": lambda said, _: [_css(f'button:text-is("{_quoted(said)[0]}") >> nth=0')],
    "click-button-sequence": lambda said, _: [_css("#subbtn"), _css("#subbtn2")],
    "click-checkboxes": _checkboxes,
    "click-checkboxes-large": _checkboxes,
    "click-checkboxes-transfer": _checkboxes,
    "click-collapsible-nodelay": lambda said, _: [_css("h3"), SUBMIT],
    "click-dialog": lambda said, _: [message_of("click", target="css=.ui-dialog-titlebar-close")],
    "click-link": lambda said, _: [_css(f'span.alink:text-is("{_quoted(said)[0]}") >> nth=0')],
    "click-option": _option,
    "click-tab": lambda said, _: [_css(f'a:text-is("Tab #{said[-2]}")')],
    "click-test": lambda said, _: [_css("#subbtn")],
    "click-test-2": lambda said, _: [message_of("click", target='button "ONE"')],
    "enter-date": _enter_date,
    "enter-password": _enter_password,
    "enter-text": _enter_text,
    "enter-text-2": _enter_text_2,
    "enter-text-dynamic": _enter_text,
    "find-word": _find_word,
    "focus-text": lambda said, _: [_css("input")],
    "focus-text-2": _focus,
    "login-user": _login,
    "read-table": _read_table,
}


def _maker(name: str, rng: random.Random) -> GuiTask:
    seed = f"{rng.getrandbits(32)}"
    return GuiTask(f"miniwob/{name}/{seed}", partial(MiniWob, name, seed))


MAKERS = {f"miniwob/{name}": partial(_maker, name) for name in (*READABLE, *SEEN_ONLY)}
