"""The page as people use it: headless Chromium against the app on loopback, over the embedded engine and a tiny
model with two adapters, and over answers that are made up."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest

from lmray.data.tokenise import prompt_ids
from lmray.engines.base import Request
from lmray.errors import CapacityError
from lmray.serve.gateway import GatewaySettings, make_app
from lmray.testing.listening import listening
from lmray.testing.tiny import tiny_adapter_folder, tiny_model_folder, tiny_tokenizer
from tests.unit.serve.fakes import FakeBackend
from tests.unit.serve.servers import MAX_LENGTH, EngineBackend
from tests.unit.serve.test_envelope import KEYS

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives a browser")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TIMEOUT_MS = 120_000
HELD_TOKENS = 8
"""Enough bytes for a character."""
ADAPTERS = ("helper", "関数")
HOSTILE = (
    '<img src="//elsewhere.example/x" onerror="document.title=1"><script>document.title=2</script>**太字** & 🙂 مرحبا'
)


class LocalEngine(EngineBackend):
    """A request whose prompt holds `HOLD` stops after `HELD_TOKENS`, until it is cancelled."""

    HOLD = "待って"

    def __init__(self, folder, adapters):
        super().__init__(folder, adapters)
        self.cancelled = threading.Event()

    async def stream(self, request: Request):
        held = self.HOLD in str(tiny_tokenizer().decode(list(request.prompt_ids)))
        try:
            async with aclosing(self.engine.submit(request)) as events:
                place = 0
                async for event in events:
                    yield event
                    place += 1
                    if held and place == HELD_TOKENS:
                        await asyncio.Event().wait()
        finally:
            if held:
                self.cancelled.set()

    async def stats(self) -> list[dict]:
        return [self.engine.stats()]


@pytest.fixture(scope="module")
def browser() -> Iterator:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium has not for root
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=sandbox)
        yield browser
        browser.close()


@contextmanager
def visiting(browser, url: str, *, errors: tuple[str, ...] = (), **context) -> Iterator:
    """The page at `url`. Afterwards: nothing else was asked for anything, and the console holds `errors` alone."""
    seen, hosts = [], set()
    with browser.new_context(**context) as place:
        place.set_default_timeout(TIMEOUT_MS)
        playwright.expect.set_options(timeout=TIMEOUT_MS)
        page = place.new_page()
        page.on("console", lambda message: seen.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.goto(url)
        yield page
    assert hosts == {urlsplit(url).netloc}
    assert [text for text in seen if not any(error in text for error in errors)] == []


@contextmanager
def endpoint(backend, **settings) -> Iterator[str]:
    app = make_app(backend, tiny_tokenizer(), GatewaySettings("tiny", MAX_LENGTH, **settings))
    with listening(app, path="/") as url:
        yield url


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[LocalEngine]:
    root = tmp_path_factory.mktemp("page")
    folder = tiny_model_folder(root / "tiny")
    adapters = {name: tiny_adapter_folder(folder, root / f"a{seed}", seed=seed) for seed, name in enumerate(ADAPTERS)}
    backend = LocalEngine(folder, adapters)
    yield backend
    with ThreadPoolExecutor(1) as pool:  # the browser's driver has a running loop on this thread
        pool.submit(asyncio.run, backend.engine.close()).result()


@pytest.fixture(scope="module")
def url(engine) -> Iterator[str]:
    with endpoint(engine) as url:
        yield url


@pytest.fixture
def made_up():
    """A backend that says a text."""

    def backend(text: str, **told) -> FakeBackend:
        return FakeBackend(tiny_tokenizer()(text, add_special_tokens=False)["input_ids"], **told)

    return backend


def say(page, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def done(page) -> None:
    playwright.expect(page.get_by_role("button", name="Send")).to_be_visible()


def greedy(url: str, model: str, *contents: str) -> str:
    """What the endpoint answers to a conversation, where the page's settings are `temperature` 0 and 24 tokens."""
    roles = ("user", "assistant")
    messages = [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 24}
    return httpx.post(f"{url}v1/chat/completions", json=body, timeout=60).json()["choices"][0]["message"]["content"]


def shown(page, column: int = 0) -> list[str]:
    """The texts of a column as they stand in the page."""
    return page.locator(".column").nth(column).locator(".text").evaluate_all("all => all.map(one => one.textContent)")


def settle(page) -> None:
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("24")


def test_a_conversation_with_a_model_and_then_an_adapter(browser, url):
    with visiting(browser, url) as page:
        settle(page)
        options = page.get_by_label("Model 1").locator("option").all_text_contents()
        assert options == ["tiny", "helper", "関数", "tiny:helper", "tiny:関数"]
        say(page, "こんにちは")
        playwright.expect(page.locator(".assistant .note")).to_contain_text("24 tokens · cut off at max tokens")
        first = greedy(url, "tiny", "こんにちは")
        assert shown(page) == ["こんにちは", first]
        note = page.locator(".assistant .note").text_content()
        assert "first token" in note and "tokens/s" in note
        page.get_by_label("Model 1").select_option("関数")
        say(page, "again")
        playwright.expect(page.locator(".assistant .note")).to_have_count(2)
        done(page)
        assert shown(page)[3] == greedy(url, "関数", "こんにちは", first, "again")
        assert page.locator(".message h3").all_text_contents() == ["You", "tiny", "You", "関数"]
        page.get_by_role("button", name="New conversation").click()
        assert shown(page) == []


