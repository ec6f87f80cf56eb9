"""The tasks in a real browser: gold solves them, doing nothing does not, and what else was changed counts."""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import pytest
from gymnasium.utils.env_checker import check_env
from playing import played, said

from clawrl.errors import EnvError
from clawrl.rollout.agent import Caller, Limits, run_episode
from clawrl.rollout.attempt import Attempt
from clawrl.rollout.env import SPLITS, message_of, split_of
from clawrl.types import Episode, Message
from envs.gui.env import GuiEnv
from envs.gui.miniwob import READABLE, SEEN_ONLY, SOLUTIONS, MiniWob
from envs.gui.shop.tasks import FAMILIES
from envs.gui.shop.world import World, contents, make_rows, verdict
from envs.gui.tab import open_tab
from envs.gui.tasks import MAKERS, make_gui_task, named

pytestmark = pytest.mark.gui
OWN = [name for name in MAKERS if name.startswith("own/")]
SOLVED = [f"miniwob/{name}" for name in SOLUTIONS]
BUTTONS = [name for name in MAKERS if name.startswith("buttons/")]


def test_gymnasium_makes_it_and_finds_nothing_wrong():
    env = gymnasium.make("envs:clawrl/Gui-v0", family=["buttons", "own/reply"])
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("name", [*OWN, *SOLVED, *BUTTONS])
def test_gold_solves_what_doing_nothing_does_not(opened, name):
    env = opened(name)
    env.reset(options={"task": 3, "split": "held_out"})
    idle = env.grade()
    assert idle == -1.0
    assert played(env, env.gold(env.task)) == 1.0


def test_there_are_enough_of_each_kind():
    assert len(OWN) == len(FAMILIES) >= 10
    assert len(SOLVED) >= 8


def test_miniwobs_pages_all_begin_and_need_nothing_from_outside(kept):
    browser, *_ = kept._open()

    async def look() -> None:
        """One tab for them all: they are files of one folder."""
        tab = await open_tab(browser.chromium, MiniWob("click-test", "1"))
        for name in (*READABLE, *SEEN_ONLY):
            site = MiniWob(name, "1")
            await tab.page.goto(site.start_url)
            said = await site.begin(tab.page)
            assert (len(said) > 10, await site.verdict(tab.page), tab._refused) == (True, -1.0, ""), name
        await tab.close()

    browser.run(look())


def test_done_at_once_is_not_solved_and_ends_the_episode(opened):
    env = opened("own/stock")
    _, reward, terminated, truncated, facts = env.step(message_of("done"))
    assert (reward, terminated, truncated, facts["outcome"]) == (-1.0, True, False, -1.0)


def test_what_else_was_changed_is_held_against_the_agent(opened):
    env = opened("own/stock")
    gold = list(env.gold(env.task))
    besides = [message_of("goto", url="/tickets/501"), message_of("fill", target='textbox "Reply"', text="Hello")]
    besides.append(message_of("click", target='button "Send reply"'))
    assert played(env, [*besides, *gold]) == -1.0


def test_half_of_it_is_between():
    rows = make_rows(random.Random(1))
    change = "update tickets set state = 'lost' where id = ?"
    half, whole = (World(rows, tuple((change, (number,)) for number in ids)) for ids in ([501], [501, 502]))
    first, wanted = contents(whole.database()), contents(whole.database(wanted=True))
    assert verdict(first, wanted, wanted) == 1.0
    assert verdict(first, wanted, first) == -1.0
    assert verdict(first, wanted, contents(half.database(wanted=True))) == 0.0
    other = World(rows, ((change, (501,)), (change, (503,)))).database(wanted=True)
    assert verdict(first, wanted, contents(other)) == -1.0


def test_a_row_that_is_gone_was_not_changed():
    rows = make_rows(random.Random(1))
    world = World(rows, (("update products set stock = 9999 where id = 3", ()),))
    first, wanted = contents(world.database()), contents(world.database(wanted=True))
    gone = World(rows, (("delete from products where id = 3", ()),)).database(wanted=True)
    assert verdict(first, wanted, contents(gone)) == -1.0


