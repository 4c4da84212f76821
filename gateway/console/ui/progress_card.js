// How far a training is, and what can be done about it.
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { call } from "../api/http.js";
import { t } from "../i18n/texts.js";
import { bytes, count, duration, percent, remaining } from "../i18n/format.js";
import { say } from "../state/status.js";
import { Later } from "./later.js";
import { Button, Card, Chip, Failed, Problem, Progress, Skeleton } from "./parts.js";

const TONES = { QUEUED: "warn", PROVISIONING: "warn", RUNNING: "brand", EVALUATING: "brand", SUCCEEDED: "ok", FAILED: "bad", STOPPED: "", PAUSED: "warn" };

/** @param {{elapsed: number, eta?: number}} props */
export function Times({ elapsed, eta }) {
  return html`<dl class="times row small number">
    <div><dt>${t("progress.elapsed")}</dt><dd>${duration(elapsed)}</dd></div>
    <div><dt>${t("progress.remaining")}</dt><dd>${remaining(eta)}</dd></div>
  </dl>`;
}

/** @param {{live: import("../state/training.js").Live | null, onChange: () => void}} props */
export function ProgressCard({ live, onChange }) {
  const training = live?.training;
  const progress = live?.progress;
  const told = useRef(-1);
  const share = shareDone(training, progress);

  useEffect(() => {
    const tenth = Math.floor((share ?? 0) / 10);
    if (training?.state === "RUNNING" && tenth !== told.current) {
      told.current = tenth;
      say(t("progress.said", { percent: 10 * tenth }));
    }
  }, [share, training?.state]);

  if (!training) return html`<${Card} title=${t("progress.title")}><${Skeleton} lines=${2} /><//>`;
  const running = ["RUNNING", "EVALUATING"].includes(training.state);
  return html`<${Card} title=${t("progress.title")} actions=${html`<${Actions} training=${training} onChange=${onChange} />`}>
    <div class="row spread">
      <${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (training.state)]}>${t(`training.${training.state}`)}<//>
      <span class="muted number">${where(training, progress)} <strong>${share === undefined ? "" : `${Math.floor(share)}%`}</strong></span>
    </div>
    ${training.state !== "FAILED" && html`<${Progress} value=${share} label=${t("progress.title")} />`}
    ${training.state === "PROVISIONING" && html`<${Times} elapsed=${0} />`}
    ${running && progress && html`<${Times} elapsed=${progress.elapsedSeconds} eta=${progress.etaSeconds} />`}
    ${running && progress && html`<${Details} progress=${progress} />`}
    ${training.state === "FAILED" && training.failure && html`<${Failed} failure=${training.failure} />`}
    ${training.preflight?.checks?.length > 0 && html`<${Preflight} checks=${training.preflight.checks} />`}
    ${live.log.length > 0 &&
    html`<details class="log" open=${training.state === "FAILED"}>
      <summary>${t("progress.log")}</summary>
      <pre tabindex="0">${live.log.join("\n")}</pre>
    </details>`}
  <//>`;
}

/** Percent done, or undefined while it cannot be said. @param {any} training @param {any} progress */
function shareDone(training, progress) {
  if (!training) return undefined;
  if (training.state === "SUCCEEDED") return 100;
  if (progress?.percent) return progress.percent;
  if (["QUEUED", "PROVISIONING", "EVALUATING", "RUNNING"].includes(training.state)) {
    return training.state === "RUNNING" ? 0 : undefined;
  }
  return training.epochs ? (100 * training.numEpochsDone) / training.epochs : 0;
}

/** @param {any} training @param {any} progress */
function where(training, progress) {
  if (training.waitReason === "QUOTA") return t("progress.quota");
  if (training.state === "QUEUED") return training.queuePosition ? t("progress.queue", { position: training.queuePosition }) : "";
  const epoch = progress?.epoch || training.numEpochsDone;
  const text = t("progress.epoch", { epoch: count(epoch), total: count(training.epochs) });
  if (training.state === "RUNNING" && progress?.numSteps && progress.stage === "train") {
    return `${text} · ${t("progress.step", { step: count(progress.step), total: count(progress.numSteps) })} ·`;
  }
  return `${text} ·`;
}

/** @param {{progress: any}} props */
function Details({ progress }) {
  const losses = Object.entries(progress.losses ?? {});
  return html`<dl class="times row small number">
    ${losses.map(([name, value]) => html`<div><dt>${name}</dt><dd>${Number(value).toFixed(3)}</dd></div>`)}
    <div><dt>lr</dt><dd>${Number(progress.learningRate).toPrecision(3)}</dd></div>
    <div><dt>${t("progress.device")}</dt><dd>${progress.device}</dd></div>
    <div><dt>${t("progress.wait")}</dt><dd>${percent(progress.dataWaitShare, 0)}</dd></div>
    ${Number(progress.memoryBytes) > 0 && html`<div><dt>${t("progress.memory")}</dt><dd>${bytes(progress.memoryBytes)}</dd></div>`}
  </dl>`;
}

/** @param {{checks: any[]}} props */
function Preflight({ checks }) {
  const [opened, open] = useState(false);
  return html`<details onToggle=${(/** @type {any} */ event) => open(event.currentTarget.open)}>
    <summary>${t("preflight.title", { count: checks.length })}</summary>
    ${opened && html`<${Later} load=${() => import("./preflight.js")} name="Checks" checks=${checks} />`}
  </details>`;
}

/** @param {{training: any, onChange: () => void}} props */
function Actions({ training, onChange }) {
  const [asking, setAsking] = useState(false);
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const act = async (/** @type {string} */ verb, /** @type {any} */ body) => {
    setBusy(true);
    setError(null);
    try {
      await call("POST", `/v1/${training.name}:${verb}`, { body });
      setAsking(false);
      onChange();
    } catch (caught) {
      setError(caught);
    }
    setBusy(false);
  };
  const stoppable = ["QUEUED", "PROVISIONING", "RUNNING", "EVALUATING"].includes(training.state);
  const resumable = ["PAUSED", "FAILED"].includes(training.state);
  const stopping = training.stopMode && training.stopMode !== "STOP_MODE_UNSPECIFIED" && stoppable;
  return html`
    ${stopping && html`<span class="muted small">${t(`stop.${training.stopMode}.under`)}</span>`}
    ${stoppable && html`<${Button} icon="stop" needs="EDITOR" onClick=${() => setAsking(true)}>${t("action.stop")}<//>`}
    ${resumable &&
    html`<${Button} kind="primary" icon="play" needs="EDITOR" busy=${busy} onClick=${() => act("resume", {})}>
      ${t(training.state === "FAILED" ? "action.retry" : "action.resume")}
    <//>`}
    ${error && !asking && html`<${Problem} error=${error} />`}
    ${asking && html`<${Later} load=${() => import("./stop_dialog.js")} name="StopDialog" busy=${busy} error=${error} onStop=${(/** @type {string} */ mode) => act("stop", { mode })} onClose=${() => setAsking(false)} />`}
  `;
}
