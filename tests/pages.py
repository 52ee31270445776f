"""What the tests of HTML pages share: a page that must raise no error, and waiting for it without a clock."""

from contextlib import contextmanager

from helpers import HANG_S


@contextmanager
def opened_page(browser, url, wait_for, state="visible", silent=False, **options):
    """Opens a page and yields (page, addresses that it has asked for); it must raise no error.

    Args:
        wait_for: selector of what is there once it has loaded, in this state.
        silent: nothing may be written to the console either.
        options: of the browser's page.
    """
    page = browser.new_page(**options)
    page.set_default_timeout(1000 * HANG_S)
    requests, errors = [], []
    page.on("request", lambda sent: requests.append(sent.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    if silent:
        page.on("console", lambda message: errors.append(message.text))
    try:
        page.goto(url)
        page.wait_for_selector(wait_for, state=state)
        yield page, requests
    finally:
        page.close()
    assert errors == []


def until(page, condition):
    """Waits until a JavaScript expression is true.

    Playwright's `wait_for_function` evaluates it again by eval(), which the Content-Security-Policy of the pages
    forbids: it fails wherever the expression is not true at once.
    """
    ask = f"const ask = () => {condition} ? done() : requestAnimationFrame(ask);"
    page.evaluate(f"() => new Promise(done => {{ {ask} ask(); }})")


def drawn(page):
    """Waits until the page has drawn all changes so far."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
