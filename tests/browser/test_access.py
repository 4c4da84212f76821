"""Who may do what, as the console shows it: roles, keys, members, webhooks, and the audit log."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from detflow.local.demo_data import write_dataset
from tests.browser.conftest import audit, enter
from tests.stack_rig import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

EVIL = "<img src=x onerror=alert(1)>"
TABS = ("", "/keys", "/members", "/webhooks", "/audit")


def test_keys_members_and_webhooks_are_managed_and_written_down(
    open_page: Callable[..., Page],
) -> None:
    page = open_page("/p/default/settings")
    page.get_by_label("프로젝트 이름").fill("공장")
    page.get_by_role("button", name="저장").first.click()
    expect(page.locator(".top .project")).to_have_text("공장")
    page.get_by_label("동시에 실행할 학습 수").fill("2")
    page.get_by_role("button", name="저장").last.click()
    page.reload()
    expect(page.get_by_label("동시에 실행할 학습 수")).to_have_value("2")

    page.get_by_role("tab", name="API 키").click()
    page.get_by_label("용도").fill(EVIL)
    page.get_by_label("권한").select_option("EDITOR")
    page.get_by_role("button", name="만들기").click()
    token = page.locator("#secret").inner_text()
    assert token.startswith("dfk_")
    audit(page)
    page.get_by_role("button", name="보관했습니다").click()
    row = page.locator("tbody tr")
    expect(row).to_contain_text(f"{EVIL}편집자")
    assert token not in page.content()
    page.get_by_role("button", name=f"키 삭제: {EVIL}").click()
    expect(page.get_by_role("button", name="취소")).to_be_focused()
    page.get_by_role("button", name="예").click()
    expect(page.get_by_text("아직 API 키가 없습니다.")).to_be_visible()

    page.get_by_role("tab", name="구성원").click()
    page.get_by_label("사용자", exact=True).fill("kim@example.com")
    page.get_by_role("button", name="추가").click()
    role = page.get_by_label("kim@example.com 님의 권한")
    role.select_option("ADMIN")
    expect(page.locator("[role=status]")).to_have_text("저장했습니다")
    page.reload()
    expect(role).to_have_value("ADMIN")
    page.get_by_role("button", name="구성원 제외: kim@example.com").click()
    page.get_by_role("button", name="예").click()
    expect(page.get_by_text("아직 구성원이 없습니다")).to_be_visible()

    page.get_by_role("tab", name="웹훅").click()
    page.get_by_label("주소").fill("https://hooks.example.com/x")
    page.get_by_label("이름").fill("채팅")
    page.get_by_role("button", name="만들기").click()
    expect(page.locator("#secret")).to_contain_text("whsec_")
    page.get_by_role("button", name="보관했습니다").click()
    page.get_by_role("button", name="끄기").click()
    expect(page.get_by_role("button", name="켜기")).to_be_visible()
    page.get_by_role("button", name="비밀 키 교체").click()
    page.get_by_role("button", name="예").click()
    expect(page.locator("#secret")).to_contain_text("whsec_")
    page.get_by_role("button", name="보관했습니다").click()
    page.get_by_text("전송 기록").click()
    expect(page.get_by_text("아직 보낸 것이 없습니다.")).to_be_visible()
    page.get_by_role("button", name="웹훅 삭제: 채팅").click()
    page.get_by_role("button", name="예").click()
    expect(page.get_by_text("아직 웹훅이 없습니다.")).to_be_visible()

    page.get_by_role("tab", name="감사 기록").click()
    newest = page.locator("tbody tr").first
    expect(newest).to_contain_text("DeleteWebhook")
    expect(newest).to_contain_text("owner")
    page.get_by_label("사용자로 거르기").fill("users/nobody@example.com")
    expect(page.get_by_text("아직 변경한 기록이 없습니다.")).to_be_visible()


def test_a_viewer_sees_everything_and_is_offered_nothing_that_fails(
    open_page: Callable[..., Page], browser: Browser, stack: Stack, tmp_path: Path
) -> None:
    write_dataset(tmp_path / "shapes", 20)
    assert stack.detflow("datasets", "import", str(tmp_path / "shapes"), "--name", "s").code == 0
    assert stack.detflow("versions", "create", "--dataset", "s").code == 0
    made = stack.detflow("keys", "create", "eyes", "--role", "viewer", "--json").json
    asking = urllib.request.Request(
        f"{stack.url}/v1/loginLinks",
        b"{}",
        {"authorization": f"Bearer {made['token']}", "content-type": "application/json"},
    )
    with urllib.request.urlopen(asking) as answer:
        link = stack.url + json.load(answer)["path"]
    with browser.new_context() as context:
        enter(context.new_page(), link)
        cookies = context.storage_state()
    page = open_page("/p/default/train", cookies=cookies, may_log=["404"])
    expect(page.locator(".account summary")).to_have_text("eyes")
    start = page.get_by_role("button", name="인공지능 학습 시작")
    expect(start).to_be_disabled()
    expect(start).to_have_attribute("title", "이 프로젝트의 편집자 권한이 필요합니다")
    expect(page.get_by_role("button", name="버전 삭제")).to_have_count(0)
    expect(page.get_by_role("button", name="이름 변경")).to_have_count(0)
    expect(page.get_by_label("배치 크기", exact=True)).to_be_disabled()
    page.get_by_role("link", name="데이터").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("input[type=file]")).to_have_count(0)
    page.get_by_role("link", name="설정").click()
    expect(page.get_by_label("프로젝트 이름")).to_be_disabled()
    page.get_by_role("tab", name="API 키").click()
    expect(page.get_by_text("이 프로젝트의 관리자 권한이 필요합니다.")).to_be_visible()
    page.goto("/p/elsewhere/train")
    expect(page.get_by_text("찾을 수 없습니다")).to_be_visible()


@pytest.mark.parametrize("dark", [False, True])
def test_settings_have_no_faults_for_assistive_technology_and_fit_a_phone(
    open_page: Callable[..., Page], dark: bool
) -> None:
    page = open_page("/p/default/settings", width=420, dark=dark, locale="en-US")
    for tab in TABS:
        page.goto(f"/p/default/settings{tab}")
        page.locator("main h2, main .empty").first.wait_for()
        audit(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 420


def test_an_upload_goes_on_after_a_reload_with_the_same_file(
    open_page: Callable[..., Page], tmp_path: Path
) -> None:
    write_dataset(tmp_path / "many", 60)
    archive = Path(shutil.make_archive(str(tmp_path / "many"), "zip", tmp_path / "many"))
    page = open_page("/p/default/datasets", may_log=["net::ERR_"])
    # A slow line, cut off in the middle.
    network = page.context.new_cdp_session(page)
    network.send("Network.enable")
    slow = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": 100_000}
    network.send("Network.emulateNetworkConditions", {"offline": False, **slow})
    page.locator("input[type=file]").set_input_files(archive)
    page.get_by_role("button", name="가져오기").click()
    expect(page.get_by_text("초당")).to_be_visible()
    expect(page.get_by_text("남은시간")).to_be_visible()
    page.reload()
    expect(page.get_by_text(re.compile(r"[1-9]\d*%에서 멈췄습니다"))).to_be_visible()
    network.send(
        "Network.emulateNetworkConditions", {"offline": False, **slow, "uploadThroughput": -1}
    )
    page.locator("input[type=file]").set_input_files(archive)
    expect(page.get_by_text("이어서 올립니다")).to_be_visible()
    starts: list[str] = []
    page.on(
        "request",
        lambda one: starts.append(one.headers["upload-offset"]) if one.method == "PATCH" else None,
    )
    page.get_by_role("button", name="가져오기").click()
    page.get_by_role("link", name="버전 생성").click()
    expect(page.locator(".figure .value").first).to_have_text("42")
    assert len(starts) == 1 and int(starts[0]) > 0
