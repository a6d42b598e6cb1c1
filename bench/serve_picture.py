"""The picture of the server's page: one prompt at two depths of a model, one after the other.

python -m bench.serve_picture               smollm2-135m-paths at 30 and 20 layers, into docs/serve-page.png
python -m bench.serve_picture --out FILE    elsewhere

The milliseconds that it shows are those of this machine as it is: nothing else should run. Prints what stands below it.
Needs selenium, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import argparse
import base64
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from bench.serve.process import ServerProcess
from dynskip.measure.machine import describe

ROOT = Path(__file__).resolve().parents[1]
MODEL, LAYERS = "smollm2-135m-paths", (30, 20)
PROMPT, MAX_TOKENS = "Give me three facts about the moon.", 70
_OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server")
_WIDTH, _TIMEOUT_S = 1040, 120


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser. Raises RuntimeError where it or its driver is missing."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        raise RuntimeError("chromium: it and chromedriver must be installed. Use apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*_OPTIONS, f"--window-size={_WIDTH},1200"):
        options.add_argument(option)
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    try:
        yield opened
    finally:
        opened.quit()


def picture(driver: Any, url: str) -> bytes:
    """The page at ``url`` as a PNG, when both answers have ended. Raises RuntimeError where one has failed."""
    wait = WebDriverWait(driver, _TIMEOUT_S, poll_frequency=0.02)
    driver.get(url)
    wait.until(lambda _: driver.find_element("id", "model").text)
    for name in ("compare", "in-turn"):
        box = driver.find_element("id", name)
        if not box.is_selected():  # a page that is opened again may have kept it
            box.click()
    for column, layers in zip(driver.find_elements("css selector", ".column"), LAYERS, strict=True):
        slider = column.find_element("css selector", "[data-part=slider]")
        slider.send_keys(Keys.END)
        said = column.find_element("css selector", "[data-part=said]")
        while int(said.text.split()[0]) > layers:
            slider.send_keys(Keys.LEFT)
    tokens = driver.find_element("id", "max-tokens")
    tokens.clear()
    tokens.send_keys(str(MAX_TOKENS))
    driver.find_element("id", "prompt").send_keys(PROMPT, Keys.ENTER)
    states = driver.find_elements("css selector", "[data-part=state]")

    def has_failed() -> bool:
        return any("failed" in state.get_attribute("class") for state in states)

    wait.until(lambda _: has_failed() or all(state.text.startswith("Ended") for state in states))
    if has_failed():
        raise RuntimeError(f"picture: both answers must end, got {[state.text for state in states]}")
    wait.until(lambda _: driver.find_element("id", "resident").text == "0")
    taken = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})
    return base64.b64decode(taken["data"])


def main(argv: list[str] | None = None) -> int:
    """Start the server, take the picture, and print its conditions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "serve-page.png")
    parser.add_argument("--log", type=Path, default=ROOT / "runs" / "serve-picture.log", help="of the server")
    args = parser.parse_args(argv)
    command = [sys.executable, "-m", "dynskip", "serve", MODEL]
    with ServerProcess(MODEL, lambda port: [*command, "--port", str(port)], args.log) as server, chromium() as driver:
        server.wait_until_ready()
        picture(driver, server.url)  # warms up
        args.out.write_bytes(picture(driver, server.url))
    machine = describe()
    print(
        f"{args.out}: {MODEL}, greedy, one request at a time; {machine['cpu']} ({machine['num_cores']} cores), "
        f"{machine['num_threads']} threads, commit {machine['commit']}, {machine['date']}, load {machine['load'][0]}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
