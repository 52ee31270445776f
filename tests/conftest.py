"""Fixtures and helpers that all tests share. Everything here runs on the CPU and offline."""

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

# Set before torch or transformers are imported. One thread: the models are tiny and the machine may be shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

REPO = Path(__file__).resolve().parent.parent
CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--no-first-run"]  # fmt: skip


def load_script(relative):
    """Imports a script by its path in the repository ("cache/create_clipl.py"); scripts are not a package."""
    path = REPO / relative
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; where there is none the tests that need it are skipped, in CI they fail."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        absent = pytest.fail if os.environ.get("CI") else pytest.skip
        absent("no chromium, chromium-browser or google-chrome in PATH")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        yield browser
        browser.close()
