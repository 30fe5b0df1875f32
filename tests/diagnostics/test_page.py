"""The page in a real headless Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.diagnostics.run_directories import WrittenRun, diagnosis
from tests.diagnostics.test_dashboard import served
from tests.launches import wait_for
from trainrt.config import MeshSize

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium with its chromedriver on this machine")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,1600"
)
LEFT, RIGHT, DOWN, ENTER, ESCAPE, TAB = "\ue012", "\ue014", "\ue015", "\ue007", "\ue00c", "\ue004"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


@contextmanager
def opened(browser: Any, run: WrittenRun, *, live: bool = True) -> Iterator[str]:
    """The page of a run; at its end nothing was complained of and nothing was asked of others."""
    if live:
        run.run_dir.lock()
    try:
        with served(run.run_dir.path) as url:
            browser.get(url)
            wait_for(lambda: "live" in text(browser, "link"), "the first change")
            yield url
            names = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
            assert names and all(name.startswith(url) for name in names)
            said = [entry for entry in browser.get_log("browser") if not of_the_test(entry, url)]
            assert said == [], "no errors, and nothing that the policy forbids"
            browser.get("about:blank")
    finally:
        run.run_dir.unlock()


def of_the_test(entry: dict[str, Any], url: str) -> bool:
    """The page of the test before may yet complain that its server is gone, and reading pixels back is slow."""
    return "getImageData" in entry["message"] or (entry["source"] == "network" and url not in entry["message"])


def text(browser: Any, identifier: str) -> str:
    return str(browser.find_element("id", identifier).text)


def press(browser: Any, keys: str) -> None:
    browser.switch_to.active_element.send_keys(keys)


def pixels_of(browser: Any, variable: str) -> int:
    """How many pixels of the heat map have a color of the style sheet."""
    return int(browser.execute_script("""
        const hex = getComputedStyle(document.documentElement).getPropertyValue(arguments[0]).trim();
        const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
        const canvas = document.querySelector("#heat canvas");
        const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        let count = 0;
        for (let i = 0; i < data.length; i += 4) count += data[i] === r && data[i + 1] === g && data[i + 2] === b;
        return count;
    """, variable))  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> WrittenRun:
    made = WrittenRun(tmp_path / "run")
    made.steps(25)
    made.incident()
    made.diagnose()
    return made


def test_the_verdict_comes_first_in_a_sentence_and_its_evidence_leads_to_ranks_and_steps(
    browser: Any, run: WrittenRun
) -> None:
    with opened(browser, run):
        wait_for(lambda: "computes 1.6 times" in text(browser, "verdict-list"), "the verdict")
        first = browser.find_element("css selector", "main section")
        assert first.get_attribute("id") == "verdicts" and first.location["y"] < 100
        said = text(browser, "verdicts")
        assert "Rank 5 on n2 computes 1.6 times as long as its peers" in said and "Evict rank 5 on n2." in said
        for fact in (
            "slow worker",
            "94 % sure",
            "costs 62.0 ms a step",
            "34 % of the step",
            "1.9 device-hours",
            "since step 5",
        ):
            assert fact in said
        assert "A step takes 183 ms; without what holds it up it would take 121 ms (1.51" in text(browser, "headline")
        browser.find_element("css selector", ".evidence a[href='#rank=5']").click()
        wait_for(lambda: "Rank 5 on n2 (pp 1, fsdp 0, tp 1, ep 1)" in text(browser, "heat-detail"), "the rank")
        browser.execute_script("document.querySelector(\".facts a[href='#step=5']\").click()")
        wait_for(lambda: browser.find_element("id", "step").get_property("value") == "5", "the step")
        assert browser.current_url.endswith("#step=5") or "step=5" in browser.current_url


def test_selecting_a_rank_lights_its_peers_by_keys_alone(browser: Any, run: WrittenRun) -> None:
    with opened(browser, run):
        wait_for(lambda: browser.find_element("id", "heat").get_attribute("data-redraw-ms"), "the map")
        assert pixels_of(browser, "--axis-tp") == 0
        browser.find_element("id", "metric").send_keys(TAB)
        for _ in range(5):  # past the links to the largest
            if browser.switch_to.active_element.get_attribute("id") == "heat":
                break
            press(browser, TAB)
        outline = browser.switch_to.active_element.value_of_css_property("outline-style")
        assert browser.switch_to.active_element.get_attribute("id") == "heat" and outline == "solid"
        press(browser, RIGHT)
        press(browser, RIGHT)
        assert "Rank 1 on n0" in text(browser, "heat-detail")
        press(browser, DOWN + DOWN)
        assert "Rank 5 on n2" in text(browser, "heat-detail") and "1.5" in text(browser, "heat-detail")
        assert text(browser, "peers").split("\n") == ["tp: rank 4", "pp: rank 1", "ep: rank 4", "fsdp: rank 7"]
        assert all(pixels_of(browser, f"--axis-{axis}") > 100 for axis in ("tp", "pp", "fsdp"))
        press(browser, ENTER)
        assert browser.switch_to.active_element.get_attribute("id") == "timeline"
        assert "Rank 5 on n2: step" in text(browser, "event-detail")
        before = browser.find_element("id", "timeline").get_attribute("aria-label")
        press(browser, "+")
        assert browser.find_element("id", "timeline").get_attribute("aria-label") != before
        assert int(browser.find_element("id", "timeline").get_attribute("data-arrows")) > 3
        press(browser, ESCAPE)
        assert text(browser, "heat-detail") == "No rank is selected." and pixels_of(browser, "--axis-tp") == 0


def test_the_sections_tell_the_run_and_follow_it(browser: Any, run: WrittenRun) -> None:
    with opened(browser, run) as url:
        wait_for(lambda: "GiB" in text(browser, "memory"), "the last section")
        assert "Running. Step 25 of 4000, 8 ranks." in text(browser, "sentence") and "Degraded" in text(
            browser, "protection"
        )
        assert "31 %" in text(browser, "numbers")
        for chart in ("loss-chart", "rate-chart", "accounting-chart"):
            assert browser.find_elements("css selector", f"#{chart} canvas")
        legend = text(browser, "accounting-chart")
        assert all(part in legend for part in ("compute", "communication tp", "waiting", "data", "snapshot"))
        assert "worker exit" in text(browser, "incidents") and "SIGKILL" in text(browser, "incidents")
        phases = browser.find_element("css selector", ".phases").get_attribute("aria-label")
        assert phases == "restart 800 ms, restore 300 ms, first step 400 ms"
        assert "pp 2 x fsdp 2 x tp 2 x ep 2" in text(browser, "plan").replace(
            "\u00d7", "x"
        ) and "tp: 4 groups of 2 ranks" in text(browser, "topology")
        assert "every step" in text(browser, "snapshots") and "1 from memory" in text(browser, "snapshots")
        assert "Tried 5 strategies" in text(browser, "mixtures-note") and "8 calls, measured" in text(
            browser, "mixtures"
        )
        assert browser.find_element("id", "trace").get_property("href") == f"{url}/api/perfetto?step=25"
        paint = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')[0].startTime")
        print(f"\nfirst paint {paint:.0f} ms")

        run.steps(2)
        run.incident()
        run.diagnose(diagnosis("healthy", first_step=7, last_step=27))
        wait_for(lambda: "Step 27 of 4000" in text(browser, "sentence"), "the steps that were appended")
        wait_for(lambda: "Healthy: no rank, host, link or stage" in text(browser, "headline"), "the new diagnosis")
        wait_for(lambda: text(browser, "incidents").count("SIGKILL") == 2, "the second incident")
        wait_for(lambda: browser.find_element("id", "step").get_property("value") == "27", "the newest timeline")
        assert "to step 27" in text(browser, "heat-note") and text(browser, "verdict-list") == ""


def test_states_in_plain_words_on_a_dead_run(browser: Any, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run")
    run.steps(3)
    with opened(browser, run, live=False):
        wait_for(lambda: "Unknown: there is not enough data" in text(browser, "headline"), "the state")
        wait_for(lambda: "The driver is gone" in text(browser, "sentence"), "the sentence")
        assert text(browser, "link") == "not live"
        run.diagnose(diagnosis("hung", step_seconds=None, slowdown=None))
        wait_for(lambda: "Hung: no step ends" in text(browser, "headline"), "the hang")
        run.status("finished")
        wait_for(lambda: "Finished." in text(browser, "sentence"), "the end")


def test_dark_and_light(browser: Any, run: WrittenRun) -> None:
    with opened(browser, run):
        wait_for(lambda: browser.find_element("id", "heat").get_attribute("data-redraw-ms"), "the map")
        grounds = []
        for theme in ("dark", "light"):
            feature = {"name": "prefers-color-scheme", "value": theme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            wait_for(lambda: pixels_of(browser, "--heat-mid") > 500, f"the map in {theme}")
            grounds.append(browser.find_element("tag name", "body").value_of_css_property("background-color"))
        assert grounds == ["rgba(18, 21, 24, 1)", "rgba(246, 246, 244, 1)"]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_16384_ranks(browser: Any, tmp_path: Path) -> None:
    run = WrittenRun(tmp_path / "run", size=MeshSize(pp=8, tp=8, dp=256), host_ranks=8)
    run.steps(3)
    run.step(events=range(128))
    with opened(browser, run):
        wait_for(lambda: browser.find_element("id", "heat").get_attribute("data-redraw-ms"), "the map")
        milliseconds = browser.execute_script("""
            const canvas = document.querySelector("#heat canvas"), metric = document.getElementById("metric"), found = [];
            for (const name of ["memory_bytes", "waiting_seconds", "data_seconds", "ratio"]) {
                const began = performance.now();
                metric.value = name;
                metric.dispatchEvent(new Event("change"));
                canvas.getContext("2d").getImageData(0, 0, 1, 1);
                found.push(performance.now() - began);
            }
            return found;
        """)
        print(f"\nredraw of 16,384 cells: {', '.join(f'{one:.1f}' for one in milliseconds)} ms")
        assert "rank 5 on n0 1.5" in text(browser, "heat-top")
        browser.find_element("css selector", "#heat-top a").click()
        wait_for(lambda: "dp: 255 ranks, 13, 21" in text(browser, "peers"), "the peers")
        assert pixels_of(browser, "--axis-dp") > 255
        wait_for(lambda: "groups of rank 5" in text(browser, "timeline-note"), "the timeline of its groups")
