"""The console in a real browser on the real stack: its first load, and its frames when live."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import shutil
import statistics
import urllib.request
from typing import Any

import orjson
from playwright.async_api import Browser, Page, StorageState, async_playwright

from detflow.events import Bus
from detflow.names import last_segment
from detflow.v1 import training_pb2, worker_pb2
from tests.benchmarks import rig, streaming

_EVENT_SECONDS = 0.1
_EPOCHS = 200
# Notes when the page can be used - its 18 models are there and the start button works - how long
# the main thread was held up in one piece, and when each frame was drawn.
_PROBE = """
(() => {
  const seen = (window.probe = { ready: 0, long: [], frames: [] });
  new PerformanceObserver((list) => {
    for (const one of list.getEntries()) seen.long.push([one.startTime, one.duration]);
  }).observe({ type: "longtask", buffered: true });
  const frame = (now) => {
    seen.frames.push(now);
    if (!seen.ready && document.querySelectorAll(".models .model").length === 18
        && document.querySelector(".title-bar .button.primary:enabled")) {
      seen.ready = performance.now();
    }
    requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})()
"""


def run(quick: bool = False) -> dict[str, Any]:
    """Measures the training page in Chromium without a GPU.

    The live training is played: a worker of the benchmark publishes what a real one does, ten
    messages of progress and one epoch a second, and it passes the trainer, NATS and the gateway.

    Args:
        quick: One load and two seconds instead of seven and twenty.

    Returns:
        Of the load, from an empty cache: milliseconds until it can be used, and the longest task.
        Of the live pages: frames per second, the 99th percentile and the longest of the times
        between frames, tasks above 50 ms, and how busy the main thread was.
    """
    return asyncio.run(_run(1, 2.0) if quick else _run(7, 20.0))


async def _run(num_loads: int, seconds: float) -> dict[str, Any]:
    async with rig.running(idle_worker=True) as stack, async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        cookies = await _sign_in(browser, stack)
        path = f"/p/default/train/{last_segment(stack.version)}"
        loads = [await _load(browser, stack, cookies, path) for _ in range(num_loads)]
        results: dict[str, Any] = {
            "load": {
                "median_ms": round(statistics.median(ready for ready, _ in loads)),
                "worst_ms": round(max(ready for ready, _ in loads)),
                "longest_task_ms": round(max(longest for _, longest in loads)),
            }
        }
        started = await asyncio.to_thread(
            lambda: stack.client.trainings.start(stack.version, model="yolov8n", epochs=1000)
        )
        bus = await Bus.connect(stack.nats_url, "benchmark")
        try:
            player = _Player(bus, started.name)
            await player.begin(stack)
            for _ in range(_EPOCHS):
                await player.epoch()
            playing = asyncio.create_task(player.play())
            for name, end in (("live", ""), ("live, all charts", "/metrics?tab=charts")):
                results[name] = await _follow(browser, stack, cookies, path + end, seconds)
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
        finally:
            await bus.close()
            await browser.close()
    return results


class _Player(streaming.Worker):
    """Plays a worker whose losses fall."""

    _epoch = 0

    async def epoch(self) -> None:
        """Publishes what a worker measures in an epoch."""
        self._epoch += 1
        falling = math.exp(-self._epoch / 60) + 0.05 * math.sin(self._epoch)
        values = {
            f"{split}/{name}": scale * (falling + 0.3)
            for split, scale in (("train", 1.0), ("val", 1.2))
            for name in ("box_loss", "cls_loss", "dfl_loss")
        }
        names = ("val/map50", "val/map50_95", "val/precision", "val/recall")
        values.update({name: max(0.0, 0.9 - falling) for name in names})
        values.update({"lr": 0.01 * falling, "images_per_second": 90.0, "data_wait_share": 0.01})
        metrics = training_pb2.EpochMetrics(attempt=1, epoch=self._epoch, values=values)
        await self.publish(worker_pb2.WorkerRecord(epoch=worker_pb2.EpochRecord(metrics=metrics)))

    async def play(self) -> None:
        """Publishes progress ten times a second, and an epoch every second."""
        for turn in range(1_000_000):
            await self.progress()
            if turn % 10 == 9:
                await self.epoch()
            await asyncio.sleep(_EVENT_SECONDS)


async def _sign_in(browser: Browser, stack: rig.Rig) -> StorageState:
    asking = urllib.request.Request(
        f"http://127.0.0.1:{stack.port}/v1/loginLinks",
        b"{}",
        {"authorization": f"Bearer {stack.token}", "content-type": "application/json"},
    )
    answer = await asyncio.to_thread(lambda: orjson.loads(urllib.request.urlopen(asking).read()))
    context = await browser.new_context(base_url=f"http://127.0.0.1:{stack.port}")
    page = await context.new_page()
    await page.goto(answer["path"])
    await page.get_by_role("button").click()
    await page.wait_for_url(lambda url: "/login" not in url)
    state = await context.storage_state()
    await context.close()
    return state


async def _open(browser: Browser, stack: rig.Rig, cookies: StorageState) -> Page:
    context = await browser.new_context(
        base_url=f"http://127.0.0.1:{stack.port}",
        storage_state=cookies,
        viewport={"width": 1360, "height": 900},
    )
    page = await context.new_page()
    await page.add_init_script(_PROBE)
    return page


async def _load(
    browser: Browser, stack: rig.Rig, cookies: StorageState, path: str
) -> tuple[float, float]:
    """Returns the milliseconds until the page can be used, and the longest task until then."""
    page = await _open(browser, stack, cookies)
    await page.goto(path)
    await page.locator(".title-bar .button.primary:enabled").wait_for()
    while not (seen := await page.evaluate("window.probe"))["ready"]:
        await page.wait_for_timeout(50)
    await page.context.close()
    return seen["ready"], max([one[1] for one in seen["long"]], default=0.0)


async def _follow(
    browser: Browser, stack: rig.Rig, cookies: StorageState, path: str, seconds: float
) -> dict[str, float]:
    page = await _open(browser, stack, cookies)
    await page.goto(path)
    charts = page.locator("dialog .plot canvas" if "metrics" in path else ".plot canvas")
    await charts.nth(1).wait_for()
    meter = await page.context.new_cdp_session(page)
    await meter.send("Performance.enable")
    await page.wait_for_timeout(1000)
    busy = await _busy_seconds(meter)
    await page.evaluate("window.probe.frames.length = window.probe.long.length = 0")
    await page.wait_for_timeout(1000 * seconds)
    seen = await page.evaluate("window.probe")
    busy = await _busy_seconds(meter) - busy
    num_charts = await charts.count()
    await page.context.close()
    frames = seen["frames"]
    gaps = [after - before for before, after in itertools.pairwise(frames)]
    return {
        "charts": num_charts,
        "frames_per_second": round(1000 * len(gaps) / (frames[-1] - frames[0]), 1),
        "p99_frame_ms": round(rig.percentile(gaps, 99), 1),
        "longest_frame_ms": round(max(gaps), 1),
        "tasks_above_50_ms": len(seen["long"]),
        "main_thread_busy": round(busy / seconds, 3),
    }


async def _busy_seconds(meter: Any) -> float:
    metrics = (await meter.send("Performance.getMetrics"))["metrics"]
    return float(next(one["value"] for one in metrics if one["name"] == "TaskDuration"))
