"""All tasks by name: `own/…` on our shop, `miniwob/…`, and `buttons/…` for the built-in model."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from clawrl.errors import EnvError
from clawrl.rollout.env import Split, split_of
from envs.gui import buttons, miniwob
from envs.gui.shop import tasks as shop
from envs.gui.site import GuiTask

Maker = Callable[[random.Random], GuiTask]

MAKERS: Mapping[str, Maker] = {**shop.MAKERS, **miniwob.MAKERS, **buttons.MAKERS}


def named(families: Sequence[str], images: bool) -> dict[str, Maker]:
    """Those of these names, or of names that begin with one of them and a slash.

    Tasks that must be seen come without images only by their own name. Raises EnvError for a name that fits none.
    """
    found: dict[str, Maker] = {}
    for family in families:
        fitting = [name for name in MAKERS if name == family or _in_group(name, family, images)]
        if not fitting:
            groups = ", ".join(dict.fromkeys(name.partition("/")[0] for name in MAKERS))
            raise EnvError(f"gui: there is no family {family!r}; use one of {groups}, or one task such as own/reply")
        found |= {name: MAKERS[name] for name in fitting}
    if not found:
        raise EnvError("gui: family names no task; use own, miniwob or buttons")
    return found


def make_gui_task(makers: Mapping[str, Maker], number: int, split: Split) -> GuiTask:
    """Task `number` of a split: names take turns. The same number gives the same task."""
    names = list(makers)
    name = names[number % len(names)]
    rng = random.Random(f"gui/{name}/{number // len(names)}")
    while True:
        task = makers[name](rng)
        if split_of(task.id) == split:
            return task


def _in_group(name: str, family: str, images: bool) -> bool:
    return name.startswith(f"{family}/") and (images or name not in miniwob.SEEN)
