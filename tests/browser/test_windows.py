"""A training that runs: in nine windows at once, over the end of a session, and in its charts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Page, expect

from detflow.local.demo_data import write_dataset
from tests.browser.conftest import audit, sign_in
from tests.stack_rig import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NUM_WINDOWS = 9
LIVE_MS = 120_000


@pytest.fixture(scope="module")
def training(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Path of the page of a training that goes on until the last of these tests has ended."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    write_dataset(folder, 40)
    assert stack.detflow("datasets", "import", str(folder), "--name", "shapes").code == 0
    version = stack.detflow("versions", "create", "--dataset", "shapes", "--json").json["name"]
    options = ("--batch", "8", "--epochs", "10000", "--set", "image_size=64", "--detach", "--json")
    started = stack.detflow("train", version, "--model", "yolov8n", *options).json
    yield f"/p/default/train/{version.rsplit('/')[-1]}"
    stack.detflow("trainings", "stop", started["name"], "--mode", "discard")


def held_streams(page: Page) -> int:
    """How many streams the windows of this browser hold, or have for a turn."""
    names: list[str] = page.evaluate(
        "navigator.locks.query().then(all => all.held.map(one => one.name))"
    )
    return sum(name.startswith("detflow.stream.") for name in names)


def test_nine_windows_on_one_training_are_all_live(
    open_page: Callable[..., Page], training: str
) -> None:
    pages = [open_page(training)]
    for _ in range(NUM_WINDOWS - 1):
        pages.append(pages[0].context.new_page())
        pages[-1].goto(training)
    for page in pages:
        expect(page.locator(".title-bar .chip")).to_have_text("학습 진행중", timeout=LIVE_MS)
    # Each sees progress that came after it was opened, and a call of any of them gets through.
    seen = [page.locator(".card .spread .number").first.inner_text() for page in pages]
    for page, before in zip(pages, seen, strict=True):
        expect(page.locator(".card .spread .number").first).not_to_have_text(before)
        assert held_streams(page) <= 4
    pages[-1].get_by_role("button", name="이름 변경").click()
    pages[-1].get_by_label("버전명").fill("아홉")
    pages[-1].get_by_role("button", name="저장").click()
    for page in pages:
        expect(page.get_by_role("heading", name="아홉")).to_be_visible()
        expect(page.get_by_text("연결 끊김")).to_have_count(0)


def test_a_session_that_ends_loses_nothing(
    open_page: Callable[..., Page], stack: Stack, training: str
) -> None:
    page = open_page("/", cookies=None, may_log=["401"])
    expect(page.get_by_role("heading", name="로그인")).to_be_visible()
    expect(page.get_by_text("detflow open")).to_be_visible()
    audit(page)
    sign_in(page, stack)
    page.goto(training)
    expect(page.get_by_text("경과시간")).to_be_visible(timeout=LIVE_MS)
    page.get_by_role("button", name="이름 변경").click()
    page.get_by_label("버전명").fill("끝난 세션")
    assert page.evaluate("fetch('/logout', {method: 'POST'}).then(answer => answer.ok)")
    page.get_by_role("button", name="저장").click()
    expect(page.get_by_text("세션이 끝났습니다")).to_be_visible()
    assert held_streams(page) == 0
    audit(page)
    expect(page.get_by_label("버전명")).to_have_value("끝난 세션")
    other = page.context.new_page()
    sign_in(other, stack)
    other.close()
    page.keyboard.press("Escape")  # the dialog is in front of the banner
    page.get_by_role("button", name="로그인했습니다").click()
    expect(page.get_by_text("세션이 끝났습니다")).to_have_count(0)
    expect(page.get_by_text("경과시간")).to_be_visible()
    before = page.locator(".card .spread .number").first.inner_text()
    expect(page.locator(".card .spread .number").first).not_to_have_text(before)


def test_a_chart_keeps_its_zoom_over_new_values_and_a_reload(
    open_page: Callable[..., Page], training: str
) -> None:
    page = open_page(training)
    legend = page.locator(".legend .number").first
    expect(legend).to_have_text(re.compile(r"에폭 \d\d+"), timeout=LIVE_MS)
    plot = page.locator(".u-over").first
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 50, steps=4)
    page.mouse.up()
    page.mouse.move(0, 0)  # the legend shows the newest epoch again
    whole = page.get_by_role("button", name="전체 보기")
    expect(whole).to_be_visible()
    now = legend.inner_text()
    expect(legend).not_to_have_text(now)  # another epoch
    expect(whole).to_be_visible()
    page.reload()
    whole.click()
    expect(whole).to_have_count(0)
