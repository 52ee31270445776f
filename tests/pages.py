"""What the tests of HTML pages share: waiting for a page in a browser, without a clock."""


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
