"""The page of `sfmodel serve` in Chromium, without a screen. Skipped where there is none."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from sfmodel.serve import connection
from sfmodel.serve.server import Limits
from tests.clips import read_video
from tests.live_server import Live, serving, until

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")

RED, BLUE = "a large bright red ball moves up", "a large bright blue ball moves down"
DESK, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serving(tmp_path_factory.mktemp("page"), Limits(sessions=16)) as found:
        yield found


@contextlib.contextmanager
def opened(browser: Any, live: Live, **options: Any) -> Iterator[Any]:
    """A page that is ready, and says no error by its end."""
    errors: list[str] = []
    with contextlib.closing(browser.new_context(**{"viewport": DESK, **options})) as context:
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        page.goto(f"http://{live.address}/")
        page.wait_for_selector("body[data-state=ready]")
        yield page
    assert not errors


def start(page: Any, prompt: str = RED) -> None:
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("body[data-state=running]")


def shown(page: Any) -> int:
    return int(page.get_attribute("#picture", "data-shown"))


def picture(page: Any) -> Any:
    """The canvas's mean red, green and blue."""
    return np.array(page.evaluate(
        """() => {
            const canvas = document.getElementById("picture");
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            const sums = [0, 0, 0];
            data.forEach((value, i) => { if (i % 4 < 3) sums[i % 4] += value; });
            return sums.map((sum) => sum / (data.length / 4));
        }"""
    ))  # fmt: skip


def test_frames_come_and_change_and_a_new_prompt_shows_within_two_chunks(
    browser: Any, live: Live
) -> None:
    with opened(browser, live) as page:
        start(page)
        assert until(lambda: shown(page) > 20)
        first = picture(page)
        assert first.argmax() == 0
        assert until(lambda: (picture(page) != first).any())
        page.evaluate(
            """() => {
                const picture = document.getElementById("picture"), { dataset } = picture;
                window.seen = [];
                const note = () => window.seen.push([dataset.shown, dataset.prompt]);
                new MutationObserver(note).observe(picture, { attributeFilter: ["data-prompt"] });
            }"""
        )
        latency, cache = (page.locator(f"#charts figure:nth-child({i}) output") for i in (2, 3))
        assert until(lambda: latency.inner_text() != "–")
        first = latency.inner_text()
        page.fill("#prompt", BLUE)
        asked, began = shown(page), time.monotonic()
        page.press("#prompt", "Enter")
        assert until(lambda: picture(page).argmax() == 2)
        took = time.monotonic() - began
        changed = next(
            int(count) for count, prompt in page.evaluate("window.seen") if prompt == "1"
        )
        assert changed - asked <= 24
        assert page.inner_text("#timeline").split("\n")[1::2] == [BLUE, RED]
        assert until(lambda: latency.inner_text() != first)
        assert 0 < float(latency.inner_text().removesuffix(" s")) <= took + 0.1
        assert until(lambda: cache.inner_text() == "9 of 9")
        page.fill("#prompt", "a cat")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#note:visible")
        assert "does not know 'cat'" in page.inner_text("#note")
        assert page.input_value("#prompt") == "a cat"
        page.click("#stop")
        page.wait_for_selector("body[data-state=ready]")
        assert until(lambda: not live.server.sessions, 1)


def test_pause_stops_frames_and_the_engine(browser: Any, live: Live) -> None:
    def steps() -> float:
        found = live.server.metrics.registry.get_sample_value("sfmodel_step_seconds_count")
        assert found is not None
        return found

    with opened(browser, live) as page:
        start(page)
        assert until(lambda: shown(page) > 12)
        page.click("#pause")
        page.wait_for_selector("body[data-state=paused]")
        before = shown(page), steps()
        time.sleep(1.2)
        assert (shown(page), steps()) == before
        page.click("#pause")
        assert until(lambda: shown(page) > before[0] + 24 and steps() > before[1])
        # A page that nobody looks at waits as well.
        page.evaluate(
            """() => {
                Object.defineProperty(document, "hidden", { value: true, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }"""
        )
        page.wait_for_selector("body[data-state=paused]")
        assert live.server.sessions[0].paused
        page.evaluate(
            """() => {
                Object.defineProperty(document, "hidden", { value: false, configurable: true });
                document.dispatchEvent(new Event("visibilitychange"));
            }"""
        )
        page.wait_for_selector("body[data-state=running]")


