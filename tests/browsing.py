"""A headless Chromium for the tests of the page."""

import contextlib
import shutil

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser():
    """Opens files: `with browser(path, ...) as tab`. The end of the block fails where the page said
    something on the console, raised an error, or asked for anything but its own file."""
    executable = next(filter(None, map(shutil.which, NAMES)), None)
    if executable is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync_api.sync_playwright() as driver:
        # Chromium's sandbox does not start for root, nor in most containers; pages are our own.
        running = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield lambda path, **options: _open(running, path, **options)
        running.close()


def cpu_seconds(page):
    """What the page's own thread has computed since it was opened."""
    found = page.cdp.send("Performance.getMetrics")["metrics"]
    return next(metric["value"] for metric in found if metric["name"] == "TaskDuration")


def wait_for_rollouts(page):
    page.wait_for_selector("#rollouts:not([data-loading]) .card")


@contextlib.contextmanager
def _open(running, path, *, tab="", scheme="light", width=1400, height=1000):
    address, said = path.resolve().as_uri(), []
    context = running.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.set_default_timeout(120_000)  # on a busy machine
    page.cdp = context.new_cdp_session(page)
    page.cdp.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("request", lambda asked: said.append(asked.url) if outside(asked.url) else None)

    def outside(url):
        return not url.startswith((address, "data:", "blob:"))

    page.goto(address + (f"#{tab}" if tab else ""))
    page.wait_for_selector("html[data-ready]")
    if tab == "rollouts":
        wait_for_rollouts(page)
    yield page
    context.close()
    assert said == []
