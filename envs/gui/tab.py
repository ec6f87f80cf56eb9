"""What one agent sees and does: a browser context of its own with a page, whose requests one site answers.

    open ─► do("click", {"target": "e4"}) ─► "clicked" or "error: …" ─► look ─► url, title, aria snapshot with refs

Knows playwright's pages. Ignores tasks and messages. All of it runs in the browser's thread.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

from playwright.async_api import Browser as Chromium
from playwright.async_api import BrowserContext, Locator, Page, Route, WebSocketRoute
from playwright.async_api import Error as PlaywrightError

from clawrl.errors import EnvError
from envs.gui.browser import first_line
from envs.gui.site import Site, call

WIDTH, HEIGHT = 800, 600
ACT_S = 3.0
"""So long an element may take to become clickable, and a page to load."""
OPEN_S = 30.0
LOOK_S = 30.0
"""To be seen is no part of what the agent does: on a busy machine a page takes its time."""
SETTLE_S = 5.0
RETRY_S = 0.02
QUIET = 2
"""So many looks in a row must find no request begun or under way, a frame apart."""
JPEG_QUALITY = 60
DRAG_STEPS = 8

_SHOWN_REF = re.compile(r"\[ref=(\w+)\]")
_REF = re.compile(r"e\d+")
_NAMED = re.compile(r'([a-z]+) ("(?:[^"\\]|\\.)*")')
_POINT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*")
_OPTIONS = "element => [...(element.options ?? [])].map(option => option.label)"
_FRAME = "() => new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))"


class Unclear(Exception):
    """An action that cannot be done as it is told; the text is the agent's."""


