"""What an agent sees of a page and is told of its actions, sensible or not."""

import base64
import re

import pytest
from playing import said

from clawrl.rollout.env import message_of
from clawrl.types import Message
from envs.gui.env import NO_CALL, GuiEnv
from envs.gui.tools import TOOLS

pytestmark = pytest.mark.gui


@pytest.fixture(scope="module")
def shop(kept: GuiEnv):
    env = GuiEnv("own")
    env.reset(options={"task": 0})
    yield env
    env.close()


@pytest.fixture(autouse=True)
def _at_home(shop: GuiEnv) -> None:
    said(shop, "goto", url="/")


def ref_of(page: str, line: str) -> str:
    found = re.search(rf"{line} .*\[ref=(\w+)\]", page)
    assert found, page
    return found[1]


def test_a_page_is_title_address_and_elements_with_refs(shop):
    page = said(shop, "goto", url="/coupons")
    assert page.startswith("opened /coupons\n\nCoupons http://shop.test/coupons\n- navigation [ref=e1]:")
    assert re.findall(r"ref=e(\d+)", page) == [str(n) for n in range(1, page.count("[ref=") + 1)]
    assert "cursor" not in page


def test_refs_of_the_last_page_are_what_acts(shop):
    page = said(shop, "goto", url="/coupons")
    page = said(shop, "fill", target=ref_of(page, 'textbox "Code"'), text="SPRING")
    assert re.search(r'textbox "Code" .*: SPRING', page)
    page = said(shop, "click", target=ref_of(page, 'link "Orders"'))
    assert "\n\nOrders http://shop.test/orders" in page
    page = said(shop, "select", target=ref_of(page, 'combobox "Status"'), options=["shipped"])
    assert 'option "shipped" [selected]' in page
    page = said(shop, "click", target=ref_of(page, 'button "Show"'))
    assert "status=shipped" in page


def test_keys_go_to_the_focused_element_or_to_a_target(shop):
    page = said(shop, "goto", url="/customers")
    said(shop, "click", target='textbox "Search"')
    assert re.search(r'textbox "Search".*: a', said(shop, "press", key="a"))
    assert "search=a" in said(shop, "press", key="Enter", target=ref_of(page, 'textbox "Search"'))


def test_points_are_clicked_and_dragged(shop):
    said(shop, "goto", url="/board")
    assert said(shop, "drag", source="10,300", to="200,310").startswith("dragged 10,300 to 200,310")
    assert "Products http://shop.test/products" in said(shop, "click_at", x=30, y=20)


def test_a_form_that_is_refused_says_why_and_changes_nothing(shop):
    said(shop, "goto", url="/coupons")
    said(shop, "fill", target='textbox "Code"', text="X")
    said(shop, "fill", target='textbox "Percent"', text="many")
    page = said(shop, "click", target='button "Create"')
    assert "Percent must be a number from 1 to 90." in page
    assert shop.grade() == -1.0


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("click", {"target": "e999"}, r"error: click: e999 is not on the page; the refs of the last snapshot are e1"),
        ("click", {"target": 'button "Nothing"'}, r'error: click: button "Nothing" is not on the page'),
        ("click", {"target": "the button"}, r"error: click: 'the button' is no target; use a ref such as e4"),
        ("click", {"target": "css=a"}, r"error: click: 7 elements are css=a; the refs"),
        ("click", {"target": "css=[["}, r"error: click: .*css"),
        ("click", {"target": r'button "\q"'}, r"error: click: .* is no target; a name is written as in JSON"),
        ("goto", {"url": "http://["}, r"error: goto: 'http://\[' is no address"),
        ("fill", {"target": 'link "Board"', "text": "x"}, r"error: fill: "),
        ("press", {"key": "Foo"}, r"error: press: there is no key 'Foo'; use one such as Enter"),
        ("select", {"target": 'link "Board"', "options": ["x"]}, r"error: select: link \"Board\" has no option 'x'"),
        ("goto", {"url": "http://other.test/"}, r"error: goto: 'http://other.test/' is refused; only http://shop.test"),
        ("goto", {"url": "javascript:alert(1)"}, r"error: goto: .* is refused"),
        ("goto", {"url": "file:///etc/passwd"}, r"error: goto: .* is refused"),
        ("goto", {"url": "http://shop.test:81/"}, r"error: goto: .* is refused"),
        ("goto", {"url": "/nowhere"}, r"opened /nowhere\n\nNot saved"),
        ("click_at", {"x": 5000, "y": 5}, r"error: click_at: 5000,5 is outside of the window, which is 800 x 600"),
        ("drag", {"source": "e1", "to": "-5,5"}, r"error: drag: '-5,5' is no target"),
        ("tap", {}, r"error: there is no tool 'tap'; the tools are click, fill"),
        ("click", {}, r"error: click: 'target' is a required property"),
        ("select", {"target": "e1", "options": []}, r"error: select: "),
        ("click", {"target": "e1", "button": "left"}, r"error: click: Additional properties"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_told(shop, name, arguments, expected):
    assert re.match(expected, said(shop, name, **arguments))


def test_something_hidden_by_something_else_is_told_in_time(shop):
    said(shop, "goto", url="/coupons")
    cover = (
        "document.body.insertAdjacentHTML('beforeend', '<div style=\"position:fixed;inset:0;z-index:9\">cover</div>')"
    )
    browser, tab, _ = shop._open()
    browser.run(tab.page.evaluate(cover))
    assert said(shop, "click", target='button "Create"').startswith(
        "error: click: Locator.click: Timeout 3000ms exceeded"
    )


def test_no_call_is_told(shop):
    messages, *_ = shop.step({"role": "assistant", "content": "I would click it."})
    assert messages == ({"role": "user", "content": NO_CALL},)


def test_of_several_calls_each_is_answered_and_the_last_shows_the_page(shop):
    calls = [message_of("goto", url="/orders"), message_of("click", target='link "Board"'), message_of("nothing")]
    action: Message = {"role": "assistant", "tool_calls": [message["tool_calls"][0] for message in calls]}
    messages, *_ = shop.step(action)
    assert [message["role"] for message in messages] == ["tool"] * 3
    assert messages[0]["content"] == "opened /orders"
    assert "Board http://shop.test/board" in messages[2]["content"]


def test_only_the_tools_named_are_offered(opened):
    env = opened("buttons", tools=["click", "fill"])
    assert [tool["function"]["name"] for tool in env.tools] == ["click", "fill"]
    assert "there is no tool 'done'" in said(env, "done")
    assert len(TOOLS) == 9


def test_pages_as_images_too(opened):
    env = opened("own/board", images=True)
    seen, _ = env.reset(options={"task": 0})
    text, image = seen[0]["content"]
    assert text["text"].startswith("On the board, drag ticket")
    messages, *_ = env.step(message_of("goto", url="/board"))
    assert [message["role"] for message in messages] == ["tool", "user"]
    for part in (image, *messages[1]["content"]):
        kind, _, data = part["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64"
        assert base64.b64decode(data).startswith(b"\xff\xd8\xff")
