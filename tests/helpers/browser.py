"""A headless Chromium, driven by selenium, and what a person does with a page in it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# Never waited for: a loaded machine is slow.
TIMEOUT_S = 120
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # in a container, and of our own page only
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--no-proxy-server",
    "--window-size=1280,1200",
)


def chromium() -> Iterator[Any]:
    """A driver; the test is skipped where the browser, its driver or selenium is missing, whose name it says."""
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    for name, found in (("chromium", CHROMIUM), ("chromedriver, of Debian's chromium-driver", DRIVER)):
        if found is None:
            pytest.skip(f"needs {name}")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(TIMEOUT_S)
    driver.set_script_timeout(TIMEOUT_S)
    try:
        yield driver
    finally:
        driver.quit()


class Page:
    """The page at ``url``, open in ``driver``."""

    def __init__(self, driver: Any, url: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.driver, self.keys = driver, Keys
        driver.get_log("browser")  # of the page before
        driver.get(url)
        driver.execute_script("sessionStorage.clear()")
        driver.refresh()

    def until(self, what: Any) -> Any:
        """What ``what()`` returns, once that is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, TIMEOUT_S, poll_frequency=0.02).until(lambda _: what())

    def until_ready(self) -> None:
        """Wait until the page has read what is on offer."""
        self.until(lambda: self.text("#model"))

    def one(self, selector: str) -> Any:
        """The element."""
        return self.driver.find_element("css selector", selector)

    def all(self, selector: str) -> list[Any]:
        """The elements, also those that are not shown."""
        return self.driver.find_elements("css selector", selector)

    def text(self, selector: str) -> str:
        """What the element holds, shown or not, spaces as they are."""
        return self.driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)

    def part(self, name: str, column: int = 0) -> str:
        """The selector of a part of an answer's column."""
        return f".column:nth-of-type({column + 1}) [data-part={name}]"

    def ask(self, prompt: str, max_tokens: int) -> None:
        """Type a prompt, and press Enter."""
        self.fill("#max-tokens", str(max_tokens))
        self.fill("#prompt", prompt)
        self.one("#prompt").send_keys(self.keys.ENTER)

    def fill(self, selector: str, value: str) -> None:
        """Replace what a field holds."""
        field = self.one(selector)
        field.clear()
        field.send_keys(value)

    def choose(self, selector: str, value: str) -> None:
        """Choose an option by its value."""
        from selenium.webdriver.support.ui import Select

        Select(self.one(selector)).select_by_value(value)

    def state(self, column: int = 0) -> str:
        """How the answer of a column stands."""
        return self.text(self.part("state", column))

    def until_ended(self, column: int = 0) -> str:
        """How an answer has ended; waits for it."""
        self.until(lambda: self.one(self.part("answer", column)).get_attribute("aria-busy") == "false")
        return self.state(column)

    def complaints(self) -> list[str]:
        """What the browser has logged as errors since the page was opened, answers that are no 200 apart."""
        lines = [line for line in self.driver.get_log("browser") if line["level"] == "SEVERE"]
        return [line["message"] for line in lines if "the server responded with a status of" not in line["message"]]
