"""`python -m docs.serve_page`: writes into docs/serve.md what was measured and the example of a
client, and draws docs/serve.png, the page of `sfmodel serve` at work, in light and in dark, which
needs Chromium and the extra `dev`."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from bench import serve
from docs import readme
from sfmodel.machine import describe

PAGE = Path(__file__).parent / "serve.md"
FILE = Path(__file__).parent / "serve.png"
PROMPTS = (
    "a large bright red ball moves up slowly",
    "a large bright cyan ball moves right",
    "a small bright yellow ball moves down fast",
)


def shown(page: Any, address: str, frames: int) -> Image.Image:
    """A picture of the page after so many frames under each prompt."""
    page.goto(address)
    page.wait_for_selector("body[data-state=ready]")
    for i, prompt in enumerate(PROMPTS):
        page.fill("#prompt", prompt)
        page.press("#prompt", "Enter")
        while int(page.get_attribute("#picture", "data-shown")) < frames * (i + 1):
            time.sleep(0.05)
    page.click("#save")
    page.wait_for_selector("#clips img")
    time.sleep(1)
    return Image.open(io.BytesIO(page.screenshot()))


def written(page: str) -> str:
    """The page with its parts that are made from other files."""
    name = "serve-cpu.json"
    result = json.loads((readme.ROOT / "bench/results" / name).read_text())
    shown = serve.tables(result)[0]
    table = [f"{describe(result['machine'])} (`bench/results/{name}`), the toy with a full window:"]
    table += readme.table(shown.columns, shown.rows)
    example = (readme.ROOT / "examples/serve_client.py").read_text()
    code = ["```python", example.partition('"""\n\n')[2].rstrip(), "```"]
    for part, lines in (("serve", table), ("client", code)):
        text = "\n".join(("", *lines, ""))
        found = rf"(?<=<!-- {part} -->).*?(?=<!-- end -->)"
        page = re.sub(found, lambda _, text=text: text, page, count=1, flags=re.S)  # type: ignore[misc]
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "sfmodel", "serve", "--port", "0", "--clips", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = server.stdout.readline().strip()
            with sync_playwright() as play:
                path = shutil.which("chromium")
                browser = play.chromium.launch(executable_path=path, args=["--no-sandbox"])
                view: Any = {"width": 1040, "height": 790}
                pictures = [
                    shown(browser.new_page(viewport=view, color_scheme="light"), address, 80),
                    shown(browser.new_page(viewport=view, color_scheme="dark"), address, 80),
                ]
                browser.close()
        finally:
            server.terminate()
            server.communicate()
    both = Image.new("RGB", (pictures[0].width, 2 * pictures[0].height))
    for i, picture in enumerate(pictures):
        both.paste(picture, (0, i * picture.height))
    both.quantize(128).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