def test_nothing_is_left_of_tabs(browser: Any, live: Live) -> None:
    """Of ten, of which some are loaded anew, some closed and one is cut off."""
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(opened(browser, live)) for _ in range(10)]
        for page in pages:
            start(page)
        assert until(lambda: all(shown(page) > 2 for page in pages))
        assert len(live.server.sessions) == 10 == live.server.connected
        for page in pages[:3]:
            page.reload()
            page.wait_for_selector("body[data-state=ready]")
        assert until(lambda: len(live.server.sessions) == 7, 1)
        for page in pages[3:6]:
            page.close()
        assert until(lambda: len(live.server.sessions) == 4, 1)
        pages[6].goto("about:blank")
        assert until(lambda: len(live.server.sessions) == 3, 1)
    assert until(lambda: not live.server.sessions and not live.server.connected, 1)
    assert until(lambda: not live.server.engines[0].batch.streams, 1)


def test_save_gives_a_video_that_plays(browser: Any, live: Live, tmp_path: Path) -> None:
    with opened(browser, live) as page:
        start(page)
        assert until(lambda: shown(page) > 24)
        with page.expect_download() as download:
            page.click("#save")
        download.value.save_as(tmp_path / "clip.mp4")
        frames, fps = read_video(tmp_path / "clip.mp4")
        assert fps == 16 and len(frames) > 24 and frames[-1].float().mean((1, 2)).argmax() == 0
        page.wait_for_selector("#clips img")
        assert page.evaluate("document.querySelector('#clips img').naturalWidth") > 500


def test_a_picture_to_start_from(browser: Any, live: Live, tmp_path: Path) -> None:
    file = tmp_path / "ball.png"
    image = Image.new("RGB", (64, 64))
    image.paste((30, 220, 50), (20, 20, 44, 44))
    image.save(file)
    with opened(browser, live) as page:
        page.click("summary")
        page.set_input_files("#image", file)
        page.wait_for_selector("#noimage:visible")
        start(page, "a large bright green ball")
        assert until(lambda: shown(page) > 0)
        assert picture(page).argmax() == 1
        assert live.server.sessions[0].settings.image == file.read_bytes()
        page.click("#noimage")
        assert page.input_value("#image") == ""


def test_the_keyboard(browser: Any, live: Live) -> None:
    with opened(browser, live) as page:
        page.keyboard.press("/")
        page.keyboard.type("a small cyan ball")
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-state=running]")
        page.keyboard.type("a red ball")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowUp")
        assert page.input_value("#prompt") == "a red ball"
        page.keyboard.press("ArrowUp")
        assert page.input_value("#prompt") == "a small cyan ball"
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        assert page.input_value("#prompt") == ""
        page.keyboard.press("Escape")
        page.keyboard.press("Space")
        page.wait_for_selector("body[data-state=paused]")
        page.keyboard.press("Space")
        page.wait_for_selector("body[data-state=running]")
        seed = page.input_value("#seed")
        page.keyboard.press("n")
        assert until(lambda: page.input_value("#seed") != seed)
        assert until(lambda: shown(page) > 12)
        with page.expect_download():
            page.keyboard.press("s")
        # All that there is to press is reached by the Tab key, and is shown when it is.
        reached, focused = set(), "document.activeElement.id || document.activeElement.tagName"
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(page.evaluate(focused))
        assert {"stop", "pause", "reseed", "save", "prompt", "send", "SUMMARY", "A"} <= reached


