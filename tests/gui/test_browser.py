"""The browser of a process: shared, walled in, and replaced when it dies."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from playing import browsers, played, said

from clawrl.errors import EnvError
from clawrl.rollout.env import message_of
from envs.gui import browser as walls
from envs.gui.browser import Browser, find_browser
from envs.gui.env import GuiEnv
from envs.gui.site import Site
from envs.gui.tab import open_tab

pytestmark = pytest.mark.gui


class Outgoing(Site):
    """A page that tries everything to reach a server on this machine."""

    host = "evil.test"

    def __init__(self, port: int) -> None:
        self._port = port

    def app(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/html")])
        to = f"127.0.0.1:{self._port}"
        return [
            f"""<link rel=preconnect href=http://{to}/><link rel=prefetch href=http://{to}/prefetch>
            <img src=http://{to}/img><iframe src=http://localhost:{self._port}/frame></iframe>
            <a id=out href=http://{to}/page>out</a><script>
            fetch('http://{to}/fetch', {{mode: 'no-cors'}}).catch(() => 0);
            navigator.sendBeacon('http://{to}/beacon');
            try {{ new WebSocket('ws://{to}/socket'); }} catch (error) {{ }}
            const peer = new RTCPeerConnection({{iceServers: [{{urls: 'turn:{to}?transport=tcp', username: 'u',
                credential: 'c'}}]}});
            peer.createDataChannel('x');
            peer.createOffer().then(offer => peer.setLocalDescription(offer));
            </script>""".encode()
        ]

    async def begin(self, page) -> str:
        return ""

    async def verdict(self, page) -> float:
        return 0.0

    async def gold(self, page):
        return []


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(1.5)
        yield listening


@pytest.mark.parametrize("namespace", [True, False])
def test_nothing_leaves_the_browser(server, namespace, monkeypatch):
    if namespace and not walls.no_network():
        pytest.skip("this system allows no network namespaces")
    if not namespace:
        monkeypatch.setattr(walls, "no_network", tuple)
    browser = Browser(find_browser())
    try:
        tab = browser.run(open_tab(browser.chromium, Outgoing(server.getsockname()[1])))
        answer = browser.run(tab.do("click", {"target": "css=#out"}))
        assert "[refused: http://" in answer
        assert "only http://evil.test can be reached" in answer
        assert tab.page.url == "http://evil.test/"
        with pytest.raises(TimeoutError):
            server.accept()
    finally:
        browser.close()


def test_two_environments_share_a_browser_and_nothing_else(opened):
    one, other = opened("own/settings"), opened("own/settings")
    assert one._browser is other._browser
    gold = list(one.gold(one.task))
    for action in gold[:4]:
        one.step(action)
    assert "Settings http://shop.test/settings" in said(one, "goto", url="/settings")
    assert "Log in http://shop.test/settings" in said(other, "goto", url="/settings")
    assert played(one, [message_of("goto", url="/settings"), *gold[4:]]) == 1.0
    assert played(other, [message_of("done")]) == -1.0


def test_a_new_episode_knows_nothing_of_the_one_before(opened):
    env = opened("own/settings")
    gold = list(env.gold(env.task))
    assert played(env, gold) == 1.0
    env.reset(options={"task": 0})
    assert env.grade() == -1.0
    assert "Log in http://shop.test/settings" in said(env, "goto", url="/settings")


def test_a_browser_that_dies_ends_the_episodes_on_it_and_is_replaced(opened):
    one, other = opened("own/stock"), opened("own/stock")
    (top,) = [each for each in browsers() if "--type=" not in " ".join(each.cmdline())]
    top.send_signal(signal.SIGKILL)
    top.wait(5)
    for env in (one, other):
        with pytest.raises(EnvError, match="the browser died; the next reset starts another"):
            env.step(message_of("click", target="e1"))
    with pytest.raises(EnvError, match="died"):
        one.grade()
    for env in (one, other):
        env.reset(options={"task": 0})
        assert played(env, env.gold(env.task)) == 1.0
    assert one._browser is other._browser


def test_it_ends_with_its_last_environment_and_with_its_process(tmp_path):
    script = (
        "import os, psutil\nfrom envs.gui.env import GuiEnv\n"
        "def alive(): return sum('chrom' in each.name() for each in psutil.Process().children(recursive=True))\n"
        "envs = [GuiEnv('buttons/one') for _ in range(2)]\n"
        "[env.reset(options={'task': 0}) for env in envs]\n"
        "before = alive(); envs[0].close(); one_left = alive(); envs[1].close(); none_left = alive()\n"
        "print(before > 0, one_left > 0, none_left, flush=True)\n"
        "envs[0].reset(options={'task': 0})\n"
        "print(*(each.pid for each in psutil.Process().children(recursive=True)), flush=True)\n"
        "input()\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True True 0\n"
        started = [int(pid) for pid in process.stdout.readline().split()]
        process.kill()
    assert len(started) > 1
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in started):
        assert time.monotonic() < deadline, "processes are left of a killed worker"
        time.sleep(0.1)


def test_a_missing_browser_is_told_with_the_remedy(monkeypatch):
    with pytest.raises(EnvError, match=r"browser='/no/such' is no executable; name a chromium"):
        GuiEnv("buttons/one", browser="/no/such").reset()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(EnvError, match="install Debian's chromium-headless-shell"):
        GuiEnv("buttons/one").reset()


def test_a_browser_that_does_not_start_is_told(tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(EnvError, match=f"gui: {broken}: "):
        GuiEnv("buttons/one", browser=str(broken)).reset()


def test_a_browser_that_hangs_is_replaced(opened):
    env = opened("own/stock")
    browser, tab, _ = env._open()
    with pytest.raises(EnvError, match=r"no answer from the browser in 0.5 s; the next reset starts one"):
        browser.run(tab.page.evaluate("() => { while (true); }"), 0.5)
    assert not browser.alive
    env.reset(options={"task": 0})
    assert env._browser is not browser
    assert played(env, env.gold(env.task)) == 1.0


def test_a_tab_that_cannot_be_closed_holds_no_browser(monkeypatch):
    env = GuiEnv("buttons/one")
    env.reset(options={"task": 0})
    browser, tab, _ = env._open()
    users = browser.users

    async def stuck() -> None:
        raise EnvError("stuck")

    monkeypatch.setattr(tab, "close", stuck)
    with pytest.raises(EnvError, match="stuck"):
        env.close()
    assert browser.users == users - 1
    env.close()
    assert browser.users == users - 1


@pytest.mark.parametrize("hangs", ["at its start", "at its end"])
def test_nothing_is_left_of_a_browser_that_hangs(tmp_path, monkeypatch, hangs):
    monkeypatch.setattr(walls, "STOP_S", 1.0)
    before = {each.pid for each in psutil.Process().children(recursive=True)}
    if hangs == "at its start":
        monkeypatch.setattr(walls, "LAUNCH_S", 3.0)
        silent = tmp_path / "silent"
        silent.write_text("#!/bin/sh\nexec sleep 1000\n")
        silent.chmod(0o755)
        with pytest.raises(EnvError, match="no answer from the browser in 3 s"):
            Browser(str(silent))
    else:
        browser = Browser(find_browser())
        for each in psutil.Process().children(recursive=True):
            if each.pid not in before and "chrom" in each.name():
                each.suspend()
        browser.close()
    deadline = time.monotonic() + 10
    while left := [each for each in psutil.Process().children(recursive=True) if each.pid not in before]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_a_defect_of_a_site_is_its_own_tabs_error(opened, monkeypatch):
    one, other = opened("own/stock"), opened("own/stock")
    site = one._site
    monkeypatch.setattr(site, "app", lambda environ, start_response: 1 / 0)
    with pytest.raises(EnvError, match=r"shop.test failed: ZeroDivisionError"):
        one.step(message_of("goto", url="/orders"))
    assert "Orders http" in said(other, "goto", url="/orders")
