"""A real browser on the real stack. What a page must never do fails every test at its end."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.stack_rig import Stack

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


@pytest.fixture
def open_page(browser: Browser, stack: Stack) -> Iterator[Callable[..., Page]]:
    """`page = open_page("/projects", locale="ko-KR")`: a fresh profile on the stack.

    No page may log an error, throw, ask in a dialog, break its policy or load from elsewhere; only
    with `may_lose_connection` it may log that it could not reach the gateway.
    """
    contexts: list[BrowserContext] = []
    faults: list[str] = []

    def open_(
        path: str,
        *,
        width: int = 1360,
        locale: str = "ko-KR",
        dark: bool = False,
        may_lose_connection: bool = False,
    ) -> Page:
        context = browser.new_context(
            base_url=stack.url,
            viewport={"width": width, "height": 900},
            locale=locale,
            color_scheme="dark" if dark else "light",
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)

        def hear(message: ConsoleMessage) -> None:
            is_lost = "net::ERR_" in message.text or "503" in message.text
            if message.type == "error" and not (may_lose_connection and is_lost):
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