class Tab:
    """Make one with `open_tab`; close it."""

    def __init__(self, context: BrowserContext, site: Site) -> None:
        self._context, self._site = context, site
        self._begun = self._under_way = 0
        self._refused = ""
        self._defect: Exception | None = None
        self._refs: dict[str, str] = {}

    @property
    def page(self) -> Page:
        """The page in front: the one opened last. Raises playwright's Error if there is none any more."""
        if not self._context.pages:
            raise PlaywrightError("all pages are closed")
        return self._context.pages[-1]

    async def look(self) -> str:
        """The page as text: title, url and the aria snapshot."""
        page = self.page
        snapshot = tidy(await page.locator("body").aria_snapshot(mode="ai", timeout=LOOK_S * 1000))
        self._refs = {f"e{number}": ref for number, ref in enumerate(_SHOWN_REF.findall(snapshot), 1)}
        numbers = iter(self._refs)
        shown = _SHOWN_REF.sub(lambda _: f"[ref={next(numbers)}]", snapshot)
        return f"{await page.title()} {page.url}\n{shown}"

    async def jpeg(self) -> bytes:
        return await self.page.screenshot(type="jpeg", quality=JPEG_QUALITY, timeout=LOOK_S * 1000)

    async def do(self, name: str, given: Mapping[str, Any]) -> str:
        """Do an action whose arguments fit its schema, and tell what came of it. Raises EnvError or playwright's."""
        try:
            said = await getattr(self, f"_{name}")(**given)
        except Unclear as error:
            return f"error: {name}: {error}"
        except PlaywrightError as error:
            if self.page.is_closed():
                raise
            said = f"error: {name}: {first_line(error)}"
        await self.settle()
        refused, self._refused = self._refused, ""
        return f"{said}\n[refused: {refused}; only http://{self._site.host} can be reached]" if refused else said

    async def settle(self) -> None:
        """Wait until nothing is on its way any more, SETTLE_S at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                quiet = 0
                while quiet < QUIET:
                    before = self._begun
                    try:
                        await self.page.wait_for_load_state(timeout=ACT_S * 1000)
                        await self.page.evaluate(_FRAME)
                    except PlaywrightError:
                        if self.page.is_closed():
                            raise
                        await asyncio.sleep(RETRY_S)  # the page went away under it, for another one
                    quiet = quiet + 1 if self._begun == before and not self._under_way else 0
        if self._defect is not None:
            raise EnvError(
                f"gui: {self._site.host} failed: {type(self._defect).__name__}: {self._defect}"
            ) from self._defect

    async def close(self) -> None:
        with suppress(PlaywrightError):
            await self._context.close()

    # -- actions: their names and arguments are the tools' ------------------------------------------------------------

    async def _click(self, target: str) -> str:
        await (await self._find(target)).click(timeout=ACT_S * 1000)
        return f"clicked {target}"

    async def _fill(self, target: str, text: str) -> str:
        await (await self._find(target)).fill(text, timeout=ACT_S * 1000)
        return f"filled {target}"

    async def _press(self, key: str, target: str | None = None) -> str:
        try:
            if target is None:
                await self.page.keyboard.press(key)
            else:
                await (await self._find(target)).press(key, timeout=ACT_S * 1000)
        except PlaywrightError as error:
            if "Unknown key" in str(error):
                raise Unclear(
                    f"there is no key {key!r}; use one such as Enter, Tab, ArrowDown, a, Control+a"
                ) from error
            raise
        return f"pressed {key}"

    async def _select(self, target: str, options: list[str]) -> str:
        found = await self._find(target)
        labels = await found.evaluate(_OPTIONS, timeout=ACT_S * 1000)
        if wrong := [option for option in options if option not in labels]:
            raise Unclear(f"{target} has no option {wrong[0]!r}; its options are {', '.join(labels) or 'none'}")
        await found.select_option(label=options, timeout=ACT_S * 1000)
        return f"selected {', '.join(options)}"

    async def _scroll(self, target: str | None = None, dx: float = 0, dy: float = 0) -> str:
        x, y = WIDTH / 2, HEIGHT / 2
        if target is not None:
            x, y = await self._middle(target)
        await self.page.mouse.move(x, y)
        await self.page.mouse.wheel(dx, dy)
        return f"scrolled by {dx:g},{dy:g}"

    async def _drag(self, source: str, to: str) -> str:
        await self._middle(source)
        end, mouse = await self._middle(to), self.page.mouse
        start = await self._middle(source, scroll=False)  # where it is now that the other one is in view
        await mouse.move(*start)
        await mouse.down()
        await mouse.move(*end, steps=DRAG_STEPS)
        await mouse.up()
        return f"dragged {source} to {to}"

    async def _goto(self, url: str) -> str:
        try:
            whole = urljoin(self.page.url, url)
            parts = urlsplit(whole)
        except ValueError as error:
            raise Unclear(f"{url!r} is no address; use one such as /products") from error
        if (parts.scheme, parts.netloc) != ("http", self._site.host):
            raise Unclear(f"{url!r} is refused; only http://{self._site.host} can be reached")
        await self.page.goto(whole, timeout=ACT_S * 1000)
        return f"opened {url}"

    async def _click_at(self, x: float, y: float) -> str:
        await self.page.mouse.click(*_inside(x, y))
        return f"clicked at {x:g},{y:g}"

    # -- targets -------------------------------------------------------------------------------------------------------

    async def _find(self, target: str) -> Locator:
        """The one element meant. Raises Unclear for none or several."""
        found = self._located(target)
        count = await found.count()
        if count == 0:
            raise Unclear(f"{target} is not on the page; {self._known()}")
        if count > 1:
            raise Unclear(f"{count} elements are {target}; {self._known()}")
        return found

    def _known(self) -> str:
        return f"the refs of the last snapshot are e1 to e{len(self._refs)}" if self._refs else "it shows no refs"

    def _located(self, target: str) -> Locator:
        if target in self._refs:
            return self.page.locator(f"aria-ref={self._refs[target]}")
        if named := _NAMED.fullmatch(target):
            try:
                name = json.loads(named[2])
            except ValueError as error:
                raise Unclear(f"{target!r} is no target; a name is written as in JSON ({error})") from error
            return self.page.get_by_role(named[1], name=name, exact=True)  # type: ignore[arg-type]
        if target.startswith("css="):
            return self.page.locator(target)
        if _REF.fullmatch(target):
            raise Unclear(f"{target} is not on the page; {self._known()}")
        raise Unclear(f'{target!r} is no target; use a ref such as e4, or a role and name such as button "Save"')

    async def _middle(self, target: str, *, scroll: bool = True) -> tuple[float, float]:
        """Window coordinates of a point that is given, or of an element's middle. Raises Unclear outside of it."""
        if point := _POINT.fullmatch(target):
            return _inside(float(point[1]), float(point[2]))
        found = await self._find(target)
        if scroll:
            await found.scroll_into_view_if_needed(timeout=ACT_S * 1000)
        box = await found.bounding_box(timeout=ACT_S * 1000)
        if box is None:
            raise Unclear(f"{target} is not visible")
        return _inside(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    # -- requests ------------------------------------------------------------------------------------------------------

    async def answer(self, route: Route) -> None:
        """The site answers what is its host's; everything else is refused."""
        self._begun += 1
        self._under_way += 1
        try:
            await self._answer(route)
        except PlaywrightError:
            pass  # the page went away before its answer came
        except Exception as error:  # playwright would raise it from whatever call is the next, of any tab
            self._defect = error
            await route.abort("aborted")
        finally:
            self._under_way -= 1

    async def _answer(self, route: Route) -> None:
        request = route.request
        parts = urlsplit(request.url)
        if (parts.scheme, parts.netloc) != ("http", self._site.host):
            self._refused = request.url[:200]
            await route.abort("aborted")  # a navigation then stays where it was
            return
        body = request.post_data_buffer or b""
        reply = call(self._site.app, request.method, request.url, request.headers, body)
        headers = dict(reply.headers)
        if reply.status in (301, 302, 303) and (where := headers.pop("Location", None)):
            # A redirect of an answered request would go to the network, not come back here.
            headers["Content-Type"] = "text/html"
            await route.fulfill(
                status=200, headers=headers, body=f"<script>location.replace({json.dumps(where)})</script>"
            )
            return
        await route.fulfill(status=reply.status, headers=headers, body=reply.body)


async def open_tab(chromium: Chromium, site: Site) -> Tab:
    """A context with nothing in it from before, at the site's first page. Raises playwright's Error."""
    context = await chromium.new_context(
        viewport={"width": WIDTH, "height": HEIGHT}, service_workers="block", accept_downloads=False, locale="en-US"
    )
    tab = Tab(context, site)
    try:
        await context.route("**/*", tab.answer)
        await context.route_web_socket("**/*", _hang_up)
        page = await context.new_page()
        await page.goto(site.start_url, timeout=OPEN_S * 1000)
    except PlaywrightError:
        await tab.close()
        raise
    return tab


def tidy(snapshot: str) -> str:
    """The snapshot without what tells an agent nothing: the body around it all, and the shape of the cursor."""
    lines = snapshot.replace(" [cursor=pointer]", "").splitlines() or [""]
    if re.fullmatch(r"- generic.*:", lines[0]) and all(line.startswith("  ") for line in lines[1:]):
        lines = [line[2:] for line in lines[1:]]
    return "\n".join(lines)


def _inside(x: float, y: float) -> tuple[float, float]:
    if not (0 <= x < WIDTH and 0 <= y < HEIGHT):
        raise Unclear(f"{x:g},{y:g} is outside of the window, which is {WIDTH} x {HEIGHT}")
    return x, y


async def _hang_up(socket: WebSocketRoute) -> None:
    await socket.close()
