"""Fixtures and helpers that all tests share. Everything here runs on the CPU and offline."""

import os
import shutil
import signal
import tempfile
from uuid import uuid4

import pytest
from helpers import TINY, run_script

# Set before torch or transformers are imported. One thread: the models are tiny and the machine may be shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Where diffusers copies a directory's own pipeline code before it runs it.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="cachetrain-test-modules-")

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cachetrain-test-cache-")  # of modeling/digests.py
# Of helpers.py; the processes of pytest-xdist share it.
if run := os.environ.get("PYTEST_XDIST_TESTRUNUID"):
    os.environ["CACHETRAIN_TEST_NUMBERS"] = os.path.join(tempfile.gettempdir(), f"cachetrain-test-numbers-{run}")
    os.makedirs(os.environ["CACHETRAIN_TEST_NUMBERS"], exist_ok=True)
else:
    os.environ["CACHETRAIN_TEST_NUMBERS"] = tempfile.mkdtemp(prefix="cachetrain-test-numbers-")

# Ray reads its token once, and would leave one in the home directory.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid4().hex * 2)

# A shell starts a background job with SIGINT ignored, nohup one with SIGHUP ignored; all processes started from here
# would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# They take longest, so they start first, and no process of pytest-xdist works on one of them alone at the end.
LONGEST = ("test_resume", "test_signals", "test_training", "test_end_to_end", "test_distributed", "test_nonfinite",
           "test_loop", "test_kills", "test_cache_faults", "test_waits")  # fmt: skip

CHROMIUM_ARGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                 "--disable-sync", "--no-first-run"]  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture
def ray_apart(monkeypatch):
    """Ray that a test starts neither sees others on this machine nor is seen, and leaves no files behind."""
    # Not tmp_path, in which names of sockets would be too long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield


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


@pytest.fixture(scope="session")
def model_t5(tmp_path_factory):
    """The tiny T5 flavour, composed: a pipeline directory with a fresh UNet, objective epsilon."""
    out = tmp_path_factory.mktemp("models") / "t5"
    parts = ["--unet", TINY / "unet", "--vae", TINY / "vae", "--t5", TINY / "t5", "--out", out]
    assert run_script("models/compose_t5_sd.py", *parts) == 0
    return out


@pytest.fixture(scope="session")
def model_sd(tmp_path_factory):
    """The tiny vanilla flavour, composed."""
    out = tmp_path_factory.mktemp("models") / "sd"
    parts = ["--unet", TINY / "unet", "--vae", TINY / "vae", "--clip", TINY / "clip", "--out", out]
    assert run_script("models/compose_sd.py", *parts) == 0
    return out


@pytest.fixture(scope="session")
def model_sdxl(tmp_path_factory):
    """A tiny SDXL pipeline of random weights."""
    from sdxl_fixtures import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="session")
def shapes_sdxl(tmp_path_factory, model_sdxl):
    """Six pictures with .img_sdxl and .txt_sdxl sidecars. Copy it before changing anything."""
    from sdxl_fixtures import cache_shapes

    return cache_shapes(tmp_path_factory.mktemp("data") / "sdxl", model_sdxl)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory, model_t5, model_sd):
    """24 drawn images with .img_sdxl, .txt_t5cache and .txt_clipl sidecars. Copy it before changing anything."""
    out = tmp_path_factory.mktemp("data") / "shapes"
    assert run_script("dataset_scripts/draw_shapes.py", "--out", out, "--num_images", 24) == 0
    size = ["--target_width", "64", "--target_height", "64", "--num_workers", "0"]
    for script, model, extra in (
        ("cache/create_img_sdxl.py", model_t5, size),
        ("cache/create_t5cache_768.py", model_t5, []),
        ("cache/create_clipl.py", model_sd, []),
    ):
        assert run_script(script, "--data_root", out, "--model", model, *extra) == 0
    return out