def test_two_adapters_side_by_side(browser, url):
    with visiting(browser, url) as page:
        settle(page)
        page.get_by_label("Two side by side").check()
        page.get_by_label("Model 1").select_option("helper")
        page.get_by_label("Model 2").select_option("関数")
        say(page, "こんにちは")
        playwright.expect(page.locator(".assistant .note")).to_have_count(2)
        done(page)
        answers = [greedy(url, name, "こんにちは") for name in ADAPTERS]
        assert [shown(page, column)[1] for column in (0, 1)] == answers
        assert answers[0] != answers[1]
        assert all("first token" in note for note in page.locator(".assistant .note").all_text_contents())
        page.get_by_label("Two side by side").uncheck()
        assert page.locator(".column").count() == 1 and shown(page) == ["こんにちは", answers[0]]
        page.get_by_label("Two side by side").check()
        assert shown(page, 1) == shown(page, 0), "the second goes on from the first one's conversation"


def test_stop_cancels_the_answer_and_the_load_is_live(browser, url, engine):
    with visiting(browser, url) as page:
        expect, waiting = playwright.expect, page.locator("#waiting")
        settle(page)
        expect(waiting).to_have_text("0")
        expect(page.locator("#replicas")).to_have_text("1")
        expect(page.locator("#adapters")).to_have_text("2")
        expect(page.locator("#blocks")).to_have_text("100%")
        say(page, f"{LocalEngine.HOLD} & write on")
        expect(waiting).to_have_text("1")
        expect(page.locator(".running .text")).not_to_have_text("")
        page.get_by_role("button", name="Stop").click()
        expect(page.locator(".assistant .note")).to_contain_text("stopped")
        assert engine.cancelled.wait(60)
        expect(waiting).to_have_text("0")
        say(page, "go on")
        page.keyboard.press("Escape")
        done(page)


def test_what_a_model_says_is_text_and_nothing_else(browser, made_up):
    with endpoint(made_up(HOSTILE)) as url, visiting(browser, url, errors=("TrustedHTML",)) as page:
        say(page, HOSTILE)
        playwright.expect(page.locator(".assistant .note")).to_be_visible()
        assert shown(page) == [HOSTILE, HOSTILE]
        assert page.locator(".log img, .log script").count() == 0
        assert page.title() == "lmray"
        refused = "() => { try { document.body.innerHTML = '<b>x</b>' } catch (error) { return error.name } }"
        assert page.evaluate(refused) == "TypeError"
        assert page.locator("#message").count() == 1


def test_keys_that_write_and_keys_that_send(browser, made_up):
    backend = made_up("ok")
    with endpoint(backend) as url, visiting(browser, url) as page:
        message = page.get_by_label("Message")
        message.press_sequentially("一")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("二")
        assert message.input_value() == "一\n二"
        composing = "one => one.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true}))"
        message.evaluate(composing)  # an input method's Enter takes a word
        assert message.input_value() == "一\n二" and not backend.requests
        page.get_by_label("System prompt").fill("親切に")
        message.press("Enter")
        playwright.expect(page.locator(".assistant .text")).to_have_text("ok")
        asked = [{"role": "system", "content": "親切に"}, {"role": "user", "content": "一\n二"}]
        assert list(backend.requests[0].prompt_ids) == list(prompt_ids(tiny_tokenizer(), asked))


def test_errors_are_shown_as_they_are_and_the_question_is_not_remembered(browser, made_up):
    backend = made_up("ok", error=CapacityError("endpoint", "too many <b>requests</b> are waiting"))
    with endpoint(backend) as url, visiting(browser, url, errors=("429", "503")) as page:
        say(page, "one")
        playwright.expect(page.locator(".assistant .error")).to_contain_text("too many <b>requests</b> are waiting")
        playwright.expect(page.locator(".assistant .error")).to_contain_text("HTTP 429")
        done(page)
        backend.error = None
        say(page, "two")
        playwright.expect(page.locator(".assistant .text").nth(1)).to_have_text("ok")
        assert list(backend.requests[-1].prompt_ids) == list(
            prompt_ids(tiny_tokenizer(), [{"role": "user", "content": "two"}])
        )
        backend.error, backend.fails_after = CapacityError("endpoint", "broke off"), 1
        say(page, "three")
        playwright.expect(page.locator(".assistant").nth(2).locator(".error")).to_contain_text("broke off")
        assert shown(page)[-1] == "o"


def test_a_key_is_asked_for_where_the_endpoint_has_keys(browser, made_up):
    with endpoint(made_up("ok"), keys=KEYS) as url, visiting(browser, url, errors=("401", "403")) as page:
        expect, field = playwright.expect, page.get_by_label("API key")
        for key in ("wrong", "few"):
            field.fill(key)
            page.get_by_role("button", name="Use this key").click()
            expect(page.get_by_role("alert")).to_be_visible(visible=key == "wrong")
        expect(field).to_be_hidden()
        assert page.get_by_label("Model 1").locator("option").all_text_contents() == ["helper", "tiny:helper"]
        say(page, "hi")
        expect(page.locator(".assistant .text")).to_have_text("ok")
        assert "few" not in page.url and page.evaluate("localStorage.length") == 0
        expect(page.locator("#load")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_narrow_and_wide_screens(browser, made_up, scheme, width):
    text = "長い" * 40 + "x" * 150
    size = {"width": width, "height": 720}
    with endpoint(made_up(text)) as url, visiting(browser, url, viewport=size, color_scheme=scheme) as page:
        page.get_by_label("Two side by side").check()
        say(page, text)
        playwright.expect(page.locator(".assistant .note")).to_have_count(2)
        inside = (
            "document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight"
        )
        assert page.evaluate(inside)
        assert page.get_by_role("button", name="Send").bounding_box()["y"] < 720
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(int(one) for one in ground[4:-1].split(",")) < 200) == (scheme == "dark")