@pytest.mark.parametrize("page", ["click-test", "click-test-2"])
def test_miniwobs_task_is_solved_on_the_page_it_began_on_alone(opened, page):
    env = opened("miniwob/click-test")
    said(env, "goto", url=f"/miniwob/{page}.html")
    _, _, terminated, *_ = env.step(message_of("click", target="css=#sync-task-cover"))
    assert not terminated
    browser, tab, _ = env._open()
    browser.run(tab.page.evaluate("document.querySelector('#area button').click()"))  # wherever the page has put it
    assert browser.run(tab.page.evaluate("WOB_DONE_GLOBAL")), "the page says that it is solved"
    assert env.grade() == -1.0


def test_two_presses_of_which_the_second_is_wrong_are_half(opened):
    env = opened("buttons/two")
    first, second = (call["tool_calls"][0] for call in env.gold(env.task))
    assert played(env, [{"role": "assistant", "tool_calls": [call]} for call in (first, first)]) == 0.0
    env.reset(options={"task": 0})
    assert played(env, [{"role": "assistant", "tool_calls": [second]}]) == -1.0


@pytest.mark.parametrize("name", [*OWN, *BUTTONS, "miniwob/click-test"])
def test_a_number_is_a_task_for_ever_and_splits_do_not_meet(name):
    makers = named([name], images=False)
    for split in SPLITS:
        tasks = [make_gui_task(makers, number, split).id for number in range(5)]
        assert tasks == [make_gui_task(makers, number, split).id for number in range(5)]
        assert all(split_of(task) == split for task in tasks)
        assert len(set(tasks)) == 5


def test_families_by_group_by_name_and_several():
    assert set(named(["own"], images=False)) == set(OWN)
    assert set(named(["buttons/one", "own/reply"], images=False)) == {"buttons/one", "own/reply"}
    unseen, seen = named(["miniwob"], images=False), named(["miniwob"], images=True)
    assert "miniwob/click-shades" in set(seen) - set(unseen)
    assert list(named(["miniwob/click-shades"], images=False)) == ["miniwob/click-shades"]


@pytest.mark.parametrize("family", ["nothing", "own/nothing", "ow", ""])
def test_an_unknown_family_is_refused(family):
    with pytest.raises(EnvError, match=r"own.*miniwob.*buttons"):
        GuiEnv(family)


def test_an_unknown_split_or_tool_is_refused():
    with pytest.raises(EnvError, match="'test' is unknown"):
        GuiEnv("own").reset(options={"split": "test"})
    with pytest.raises(EnvError, match=r"no tool 'tap'; the tools are click"):
        GuiEnv("own", tools=["tap"])


@dataclass(frozen=True, slots=True)
class Playing(Caller):
    """Replies with messages that were written before."""

    client: Any = None
    model: str = "m"
    replies: Iterator[Message] = field(default_factory=lambda: iter(()))

    async def reply(self, attempt: Attempt, messages: list[Message], tools: tuple[Any, ...], limits: Limits) -> Message:
        return next(self.replies)


async def test_episodes_side_by_side_as_a_worker_plays_them():
    envs = [GuiEnv("own/order"), GuiEnv("own/settings"), GuiEnv("miniwob/login-user")]

    async def episode(env: GuiEnv) -> Episode:
        task = env.make_task(5, "train")
        gold = iter(await asyncio.to_thread(env.gold, task))
        return await run_episode(env, Attempt("gui", "g", 8, "s", "train", 5), Playing(replies=gold), Limits())

    try:
        ends = await asyncio.gather(*map(episode, envs))
    finally:
        for env in envs:
            env.close()
    assert [(end.status, end.outcome) for end in ends] == [("done", 1.0)] * 3
