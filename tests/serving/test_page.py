"""The page in a real browser: draws, shows how it gets on, stops, takes pictures in, keeps and reuses what was made."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from running import Running, png

from transfuse.images import read_settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
expect.set_options(timeout=30_000)  # milliseconds, for a machine with other work
pytestmark = [
    pytest.mark.xdist_group("serving"),
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Browser, server: Running) -> Iterator[Page]:
    """Open the page; fail if it logs an error or requests anything from another site."""
    page = browser.new_page(viewport={"width": 900, "height": 900})
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    known = (server.url, "data:")
    page.on("request", lambda request: None if request.url.startswith(known) else wrong.append(request.url))
    page.goto(server.url)
    expect(page.locator("#about")).to_contain_text("8 pixels")
    yield page
    page.close()
    assert not [line for line in wrong if "status of 400" not in line]  # of a mistake, the browser says so by itself


def ask(page: Page, text: str, mode: str, **settings: str) -> None:
    page.evaluate("document.querySelector('details').open = true")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.select_option("#mode", mode)
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def test_draw_download_and_reuse(page: Page, tmp_path: Path) -> None:
    ask(page, "a crab", "draw", seed="7", steps="300")
    expect(page.locator("progress")).to_be_visible()
    seen = {page.locator("progress").evaluate("e => e.value") for _ in range(3) if page.wait_for_timeout(100) is None}
    assert len(seen) > 1  # it emerges
    expect(page.locator(".answer img")).to_have_count(1)
    expect(page.get_by_text("seed 7 · 300 steps")).to_be_visible()
    with page.expect_download() as download:
        page.click("text=download")
    download.value.save_as(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png")["seed"] == 7
    assert read_settings(tmp_path / "a.png")["prompt"] == "a crab"
    page.fill("#seed", "")
    page.fill("#prompt", "")
    page.click("text=use these settings")
    assert page.input_value("#seed") == "7"
    assert page.input_value("#prompt") == "a crab"
    first = page.locator(".answer img").first.get_attribute("src")
    page.press("#prompt", "Enter")
    expect(page.locator(".answer img")).to_have_count(2)
    expect(page.get_by_text("copy as curl")).to_have_count(2)
    assert page.locator(".answer img").nth(1).get_attribute("src") == first


def test_escape_stops(page: Page, server: Running) -> None:
    ask(page, "a crab", "draw", steps="1000")
    expect(page.locator("progress")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.locator("#send")).to_have_text("Send")
    server.wait_for(server.idle, 10)


def test_mistakes_are_shown(page: Page) -> None:
    ask(page, "x" * 20_000, "write")
    expect(page.get_by_role("alert")).to_contain_text("expected at most 256 positions")


def test_pictures_are_taken_and_kept(page: Page, tmp_path: Path) -> None:
    picture = tmp_path / "shown.png"
    picture.write_bytes(png(30))
    page.set_input_files("#file", picture)
    expect(page.locator("#attached img")).to_have_count(1)
    paste = """url => fetch(url).then(r => r.blob()).then(b => { const d = new DataTransfer();
        d.items.add(new File([b], 'p.png', {type: 'image/png'}));
        document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: d, bubbles: true})); })"""
    page.evaluate(
        paste.replace("fetch(url).then(r => r.blob())", "Promise.resolve(bytes(url))"),
        page.locator("#attached img").get_attribute("src"),
    )
    expect(page.locator("#attached img")).to_have_count(2)
    page.locator("[aria-label='Remove this picture']").first.click()
    ask(page, "", "write")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)  # kept
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


def test_a_picture_is_changed_where_it_is_painted(page: Page, tmp_path: Path) -> None:
    picture = tmp_path / "shown.png"
    picture.write_bytes(png(8))
    page.set_input_files("#file", picture)
    page.select_option("#mode", "edit")
    box = page.locator("#attached canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 4, box["y"] + 4)
    page.mouse.down()
    for step in range(10):
        page.mouse.move(box["x"] + 4, box["y"] + 4 + 9 * step)  # the left edge
    page.mouse.up()
    ask(page, "a crab", "edit", strength="0.9")
    expect(page.locator(".answer img")).to_have_count(1)
    expect(page.get_by_text("strength 0.9")).to_be_visible()
    read = """image => { const c = document.createElement('canvas'); c.width = c.height = 8;
        const p = c.getContext('2d'); p.drawImage(image, 0, 0); return [...p.getImageData(0, 0, 8, 8).data]; }"""
    before = page.locator(".asked img").evaluate(read)
    after = page.locator(".answer img").evaluate(read)
    right = [index for index in range(256) if index // 4 % 8 >= 4]
    assert [before[index] for index in right] == [after[index] for index in right]
    assert before != after


def test_narrow_dark_and_by_keyboard(page: Page) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 340, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(int(part) for part in back[4:-1].split(",")) < 150
    page.focus("#prompt")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    assert page.evaluate("document.activeElement.matches(':focus-visible')")
