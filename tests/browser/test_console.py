"""The console as a person uses it: from an archive to a model, and what must hold on the way."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Locator, Page, expect

from detflow.local.demo_data import write_dataset
from tests.browser.conftest import audit
from tests.stack_rig import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(420)]

TRAINING_MS = 180_000
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive") / "shapes"
    write_dataset(folder, 60)
    return Path(shutil.make_archive(str(folder), "zip", folder))


def test_from_an_archive_to_a_model_and_its_errors(
    open_page: Callable[..., Page], archive: Path, stack: Stack, shots: Path
) -> None:
    page = open_page("/")
    page.get_by_role("button", name="새 프로젝트").first.click()
    page.get_by_label("프로젝트 이름").fill("도형")
    page.get_by_role("button", name="만들기").click()

    # Data.
    expect(page.get_by_role("heading", name="데이터셋", exact=True)).to_be_visible()
    page.locator("input[type=file]").set_input_files(archive)
    page.get_by_role("button", name="가져오기").click()
    page.get_by_role("link", name="버전 생성").click(timeout=60_000)

    # A version, with exact counts before it is made.
    figures = page.locator(".figure .value")
    expect(figures.first).to_have_text("42")
    page.get_by_label("이미지 좌우 반전").check()
    expect(figures.first).to_have_text("84")
    expect(page.locator(".gallery .picture")).to_have_count(5)  # 2 as they are, and 1 mirrored
    page.get_by_role("button", name="버전 생성").click()

    # The training page: ready, set up, live, done.
    start = page.get_by_role("button", name="인공지능 학습 시작")
    expect(start).to_be_enabled(timeout=60_000)
    expect(page.get_by_role("heading", name="V_0")).to_be_visible()
    expect(page.locator(".models .model")).to_have_count(18)
    audit(page)
    page.get_by_role("radio", name=re.compile("^YOLO v8 640")).check(force=True)
    page.get_by_label("배치 크기", exact=True).fill("8")
    page.get_by_label("훈련 횟수", exact=True).fill("4")
    page.get_by_text("고급 설정").click()
    page.get_by_label("image_size", exact=True).fill("64")
    start.click()
    expect(page.locator(".title-bar .chip")).to_have_text(re.compile("대기중|학습 인프라 구성중"))
    expect(page.get_by_text("계산중...")).to_be_visible(timeout=60_000)
    expect(page.locator(".title-bar .chip")).to_have_text("학습 진행중", timeout=120_000)
    page.reload()  # in the middle: everything comes back
    expect(page.get_by_text("경과시간")).to_be_visible(timeout=60_000)
    page.screenshot(path=shots / "training.png")
    page.get_by_role("button", name="추가 지표").wait_for(timeout=TRAINING_MS)
    expect(page.locator(".title-bar .chip")).to_have_text("학습 완료")
    expect(page.get_by_label("배치 크기", exact=True)).to_be_disabled()
    expect(page.locator(".plot canvas")).to_have_count(2)
    audit(page)

    # What is behind the figures.
    page.get_by_role("button", name="추가 지표").click()
    expect(page.locator("dialog .gallery .picture")).to_have_count(12)
    assert (
        page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).length") == 0
    )
    for tab, content in (
        ("Metrics 차트", ".charts .chart"),
        ("클래스별 지표", "dialog tbody tr"),
        ("오류 분석", ".bars .bar-button"),
    ):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(content).first).to_be_visible()
        audit(page)
    page.locator(".bar-button").last.click()  # to the images behind a kind of error
    expect(page.get_by_role("tab", name="검증 데이터 추론 결과")).to_have_attribute(
        "aria-selected", "true"
    )
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).to_have_count(0)

    # Model evaluation with an image of one's own.
    page.get_by_role("link", name="모델 평가").last.click()
    image = stack.data_dir / "mine.jpg"
    shutil.unpack_archive(archive, stack.data_dir / "mine")
    shutil.copy(next((stack.data_dir / "mine").rglob("*.jpg")), image)
    page.locator("input[type=file]").set_input_files(image)
    page.get_by_text(re.compile(r"모델 \d+ ms")).wait_for(timeout=60_000)
    page.screenshot(path=shots / "evaluation.png")

    # A name that is markup is shown as text; deleting asks first.
    page.get_by_role("link", name="모델 훈련").click()
    page.get_by_role("button", name="이름 변경").click()
    page.get_by_label("버전명").fill(EVIL)
    page.get_by_role("button", name="저장").click()
    expect(page.get_by_role("heading", name=EVIL)).to_be_visible()
    expect(page.locator(".versions .name")).to_have_text([EVIL])
    page.get_by_role("button", name="버전 삭제").click()
    expect(page.get_by_role("button", name="취소")).to_be_focused()
    expect(page.locator("dialog")).to_contain_text(EVIL)
    page.get_by_role("button", name="예").click()
    expect(page.get_by_text("아직 버전이 없습니다")).to_be_visible()


def tab_to(page: Page, wanted: Locator) -> None:
    """Moves the focus by the Tab key alone."""
    wanted.wait_for()
    for _ in range(120):
        if wanted.evaluate("element => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {wanted}")


def press(page: Page, name: str, role: Literal["button", "link"] = "button") -> None:
    """Uses a button or a link by the keyboard alone."""
    tab_to(page, page.get_by_role(role, name=name, exact=True).first)
    page.keyboard.press("Enter")


def test_the_keyboard_alone_leads_from_a_version_to_its_results_and_its_end(
    open_page: Callable[..., Page], archive: Path, stack: Stack
) -> None:
    assert stack.detflow("datasets", "import", str(archive), "--name", "keys").code == 0
    page = open_page("/p/default/versions/new", locale="en-US")
    tab_to(page, page.get_by_label("Dataset", exact=True))
    page.keyboard.type("keys")
    tab_to(page, page.get_by_label("Flip left-right"))
    page.keyboard.press("Space")
    press(page, "Create the version")
    start = page.get_by_role("button", name="Start training")
    expect(start).to_be_enabled()
    tab_to(page, page.get_by_role("radio", name=re.compile("^YOLO v5 Small")))
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(page.get_by_role("radio", name=re.compile("^YOLO v8 640"))).to_be_checked()
    for name, value in (("Batch size", "8"), ("Epochs", "1")):
        tab_to(page, page.get_by_label(name, exact=True))
        page.keyboard.press("ControlOrMeta+a")
        page.keyboard.type(value)
    tab_to(page, page.locator("summary", has_text="Advanced"))
    page.keyboard.press("Enter")
    tab_to(page, page.get_by_label("image_size", exact=True))
    page.keyboard.type("64")
    tab_to(page, start)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="More metrics").wait_for(timeout=TRAINING_MS)
    press(page, "More metrics")
    tab_to(page, page.get_by_role("tab", name="Inference results"))
    page.keyboard.press("ArrowRight")
    expect(page.locator("dialog .charts .chart").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="More metrics")).to_be_focused()
    press(page, "Rename")
    expect(page.get_by_label("Name of the version")).to_be_focused()
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type(EVIL)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=EVIL)).to_be_visible()
    expect(page.get_by_role("button", name="Rename")).to_be_focused()
    press(page, "Delete")
    expect(page.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name=EVIL)).to_have_count(0)


def test_a_lost_connection_is_said_and_what_happened_meanwhile_is_shown(
    open_page: Callable[..., Page], archive: Path, stack: Stack
) -> None:
    stack.detflow("datasets", "import", str(archive), "--name", "lost")
    version = stack.detflow("versions", "create", "--dataset", "lost", "--json").json
    page = open_page("/p/default/train", may_log=("net::ERR_", "503"))
    expect(page.get_by_role("heading", name=version["displayName"])).to_be_visible()
    expect(page.get_by_role("button", name="인공지능 학습 시작")).to_be_enabled()
    gateway = next(one for one in stack.processes() if "gateway" in one.cmdline())
    gateway.kill()
    expect(page.get_by_text("연결 끊김 · 재시도 중")).to_be_visible()
    assert stack.detflow("versions", "rename", version["name"], "밤").code == 0
    expect(page.get_by_text("연결 끊김 · 재시도 중")).to_have_count(0)
    expect(page.get_by_role("heading", name="밤")).to_be_visible()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "path", ["/projects", "/p/default/datasets", "/p/default/train", "/system"]
)
def test_pages_have_no_faults_for_assistive_technology(
    open_page: Callable[..., Page], path: str, dark: bool
) -> None:
    page = open_page(path, dark=dark, locale="en-US")
    page.locator("main h1, main h2").first.wait_for()
    audit(page)
    assert page.evaluate("document.documentElement.lang") == "en"


def test_narrow_screens_need_no_sideways_scrolling(open_page: Callable[..., Page]) -> None:
    for path in ("/projects", "/p/default/datasets", "/p/default/train", "/system"):
        page = open_page(path, width=420)
        page.locator("main h1, main h2").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_the_language_is_remembered(open_page: Callable[..., Page]) -> None:
    page = open_page("/system", locale="en-US")
    page.get_by_role("button", name="한국어").click()
    expect(page.get_by_role("heading", name="시스템")).to_be_visible()
    page.reload()
    expect(page.get_by_role("heading", name="시스템")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "ko")