@pytest.mark.parametrize("view", [DESK, PHONE])
@pytest.mark.parametrize("colours", ["light", "dark"])
def test_the_page_fits_and_can_be_read(browser: Any, live: Live, view: Any, colours: str) -> None:
    with opened(browser, live, viewport=view, color_scheme=colours) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        for name in ("#picture", "#stop", "#prompt", "#send"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= view["width"]
            assert box["y"] + box["height"] <= view["height"] + 300
        style = "getComputedStyle(document.body)"
        ground, ink = (
            np.array(page.evaluate(f"{style}.{name}.match(/\\d+/g).map(Number)"))
            for name in ("backgroundColor", "color")
        )
        assert (ground.mean() > 200) == (colours == "light") and abs(ground - ink).mean() > 150
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll("button, input, select, textarea")].filter(
                (each) => !each.textContent.trim() && !each.labels?.length).length"""
        )
        assert unnamed == 0


def test_a_server_that_goes_and_comes_back(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        context = browser.new_context()
        page = context.new_page()
        page.goto(f"http://{live.address}/")
        page.wait_for_selector("body[data-state=ready]")
        start(page)
        live.running.should_exit = True
    page.wait_for_selector("body[data-state=failed]")
    assert "trying again" in page.inner_text("#status") and page.is_disabled("#send")
    with serving(tmp_path, port=int(live.address.split(":")[1])):
        page.wait_for_selector("body[data-state=ready]", timeout=15_000)
        start(page)
        context.close()


def test_full(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, Limits(sessions=1)) as live, opened(browser, live) as page:
        start(page)
        with opened(browser, live) as other:
            other.fill("#prompt", BLUE)
            other.press("#prompt", "Enter")
            other.wait_for_selector("#note:visible")
            assert "the only place is taken" in other.inner_text("#note")
            assert other.get_attribute("body", "data-state") == "ready"


def test_what_is_wrong_is_said_and_can_be_mended(browser: Any, live: Live, tmp_path: Path) -> None:
    with opened(browser, live) as page:
        page.click("summary")
        page.fill("#seed", "99999999999999999999")
        page.fill("#prompt", "a red cat")
        page.press("#prompt", "Enter")
        page.wait_for_selector("#note:visible")
        assert "does not know 'cat'" in page.inner_text("#note")
        assert page.get_attribute("body", "data-state") == "ready"
        assert page.input_value("#prompt") == "a red cat" and page.input_value("#seed") == "0"
        file = tmp_path / "no.png"
        file.write_bytes(b"no picture")
        page.set_input_files("#image", file)
        page.fill("#prompt", RED)
        page.press("#prompt", "Enter")
        assert until(lambda: page.inner_text("#note") == "image: damaged, or no picture")
        page.click("#noimage")
        page.press("#prompt", "Enter")  # what was refused is still there
        page.wait_for_selector("body[data-state=running]")
        page.press("#prompt", "Enter")  # an empty box asks for nothing
        assert live.server.sessions[0].last_prompt == 0


def test_prompts_that_were_never_seen_and_clips_after_the_end(browser: Any, live: Live) -> None:
    with opened(browser, live) as page:
        start(page)
        assert until(lambda: shown(page) > 12)
        page.click("#pause")
        page.wait_for_selector("body[data-state=paused]")
        for prompt in ("a small ball", "a green ball", BLUE):
            page.fill("#prompt", prompt)
            page.press("#prompt", "Enter")
        assert until(lambda: page.inner_text("#timeline").count("soon") == 3)
        page.keyboard.press("Escape")
        page.keyboard.press("Space")
        assert until(lambda: page.locator("#timeline .lost").count() == 2)
        assert "soon" not in page.inner_text("#timeline")
        page.click("#reseed")
        assert until(lambda: "seed " in page.inner_text("#timeline"))
        before = shown(page)
        assert until(lambda: shown(page) > before + 36)
        page.keyboard.press("Space")  # and the button that was clicked is not pressed again
        page.wait_for_selector("body[data-state=paused]")
        page.click("#stop")
        page.wait_for_selector("body[data-state=ready]")
        assert page.inner_text("#charts figure:first-child output") == "–"
        with page.expect_download():
            page.click("#save")


def test_a_page_that_is_idle_waits_to_be_asked(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "TICK", 0.1)
    with serving(tmp_path, Limits(idle=0.5)) as live, opened(browser, live) as page:
        page.wait_for_selector("body[data-state=idle]")
        assert "idle" in page.inner_text("#status")
        time.sleep(0.7)
        assert not live.server.connected
        start(page)
        assert until(lambda: shown(page) > 2)


def test_a_token_that_is_another_one(browser: Any, tmp_path: Path) -> None:
    token = "a+token&of=the test#1"
    context = browser.new_context()
    with contextlib.closing(context), serving(tmp_path, token=token) as live:
        page = context.new_page()
        page.goto(f"http://{live.address}/?token={quote(token, safe='')}")
        page.wait_for_selector("body[data-state=ready]")
        assert page.url == f"http://{live.address}/"
        live.running.should_exit = True
        page.wait_for_selector("body[data-state=failed]")
        assert until(lambda: not live.server.alive)
        with serving(tmp_path, token="another token", port=int(live.address[10:])):
            assert until(lambda: "another token" in page.inner_text("#status"), 15)
