"""The server's page in Chromium: by mouse, by keyboard alone, in both colours, on a phone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("playwright", reason="needs playwright: pip install '.[browser]'")
pytest.importorskip("uvicorn")

from playwright.sync_api import Browser, Page, Request, expect
from tests.engine.serve.conftest import Sweeps, counted_sweeps
from tests.integration.browser import CHROMIUM, browser, listening
from tests.integration.test_serve import folder as folder

from pipeload.serve.application import Application
from pipeload.serve.settings import Settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.xdist_group("serve"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]

_PATIENCE_MS = 60_000
_PHONE = {"width": 360, "height": 740}
_DESK = {"width": 1280, "height": 900}
_KEY = "a-key-of-this-test"

_CONTRASTS = """() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const found = channels(getComputedStyle(node).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const made = {};
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.checkVisibility() || node.disabled || node.closest("td, svg")) continue;
    const [a, b] = [light(channels(getComputedStyle(node).color)), light(ground(node))];
    made[`${node.tagName} ${node.id} ${node.className}`] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return made;
}"""
"""Element with a text -> contrast of its text to the ground, as WCAG 2 counts it."""


def _settings(folder: Path, **options: Any) -> Settings:
    directories = {name: folder / name for name in ("chat", "embedder")}
    return Settings(**{"directories": directories, "aliases": {"alias": "chat"}, "budget": "4GB", **options})


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as started:
        yield started


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[tuple[str, Application]]:
    with listening(_settings(folder)) as made:
        yield made


class Watched:
    """A page whose requests and complaints are kept."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[Request] = []
        self.complaints: list[str] = []
        page.set_default_timeout(_PATIENCE_MS)
        page.on("request", lambda request: self.requests.append(request))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))

    def asked(self, path: str) -> list[Request]:
        return [one for one in self.requests if one.url.endswith(path)]


@pytest.fixture
def opened(chromium: Browser, server: tuple[str, Application], request: pytest.FixtureRequest) -> Iterator[Watched]:
    """The page, with the options of a browser's context as a test gives them. It asks nobody else, nor complains."""
    address, _ = server
    context = chromium.new_context(**{"viewport": _DESK, "color_scheme": "light", **getattr(request, "param", {})})
    watched = Watched(context.new_page())
    watched.page.goto(address)
    expect(watched.page.locator("#chat-model option")).to_have_text(["chat", "alias"])
    yield watched
    context.close()
    assert not watched.complaints
    assert [one.url for one in watched.requests if not one.url.startswith(f"{address}/")] == []


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sweeps]:
    with counted_sweeps(monkeypatch) as made:
        yield made


def _ask(page: Page, text: str, tokens: int = 8) -> None:
    if not page.locator("#chat-tokens").is_visible():
        page.locator("#chat summary").click()
    page.locator("#chat-tokens").fill(str(tokens))
    page.locator("#chat-text").fill(text)
    page.locator("#chat-send").click()


def _complete(page: Page) -> None:
    expect(page.locator("#chat-status")).to_have_text("The answer is complete.", timeout=_PATIENCE_MS)


