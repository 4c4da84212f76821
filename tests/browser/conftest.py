"""A real browser on the real stack. What a page must never do fails every test at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    StorageState,
    expect,
    sync_playwright,
)

from tests.stack_rig import Stack

SECONDS = 20
"""How long a page may take to do anything, on a machine that is busy with a training."""

expect.set_options(timeout=1000 * SECONDS)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
_ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*_ARGUMENTS])
        yield browser
        browser.close()


def sign_in(page: Page, stack: Stack) -> None:
    """Signs a browser in by a link from the command line, as its owner does."""
    enter(page, stack.detflow("open", "--no-browser", "--json").json["url"])


def enter(page: Page, link: str) -> None:
    """Follows a link that signs in."""
    page.goto(link)
    page.get_by_role("button").click()
    page.wait_for_url(lambda url: "/login" not in url)


def audit(page: Page) -> None:
    """Fails on anything that axe finds."""
    found = Axe().run(page).response["violations"]
    assert not [(one["id"], [node["html"] for node in one["nodes"]]) for one in found]


@pytest.fixture(scope="module")
def owner(browser: Browser, stack: Stack) -> StorageState:
    """Cookies of a browser in which the owner is signed in."""
    with browser.new_context() as context:
        sign_in(context.new_page(), stack)
        return context.storage_state()


@pytest.fixture
def open_page(browser: Browser, stack: Stack, owner: StorageState) -> Iterator[Callable[..., Page]]:
    """`page = open_page("/projects", locale="ko-KR")`: a fresh profile on the stack.

    The owner is signed in, unless `cookies` says otherwise. No page may log an error, throw, ask in
    a dialog, break its policy or load from elsewhere; only with `may_log` it may log an error in
    which that is found, such as a status that it is to be answered with.
    """
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def open_(
        path: str,
        *,
        width: int = 1360,
        locale: str = "ko-KR",
        dark: bool = False,
        cookies: StorageState | None = owner,
        may_log: Sequence[str] = (),
    ) -> Page:
        context = browser.new_context(
            base_url=stack.url,
            storage_state=cookies,
            viewport={"width": width, "height": 900},
            locale=locale,
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * SECONDS)

        def hear(message: ConsoleMessage) -> None:
            if message.type == "error" and not any(one in message.text for one in may_log):
                faults.append(message.text)

        page.on("console", hear)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda r: (
                None
                if r.url.startswith((stack.url, "blob:", "data:"))
                else faults.append(f"asked {r.url}")
            ),
        )
        page.goto(path)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the screenshots."""
    return tmp_path_factory.mktemp("screenshots")
