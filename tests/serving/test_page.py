"""The page in a real browser: draws, shows how it gets on, stops, takes pictures in, keeps and reuses what was made."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import pytest
from axe_playwright_python.sync_playwright import Axe
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
    page.locator("[aria-label='Remove this image']").first.click()
    ask(page, "", "write")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    page.reload()
    expect(page.locator(".turn")).to_have_count(1)  # kept
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    page.reload()
    expect(page.locator(".turn")).to_have_count(0)


def show(page: Page, path: Path, side: int = 8) -> None:
    path.write_bytes(png(side))
    page.set_input_files("#file", path)
    expect(page.locator("#attached img")).to_have_count(1)


def test_an_image_is_changed_where_it_is_painted(page: Page, tmp_path: Path) -> None:
    """Half the mask is painted by pointer; the other half stays as it was, to the pixel."""
    show(page, tmp_path / "shown.png")
    page.select_option("#mode", "edit")
    page.click("text=paint a mask")
    page.fill("#brush", "30")
    box = page.locator("#board canvas").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 2, box["y"] + 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 2, box["y"] + box["height"] - 2, steps=6)  # the left edge
    page.mouse.up()
    page.click("#painted")
    expect(page.get_by_text("change the mask")).to_be_visible()
    ask(page, "a crab", "edit", strength="0.9")
    expect(page.locator(".answer img")).to_have_count(2)
    expect(page.get_by_text("strength 0.9")).to_be_visible()
    assert page.input_value("#mode") == "auto", "nothing is left to change"
    read = """image => { const c = document.createElement('canvas'); c.width = c.height = 8;
        const p = c.getContext('2d'); p.drawImage(image, 0, 0); return [...p.getImageData(0, 0, 8, 8).data]; }"""
    before, after = (page.locator(".compare img").nth(number).evaluate(read) for number in (0, 1))
    right = [index for index in range(256) if index // 4 % 8 >= 4]
    assert [before[index] for index in right] == [after[index] for index in right]
    assert before != after
    page.fill(".answer input[type=range]", "40")
    assert page.locator(".compare").evaluate("e => e.style.getPropertyValue('--cut')") == "40%"


def test_the_mask_is_painted_and_undone_by_keyboard(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path / "shown.png")
    page.select_option("#mode", "edit")
    page.click("text=paint a mask")
    painted = """c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data
        .filter((value, index) => index % 4 == 3 && value > 127).length"""
    canvas = page.locator("#board canvas")
    assert canvas.evaluate(painted) == 0
    page.keyboard.press("Space")
    first = canvas.evaluate(painted)
    colours = """c => [...new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data
        .filter((value, index, all) => index % 4 == 0 && all[index + 3] > 127))]"""
    assert {0, 255} <= set(canvas.evaluate(colours)), "seen on an image of any colour"
    where = "document.getElementById('brush-ring').getBoundingClientRect().x"
    before = page.evaluate(where)
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(where) < before
    page.keyboard.press("Shift+ArrowUp")
    assert canvas.evaluate(painted) > first > 0
    page.keyboard.press("Control+z")
    assert canvas.evaluate(painted) == first
    page.click("#erase")
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert canvas.evaluate(painted) < first
    page.click("#wipe")
    assert canvas.evaluate(painted) == 0
    page.keyboard.press("Escape")
    expect(page.get_by_text("paint a mask")).to_be_visible()


def test_after_a_stop_everything_is_there_again_and_can_be_retried(page: Page, tmp_path: Path) -> None:
    show(page, tmp_path / "shown.png")
    page.select_option("#mode", "edit")
    page.click("text=paint a mask")
    page.keyboard.press("Space")
    page.click("#painted")
    ask(page, "a crab", "edit", strength="1", steps="1000")
    expect(page.locator("#attached img")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.")).to_be_visible()
    assert page.input_value("#prompt") == "a crab"
    expect(page.get_by_text("change the mask")).to_be_visible()
    page.fill("#steps", "2")
    page.click("text=retry")
    expect(page.locator(".answer .compare")).to_have_count(1)


def test_several_images_have_seeds_counted_up_and_large_ones_stay_exact(page: Page) -> None:
    seed = 2**62 + 1
    page.fill("#count", "3")
    ask(page, "a crab", "draw", seed=str(seed), steps="2")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    names = {page.locator(".answer a").nth(number).get_attribute("download") for number in range(3)}
    assert names == {f"transfuse-{seed + number}.png" for number in range(3)}
    expect(page.get_by_text(f"seed {seed} ·")).to_be_visible()  # whichever image was complete first
    page.click("text=use these settings")
    assert page.input_value("#seed") == str(seed)


def test_files_are_made_to_fit_or_named(page: Page, tmp_path: Path) -> None:
    PIL.Image.linear_gradient("L").resize((3000, 1500)).save(tmp_path / "large.png")
    PIL.Image.new("RGB", (20, 10), "red").save(tmp_path / "small.bmp")
    (tmp_path / "notes.txt").write_text("no image")
    page.set_input_files("#file", [tmp_path / name for name in ("large.png", "notes.txt", "small.bmp")])
    expect(page.locator("#attached img")).to_have_count(2)
    expect(page.locator("#left-out")).to_contain_text("notes.txt: expected an image that this browser can open")
    sides = [page.locator("#attached img").nth(n).evaluate("i => [i.naturalWidth, i.naturalHeight]") for n in (0, 1)]
    assert sides == [[1024, 512], [20, 10]]


def test_what_was_cleared_comes_back(page: Page) -> None:
    ask(page, "a crab", "draw", steps="2")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    page.click("#toast button")
    expect(page.locator(".turn")).to_have_count(1)


def test_one_reply_is_made_at_a_time(page: Page, server: Running) -> None:
    ask(page, "a crab", "draw", steps="2")
    expect(page.get_by_text("another")).to_have_count(1)
    ask(page, "a moon", "draw", steps="1000")
    expect(page.locator("progress")).to_be_visible()
    page.click("text=another")
    expect(page.locator("#left-out")).to_contain_text("one reply is still being made")
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator("#send")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.locator("#left-out")).to_be_hidden()
    server.wait_for(server.idle, 10)


def test_a_turn_that_is_removed_takes_no_other_with_it(page: Page) -> None:
    """While an image emerges an earlier turn is removed, and brought back after another has come."""
    ask(page, "a crab", "draw", steps="2")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    ask(page, "a moon", "draw", steps="300")
    expect(page.locator("progress")).to_be_visible()
    page.click("text=remove")
    expect(page.locator(".turn")).to_have_count(1)
    expect(page.get_by_text("copy as curl")).to_have_count(1, timeout=120_000)
    expect(page.locator(".answer img")).to_have_count(1)
    ask(page, "a boat", "draw", steps="2")
    expect(page.get_by_text("copy as curl")).to_have_count(2)
    page.evaluate("$('toast').lastChild.click()")  # on a busy machine the ten seconds in which it is shown are over
    assert page.locator(".asked p").all_text_contents() == ["a crab", "a moon", "a boat"]
    page.reload()
    expect(page.locator(".answer img")).to_have_count(3)


def test_an_image_is_stored_once(page: Page, tmp_path: Path) -> None:
    """Also where later turns send it again."""
    show(page, tmp_path / "shown.png")
    page.evaluate("document.querySelector('details').open = true")
    page.check("#thread")
    ask(page, "what is it", "write", tokens="2")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    ask(page, "and now", "write", tokens="2")
    expect(page.get_by_text("copy as curl")).to_have_count(2)
    shown = page.locator(".asked img").first.get_attribute("src")
    assert shown is not None
    assert page.evaluate("localStorage.getItem('transfuse-turns')").count(shown) == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
@pytest.mark.parametrize("mode", ["draw", "edit"])
def test_the_copied_command_gives_the_same_image(page: Page, tmp_path: Path, mode: str) -> None:
    """With all that was set: seed, steps and guidance, and of an edit strength and mask."""
    settings = {"seed": "9", "steps": "7", "guidance": "2"}
    if mode == "edit":
        show(page, tmp_path / "image.png")
        page.select_option("#mode", "edit")
        page.click("text=paint a mask")
        page.keyboard.press("Space")
        page.click("#painted")
        settings["strength"] = "0.8"
    ask(page, "it's a crab", mode, **settings)
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text; }")
    page.click("text=copy as curl")
    expect(page.get_by_text("copied")).to_be_visible()
    if mode == "edit":
        content = page.evaluate("bytes(turns[0].mask).arrayBuffer().then(all => [...new Uint8Array(all)])")
        (tmp_path / "mask.png").write_bytes(bytes(content))
    command = [*shlex.split(page.evaluate("copied")), "--silent", "--fail-with-body"]
    reply = json.loads(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout)
    (image,) = reply["data"] if mode == "edit" else reply["choices"][0]["message"]["images"]
    made = image["b64_json"] if mode == "edit" else image["image_url"]["url"].partition(",")[2]
    assert page.locator(".answer img").last.get_attribute("src") == f"data:image/png;base64,{made}"


def test_under_a_path_of_a_proxy(browser: Browser, served: Path) -> None:
    with Running(served, "--root-path", "/transfuse") as server:
        page = browser.new_page()
        urls: list[str] = []
        page.on("request", lambda request: urls.append(request.url))
        assert server.url.endswith("/transfuse")
        for path in ("/", ""):
            page.goto(server.url + path)
            expect(page.locator("#about")).to_contain_text("8 pixels")
        ask(page, "a crab", "draw", steps="2")
        expect(page.locator(".answer img")).to_have_count(1)
        page.close()
        assert all(url.startswith((server.url, "data:", "blob:")) for url in urls)


@pytest.mark.parametrize(("width", "height", "scheme"), [(320, 568, "light"), (390, 844, "dark"), (1280, 800, "light")])
def test_at_any_width_in_both_themes(page: Page, width: int, height: int, scheme: str) -> None:
    """Nothing is cut off, the conversation keeps room above open settings, and axe finds no fault."""
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    page.set_viewport_size({"width": width, "height": height})
    ask(page, "a crab", "draw", steps="2")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    page.evaluate("document.querySelector('details').open = false")
    expect(page.locator("#settings")).to_be_hidden()
    page.evaluate("follow(turns.at(-1))")
    image, room = (page.locator(name).bounding_box() for name in (".answer img", "main"))
    assert image is not None
    assert room is not None
    assert room["y"] <= image["y"] <= image["y"] + image["height"] <= room["y"] + room["height"], "it is seen whole"
    page.evaluate("document.querySelector('details').open = true")
    expect(page.locator("#settings")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("main").evaluate("e => e.clientHeight") >= height / 5
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in back[4:-1].split(",")) < 150) == (scheme == "dark")
    violations = Axe().run(page).response["violations"]
    assert not [(fault["id"], fault["nodes"][0]["html"]) for fault in violations]


def tab_to(page: Page, name: str) -> None:
    """Press Tab until what has this name has the focus."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("(document.activeElement.ariaLabel || document.activeElement.textContent).trim()") == name:
            assert page.evaluate("document.activeElement.matches(':focus-visible')")
            return
    raise AssertionError(f"Tab does not reach {name!r}")