def test_an_answer_streams_and_the_next_question_knows_it(opened: Watched, sweeps: Sweeps) -> None:
    page = opened.page
    page.locator("#chat summary").click()
    page.locator("#chat-system").fill("Be brief.")
    page.locator("#chat-temperature").fill("0")
    gate = sweeps.stop_at(4)
    _ask(page, "What is the capital\nof France?")
    gate.wait_reached()
    answer = page.locator("#chat-log .assistant .text")
    expect(answer).not_to_be_empty()
    begun = answer.inner_text()
    expect(page.locator("#chat-log")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#chat-send")).to_be_disabled()
    gate.open()
    _complete(page)
    whole = answer.text_content() or ""
    assert whole.startswith(begun)
    assert len(whole) > len(begun)
    line = page.locator("#chat-log .assistant .hint").inner_text()
    assert "8 tokens ·" in line
    assert "tokens/s" in line
    assert line.endswith("cut off at the most tokens")
    expect(page.locator("#chat-log .user .text")).to_have_text("What is the capital\nof France?")
    _ask(page, "Why?")
    _complete(page)
    bodies = [json.loads(one.post_data or "") for one in opened.asked("/v1/chat/completions")]
    assert bodies[0]["temperature"] == 0
    assert bodies[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital\nof France?"},
        {"role": "assistant", "content": whole},
        {"role": "user", "content": "Why?"},
    ]


@pytest.mark.parametrize("how", ["button", "escape", "new chat"])
def test_an_answer_that_is_stopped_gives_its_place_up(
    opened: Watched, server: tuple[str, Application], sweeps: Sweeps, how: str
) -> None:
    page, (_, application) = opened.page, server
    gate = sweeps.stop_at(5)
    _ask(page, "Count to a hundred.", tokens=90)
    gate.wait_reached()
    expect(page.locator("#chat-log .assistant .text")).not_to_be_empty()
    (place,) = application.desk.admission.places
    if how == "button":
        page.locator("#chat-stop").click()
    elif how == "escape":
        page.locator("#chat-text").press("Escape")
    else:
        page.locator("#chat-new").click()
    if how == "new chat":
        expect(page.locator("#chat-log article")).to_have_count(0)
    else:
        expect(page.locator("#chat-log .assistant .hint")).to_contain_text("Stopped.")
    expect(page.locator("#chat-send")).to_be_enabled()
    while not place.left:
        page.evaluate("() => null")
    gate.open()
    _ask(page, "Go on.", tokens=2)
    _complete(page)
    messages = json.loads(opened.asked("/v1/chat/completions")[-1].post_data or "")["messages"]
    assert [one["role"] for one in messages] == (["user"] if how == "new chat" else ["user", "assistant", "user"])
    assert not application.desk.admission.places
    # The stopped one took part in no sweep after its gate; the other one made at most three.
    assert sweeps.count <= 8


def test_a_failure_is_told_in_the_servers_words_and_the_question_stays(opened: Watched) -> None:
    page = opened.page
    _ask(page, "Tell all.", tokens=10**9)
    expect(page.locator("#chat-log .error")).to_contain_text("positions")
    expect(page.locator("#chat-text")).to_have_value("Tell all.")
    assert opened.complaints.pop().startswith(
        "error: Failed to load resource: the server responded with a status of 400"
    )
    _ask(page, "Tell less.")
    _complete(page)
    messages = json.loads(opened.asked("/v1/chat/completions")[-1].post_data or "")["messages"]
    assert messages == [{"role": "user", "content": "Tell less."}]


def test_texts_stay_texts(opened: Watched) -> None:
    page = opened.page
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    _ask(page, text)
    _complete(page)
    expect(page.locator("#chat-log .user .text")).to_have_text(text)
    assert page.locator("#chat-log img, #chat-log script").count() == 0


def test_embeddings_become_a_table_of_cosines(opened: Watched, server: tuple[str, Application]) -> None:
    page, texts = opened.page, ["the cat", "a dog sat", "the cat"]
    page.locator("#tab-embeddings").click()
    page.locator("#embeddings-texts").fill("\n\n".join(texts))
    page.locator("#embeddings button.main").click()
    table = page.locator("table.cosines")
    expect(table.locator("tbody th")).to_have_text([f"{at}. {text}" for at, text in enumerate(texts, 1)])
    shown = [[float(cell.inner_text()) for cell in row.locator("td").all()] for row in table.locator("tbody tr").all()]
    answer = page.request.post(f"{server[0]}/v1/embeddings", data={"model": "embedder", "input": texts}).json()
    vectors = np.array([one["embedding"] for one in answer["data"]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    np.testing.assert_allclose(shown, vectors @ vectors.T, atol=0.0051)
    shades = [cell.evaluate("cell => getComputedStyle(cell).backgroundColor") for cell in table.locator("td").all()]
    assert shades[0] == shades[2]
    page.locator("#embeddings-texts").fill("one alone")
    page.locator("#embeddings button.main").click()
    expect(page.locator("#embeddings-status")).to_have_text("There are 1 texts. Write 2 to 40, one a line.")


def test_the_machine_shows_memory_shards_and_lanes(opened: Watched, server: tuple[str, Application]) -> None:
    page = opened.page
    _ask(page, "What is the capital of France?")
    _complete(page)
    machine = page.request.get(f"{server[0]}/machine").json()
    chat = page.locator("#machine section.model").filter(has_text="text-generation")
    sweep = machine["models"][0]["sweep"]
    expect(chat.locator("h4").first).to_contain_text(f"Agents in sweep {sweep['number']},")
    expect(page.locator("#machine dl").first).to_contain_text("4.00 GB")
    label = page.locator("#machine .memory svg").get_attribute("aria-label") or ""
    assert label.startswith("Memory: ")
    assert "of 4.00\u00a0GB" in label
    rows = page.locator("#machine table.legend tbody tr")
    expect(rows.filter(has_text="resident shards").locator("td")).to_have_count(3)
    bars = page.locator("#machine .memory rect:not(.now):not(.unused)").all()
    edges = [(float(bar.get_attribute("x") or 0), float(bar.get_attribute("width") or 0)) for bar in bars]
    for (x, width), (following, _) in pairwise(edges):
        assert x + width == pytest.approx(following)
    assert chat.locator(".shards rect").count() == len(machine["models"][0]["shards"])
    assert chat.locator(".lanes svg").count() == len(sweep["lanes"])
    assert chat.locator(".lanes rect").count() == sum(len(lane["spans"]) for lane in sweep["lanes"])
    chat.locator("summary").click()
    expect(chat.locator("details th[scope=row]").first).to_have_text("inference")


def test_the_machine_shows_where_a_model_of_a_cluster_was_placed_anew(
    opened: Watched, server: tuple[str, Application]
) -> None:
    """The latest change first; a reason is a text, whatever is in it."""
    page = opened.page
    machine = page.request.get(f"{server[0]}/machine").json()
    stages = [{"node": name, "first": f"block.00{at}", "last": f"block.01{at}"} for at, name in enumerate("ab")]
    changes = [
        {"at_s": 0, "before": stages[:1], "after": stages, "why": "The node b has joined.", "waited_s": 0},
        {"at_s": 86400, "before": stages, "after": None, "why": "<b>No room</b>.", "waited_s": 1.5},
    ]
    machine["models"][0] |= {"memory": None, "sweep": None, "shards": [], "stages": stages, "reconfigurations": changes}
    page.route("**/machine", lambda route: route.fulfill(json=machine))
    items = page.locator("#machine section.model").first.locator(".changes li")
    expect(items).to_have_count(2)
    expect(items.nth(0)).to_contain_text(": <b>No room</b>. Stays on a (block.000 to block.010), b (block.001 to")
    expect(items.nth(0)).to_contain_text("calls waited 1.50 s.")
    expect(items.nth(0).locator("time")).to_have_attribute("datetime", "1970-01-02T00:00:00.000Z")
    expect(items.nth(1)).to_contain_text(": The node b has joined. Moved from a (block.000 to block.010) to a (block")
    expect(items.nth(1)).to_contain_text("no call waited.")
    expect(page.locator("#machine section.model").last.locator(".changes")).to_be_hidden()
    page.unroute("**/machine")


@pytest.mark.parametrize("opened", [{"viewport": _PHONE}], indirect=True)
def test_the_machine_is_asked_only_while_it_can_be_seen(opened: Watched) -> None:
    page = opened.page
    page.clock.install()
    page.reload()
    expect(page.locator("#chat-model option")).to_have_count(2)
    page.clock.run_for(5000)
    assert not opened.asked("/machine")
    page.locator("#tab-machine").click()
    expect(page.locator("#machine .memory svg")).to_be_visible()
    for count in (2, 3):
        with page.expect_response("**/machine"):
            page.clock.run_for(1000)
        assert len(opened.asked("/machine")) == count
    page.locator("#tab-chat").click()
    page.clock.run_for(5000)
    assert len(opened.asked("/machine")) == 3


def test_controls_have_roles_and_names(opened: Watched) -> None:
    page = opened.page
    for role, name in (
        ("tabpanel", "Chat"),
        ("tabpanel", "Machine"),
        ("combobox", "Model"),
        ("log", "Conversation"),
        ("textbox", "Message"),
        ("button", "Send"),
        ("button", "Stop"),
    ):
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()  # type: ignore[arg-type]
    expect(page.get_by_role("textbox", name="Message")).to_have_accessible_description(
        "Enter sends, Shift+Enter begins a line, Esc stops."
    )
    page.get_by_role("tab", name="Embeddings").click()
    expect(page.get_by_role("tab", selected=True)).to_have_text("Embeddings")
    expect(page.get_by_role("textbox", name="Texts, one a line")).to_be_visible()
    unnamed = page.locator("main :is(button, input, select, textarea, svg[role=img])")
    for control in unnamed.all():
        if control.is_visible():
            expect(control).to_have_accessible_name(re.compile("."))


@pytest.mark.parametrize("opened", [{"viewport": _PHONE}], indirect=True)
def test_a_keyboard_alone_is_enough(opened: Watched) -> None:
    page = opened.page
    press, focused = page.keyboard.press, page.locator(":focus")

    def tab_to(name: str) -> None:
        for _ in range(20):
            press("Tab")
            if focused.get_attribute("id") == name:
                # The browser draws a ring around it.
                assert focused.evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
                return
        raise AssertionError(f"Tab does not reach {name}")

    tab_to("tab-chat")
    tab_to("chat-text")
    page.keyboard.type("First line")
    press("Shift+Enter")
    page.keyboard.type("second line")
    press("Enter")
    expect(page.locator("#chat-log .user .text")).to_have_text("First line\nsecond line")
    _complete(page)
    expect(page.locator("#chat-text")).to_be_focused()
    page.reload()
    tab_to("tab-chat")
    press("ArrowRight")
    expect(page.locator("#tab-embeddings")).to_be_focused()
    expect(page.locator("#tab-embeddings")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#chat")).to_be_hidden()
    tab_to("embeddings-texts")
    press("Control+Enter")
    expect(page.locator("table.cosines")).to_be_visible()
    page.locator("#tab-embeddings").focus()
    press("End")
    expect(page.locator("#machine .memory svg")).to_be_visible()
    press("ArrowRight")
    expect(page.locator("#tab-chat")).to_be_focused()
    expect(page.locator("#chat")).to_be_visible()


@pytest.mark.parametrize(
    "opened",
    [{"viewport": size, "color_scheme": scheme} for size in (_DESK, _PHONE) for scheme in ("light", "dark")],
    indirect=True,
)
def test_both_colours_can_be_read_and_nothing_is_wider_than_a_phone(
    opened: Watched, request: pytest.FixtureRequest
) -> None:
    page = opened.page
    _ask(page, "unbreakable" * 20)
    _complete(page)
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, ground[4:-1].split(","))) > 3 * 128
    assert light is (request.node.callspec.params["opened"]["color_scheme"] == "light")
    for name in ("chat", "embeddings", "machine"):
        if page.locator(f"#tab-{name}").is_visible():
            page.locator(f"#tab-{name}").click()
        if name == "embeddings":
            page.locator("#embeddings button.main").click()
            expect(page.locator("table.cosines")).to_be_visible()
        if name == "machine":
            expect(page.locator("#machine .lanes svg").first).to_be_visible()
        width, room = page.evaluate("() => [document.documentElement.scrollWidth, innerWidth]")
        assert width <= room, name
        if name == "chat":
            log = page.get_by_role("log", name="Conversation")
            assert log.evaluate("node => node.scrollWidth <= node.clientWidth")
        contrasts = page.evaluate(_CONTRASTS)
        assert contrasts
        assert {element: contrast for element, contrast in contrasts.items() if contrast < 4.5} == {}


def test_the_page_asks_for_a_key_and_keeps_it_in_the_tab(chromium: Browser, folder: Path) -> None:
    with listening(_settings(folder, keys=(_KEY.encode(),))) as (address, _):
        context = chromium.new_context(viewport=_DESK)
        watched = Watched(context.new_page())
        page = watched.page
        page.goto(address)
        expect(page.locator("#key")).to_be_focused()
        expect(page.locator("#notice")).to_contain_text("The API key is missing or wrong.")
        page.keyboard.type("another")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_have_value("")
        expect(page.locator("#notice")).to_contain_text("The API key is missing or wrong.")
        page.locator("#key").fill(_KEY)
        page.keyboard.press("Enter")
        expect(page.locator("#chat-model option")).to_have_count(2)
        expect(page.locator("#machine .memory svg")).to_be_visible()
        expect(page.locator("#notice")).to_be_empty()
        _ask(page, "What is the capital of France?")
        _complete(page)
        # One for each call without the right key; the machine was not asked before.
        assert len(watched.complaints) == 2
        assert all("401" in one for one in watched.complaints)
        page.reload()
        expect(page.locator("#chat-model option")).to_have_count(2)
        assert page.evaluate("() => [localStorage.length, document.cookie, Object.values(sessionStorage)]") == [
            0,
            "",
            [_KEY],
        ]
        other = context.new_page()
        other.goto(address)
        expect(other.locator("#key")).to_be_focused()
        context.close()
