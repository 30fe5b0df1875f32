"""The page in a real headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.diagnostics.run_directories import WrittenRun
from tests.diagnostics.test_dashboard import served
from tests.launches import wait_for

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with its chromedriver on this machine")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1600"
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


def text(browser: Any, identifier: str) -> str:
    return str(browser.find_element("id", identifier).text)


def test_the_page_tells_a_run_and_follows_it(browser: Any, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    for _ in range(25):
        run.step()
    run.incident()
    run.run_dir.lock()
    try:
        with served(run.run_dir.path) as url:
            browser.get(url)
            wait_for(lambda: "Running." in text(browser, "sentence"), "the state")
            assert "Step 25 of 40, 4 ranks" in text(browser, "sentence")
            assert "Degraded" in text(browser, "protection")
            assert "3.7500" in text(browser, "numbers") and "31.0 %" in text(browser, "numbers")
            cells = browser.find_elements("css selector", "#heat .cell")
            assert [cell.text.splitlines()[0] for cell in cells] == ["rank 0", "rank 1", "rank 2", "rank 3"]
            assert cells[3].text.splitlines()[1].startswith("1.60x")
            assert "1.60 x the median" in cells[3].get_attribute("aria-label")
            assert "worker_exit" in text(browser, "incidents") and "SIGKILL" in text(browser, "incidents")
            assert len(browser.find_elements("css selector", "#timeline canvas")) == 4
            assert browser.find_elements("css selector", "#loss-chart canvas")
            assert "fsdp 4 x ep 2" in text(browser, "plan")
            assert "r 1, degree 4" in text(browser, "mixtures") and "8 calls, measured" in text(browser, "mixtures")
            assert "Tried 5 strategies" in text(browser, "mixtures-note")

            cells[0].click()
            browser.switch_to.active_element.send_keys("\ue014")  # the right arrow
            assert "rank 1 on n0" in text(browser, "heat-detail")

            run.step()
            run.step()
            wait_for(lambda: "Step 27 of 40" in text(browser, "sentence"), "the steps that were appended")
            assert "3.6500" in text(browser, "numbers")
            names = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
            assert names and all(name.startswith(url) for name in names)
            assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    finally:
        run.run_dir.unlock()


def test_a_dead_run_says_so(browser: Any, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.step()
    with served(run.run_dir.path) as url:
        browser.get(url)
        wait_for(lambda: "The driver is gone" in text(browser, "sentence"), "the sentence")
        run.status("finished")
        wait_for(lambda: "Finished." in text(browser, "sentence"), "the end")
