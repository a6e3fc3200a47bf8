"""Draws the example that the page shows first, and takes the pictures of the page that its documentation shows.

    python app/take_pictures.py

Run it again when the bundled model, the page's look or its example has changed. It needs Debian's Chromium
(`apt install chromium`) and Playwright (`pip install -e ".[dev]"`), and draws on the bundled model.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import make_example
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app import build_demo, look  # type: ignore[attr-defined]  # the folder has the same name
from finelip_diffusion import FineLIPStableDiffusionPipeline

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
DESKTOP, PHONE = (1280, 800), (390, 844)  # pixels
MINUTES = 10 * 60_000  # milliseconds that drawing may take


def opened(browser: Browser, url: str, size: tuple[int, int]) -> Page:
    """The page as somebody sees it who opens it for the first time."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, reduced_motion="reduce")
    page = context.new_page()
    page.goto(f"{url}?__theme=light")
    expect(page.locator("#prompt .marks .unread")).to_be_attached(timeout=MINUTES)  # the model is loaded
    return page


def listen(page: Page) -> None:
    """Listens to the last sentence, which Stable Diffusion never reads."""
    page.get_by_role("tab", name="Listen").click()
    page.locator("#sentences button").last.click()
    expect(page.locator("#heard img")).to_be_visible()
    page.mouse.move(0, 0)


def take(browser: Browser, url: str, folder: Path) -> None:
    """Takes all pictures.

    Args:
        browser: Chromium.
        url: A page with the bundled model.
        folder: Where they go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page = opened(browser, url, DESKTOP)
    page.screenshot(path=folder / "page.png", full_page=True)
    page.locator("#compare").click()
    expect(page.locator("#shown")).to_contain_text("Drawn in", timeout=MINUTES)
    listen(page)
    page.screenshot(path=folder / "listen.png", full_page=True, clip=around(page, "#results"))
    page.goto(f"{url}?__theme=dark")  # what was drawn is there again
    expect(page.locator("#shown")).to_contain_text("The same noise")
    listen(page)
    page.screenshot(path=folder / "dark.png", full_page=True)
    page.context.close()

    page = opened(browser, url, PHONE)
    halves = [folder / "upper.png", folder / "lower.png"]
    page.screenshot(path=halves[0])
    page.locator("#results").evaluate("element => element.scrollIntoView()")
    page.screenshot(path=halves[1])
    side_by_side(halves, folder / "phone.png")
    page.context.close()
    for name in ("page", "listen", "dark", "phone"):
        with Image.open(folder / f"{name}.png") as image:
            small = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # the other ways lose rare colors
        small.save(folder / f"{name}.png", optimize=True)


def around(page: Page, selector: str, margin: int = 16) -> Any:
    """The place of an element, and some air."""
    page.evaluate("scrollTo(0, 0)")
    box = page.locator(selector).bounding_box()
    assert box is not None
    width, height = box["width"] + 2 * margin, box["height"] + 2 * margin
    return {"x": box["x"] - margin, "y": box["y"] - margin, "width": width, "height": height}


def side_by_side(paths: list[Path], target: Path) -> None:
    """Two screens of a phone as one picture."""
    screens = [Image.open(path) for path in paths]
    both = Image.new("RGB", (2 * PHONE[0] + 20, PHONE[1]), "#94a3b8")
    for number, screen in enumerate(screens):
        both.paste(screen, (number * (PHONE[0] + 20), 0))
    both.save(target)
    for path in paths:
        path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=FOLDER, help="(default: docs/pictures)")
    folder = parser.parse_args().output_dir
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("take_pictures.py: Chromium is missing; on Debian and Ubuntu: apt install chromium")
    make_example.main()
    demo = build_demo(FineLIPStableDiffusionPipeline.from_pretrained)
    _, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **look())
    try:
        with sync_playwright() as playwright:
            flags = ["--headless", "--no-sandbox", "--disable-gpu"]
            with playwright.chromium.launch(executable_path=chromium, args=flags) as browser:
                take(browser, url, folder)
    finally:
        demo.close()


if __name__ == "__main__":
    main()
