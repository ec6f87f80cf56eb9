"""Web pages: an agent reads a page as text with refs, acts on it by tools, and says when it is done.

    user: instruction + page       - button "Save" [ref=e4]
    assistant: click("e4") ─► what came of it + page          done() ─► verdict of the site on its own state

Knows tools, tabs and tasks. Ignores what a site is, how many turns there are and how long an observation may be.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from clawrl.errors import EnvError
from clawrl.rollout.env import AgentEnv, Answer, Call, Opening, Split, calls
from clawrl.types import Message
from envs.gui.browser import CALL_S, Browser, find_browser, hold, release
from envs.gui.site import GuiTask, Site
from envs.gui.tab import Tab, open_tab
from envs.gui.tasks import make_gui_task, named
from envs.gui.tools import TOOLS

EACH_S = 20.0
"""Longer than one action's own limits: so much more time has a message for each of its calls."""
NO_CALL = 'error: nothing was done; call a tool, such as click {"target": "e4"}, or done {} when the task is done'


class GuiEnv(AgentEnv[GuiTask]):
    """family: which tasks, by name or by the part before the slash (`tasks.named`), one or several.

    images: show the page as a JPEG too. tools: the names of those offered; none is all. browser: a chromium.
    """

    name = "gui"

    def __init__(
        self,
        family: str | Sequence[str] = "own",
        images: bool = False,
        tools: Sequence[str] = (),
        browser: str | None = None,
    ) -> None:
        """Raises EnvError for a family or tool that there is none of."""
        super().__init__()
        self._makers = named([family] if isinstance(family, str) else family, images)
        known = {tool["function"]["name"]: tool for tool in TOOLS}
        if unknown := [tool for tool in tools if tool not in known]:
            raise EnvError(f"gui: there is no tool {unknown[0]!r}; the tools are {', '.join(known)}")
        self._offered = tuple(known[tool] for tool in tools) or TOOLS
        self._images, self._executable = images, browser
        self._browser: Browser | None = None
        self._tab: Tab | None = None
        self._site: Site | None = None

    def make_task(self, number: int, split: Split) -> GuiTask:
        return make_gui_task(self._makers, number, split)

    def begin(self, task: GuiTask) -> Opening:
        """Raises EnvError if there is no browser, or it does not start."""
        self._close_tab()
        browser, self._site = self._living(), task.open()
        return browser.run(self._begin(browser, self._site))

    def act(self, action: Message) -> Answer:
        made = calls(action, self.tools)
        if not made:
            return Answer(({"role": "user", "content": NO_CALL},))
        browser, tab, site = self._open()
        return browser.run(self._act(tab, site, made), CALL_S + EACH_S * len(made))

    def grade(self) -> float:
        browser, tab, site = self._open()
        return browser.run(self._grade(tab, site))

    def gold(self, task: GuiTask) -> Sequence[Message]:
        """Read off a page of its own, so that the episode under way, if any, is not touched."""
        browser = self._living()
        return browser.run(self._gold(browser, task.open()))

    def close(self) -> None:
        try:
            self._close_tab()
        finally:
            browser, self._browser = self._browser, None
            if browser is not None:
                release(browser)

    # -- in the browser's thread ---------------------------------------------------------------------------------------

    async def _begin(self, browser: Browser, site: Site) -> Opening:
        tab = self._tab = await open_tab(browser.chromium, site)
        instruction = await site.begin(tab.page)
        await tab.settle()
        shown: Message = {"role": "user", "content": f"{instruction}\n\n{await tab.look()}"}
        if self._images:
            shown["content"] = [{"type": "text", "text": shown["content"]}, await _picture(tab)]
        return Opening((shown,), self._offered)

    async def _act(self, tab: Tab, site: Site, made: Sequence[Call]) -> Answer:
        """Each call is answered; the last answer has the page in it, unless nothing was done to the page."""
        messages: list[Message] = []
        touched = False
        for call in made:
            if call.problem is None and call.name == "done":
                return Answer((*messages, call.reply("done")), terminated=True)
            messages.append(call.reply(call.problem or await tab.do(call.name, call.arguments)))
            touched |= call.problem is None
            if await site.over(tab.page):
                return Answer(tuple(messages), terminated=True)
        if touched:
            messages[-1]["content"] += f"\n\n{await tab.look()}"
        if touched and self._images:
            messages.append({"role": "user", "content": [await _picture(tab)]})
        return Answer(tuple(messages))

    async def _grade(self, tab: Tab, site: Site) -> float:
        return await site.verdict(tab.page)

    async def _gold(self, browser: Browser, site: Site) -> Sequence[Message]:
        tab = await open_tab(browser.chromium, site)
        try:
            await site.begin(tab.page)
            await tab.settle()
            return await site.gold(tab.page)
        finally:
            await tab.close()

    # -- the browser ---------------------------------------------------------------------------------------------------

    def _living(self) -> Browser:
        """The process's browser; another one where it died."""
        if self._browser is not None and not self._browser.alive:
            release(self._browser)
            self._browser = self._tab = self._site = None
        if self._browser is None:
            self._browser = hold(find_browser(self._executable))
        return self._browser

    def _open(self) -> tuple[Browser, Tab, Site]:
        if self._browser is None or self._site is None or self._tab is None:
            raise EnvError("gui: there is no page; call reset first")
        return self._browser, self._tab, self._site

    def _close_tab(self) -> None:
        tab, self._tab, self._site = self._tab, None, None
        if tab is not None and self._browser is not None and self._browser.alive:
            self._browser.run(tab.close())


async def _picture(tab: Tab) -> dict[str, Any]:
    """The page as a part of a message's content."""
    encoded = base64.b64encode(await tab.jpeg()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{encoded}"}}