def test_by_keyboard_alone(page: Page) -> None:
    """Draw, change a part of the image, compare, and draw with another seed."""
    assert page.evaluate("document.activeElement.id") == "prompt"
    page.keyboard.type("a crab")
    tab_to(page, "What the model does")
    page.keyboard.press("ArrowDown")
    assert page.input_value("#mode") == "draw"
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "send"
    page.keyboard.press("Enter")
    expect(page.get_by_text("copy as curl")).to_have_count(1)
    tab_to(page, "change it")
    page.keyboard.press("Enter")
    tab_to(page, "paint a mask")
    page.keyboard.press("Enter")
    expect(page.locator("#editor canvas")).to_be_focused()
    page.keyboard.press("Space")
    tab_to(page, "Done")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a moon")
    page.keyboard.press("Enter")
    expect(page.locator(".compare")).to_have_count(1)
    expect(page.get_by_text("copy as curl")).to_have_count(2)
    tab_to(page, "Show how it was before")
    page.keyboard.press("ArrowRight")
    assert page.locator(".compare").evaluate("e => e.style.getPropertyValue('--cut')") == "1%"
    tab_to(page, "another")
    page.keyboard.press("Enter")
    expect(page.get_by_text("copy as curl")).to_have_count(3)
    assert len(set(page.evaluate("turns.map(turn => turn.seed)"))) == 3
