"""Explorer pages in a real browser, for the tests of what they show and do; opened by `open_page` of conftest."""

import importlib
import os
import shutil
import time

import pytest
import torch
from flows import make_flow

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def launched():
    """A playwright driver, not yet started, and the path of a Chromium for it."""
    if not os.environ.get("CI"):
        pytest.importorskip("playwright.sync_api", reason='install it with: pip install -e ".[dev]"')
    chromium = next((path for name in NAMES if (path := shutil.which(name))), None)
    if chromium is None:
        hint = "no Chromium found: install it, on Debian with apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(hint)
        pytest.skip(hint)
    return importlib.import_module("playwright.sync_api").sync_playwright(), chromium


class Page:
    """An explorer page that notes everything that goes wrong in it."""

    def __init__(self, browser, path, link=""):
        self.page = browser.new_page(viewport={"width": 1500, "height": 1000}, accept_downloads=True)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("request", self._request)
        self.page.goto(f"{path.as_uri()}{link}")
        # Not wait_for_function, which evaluates text in the page: its security policy forbids that.
        until = time.monotonic() + 30
        while not self("performance.getEntriesByName('lig_lens first paint').length"):
            assert time.monotonic() < until, "nothing was painted"
            self.page.wait_for_timeout(20)

    def _request(self, request):
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.wrong.append(f"request to {request.url}")

    def __call__(self, script, argument=None):
        return self.page.evaluate(script, argument)

    def set(self, **changes):
        self("changes => ligLens.set(changes)", changes)

    def state(self, key):
        return self(f"ligLens.state.{key}")

    def click_node(self, row, pos):
        # Not by the mouse: what stands outside the window could not be clicked.
        place = self("([row, pos]) => ligLens.placeOf(row, pos)", [row, pos])
        at = {"clientX": place["x"], "clientY": place["y"], "bubbles": True}
        self.page.locator("#graph").dispatch_event("click", at)

    def matrix(self, map, layer, head=None):
        values = self("([m, l, h]) => Array.from(ligLens.view.matrix(m, l, h))", [map, layer, head])
        return torch.tensor(values, dtype=torch.float64)

    def saved(self, button):
        """Name and bytes of what a button saves."""
        with self.page.expect_download() as waiting:
            self.page.click(button)
        with open(waiting.value.path(), "rb") as file:
            return waiting.value.suggested_filename, file.read()


def chained(seed=0, n_layers=3, maps=("attn", "mlp", "block")):
    return make_flow(layers=tuple(range(n_layers)), seed=seed, maps=maps)
