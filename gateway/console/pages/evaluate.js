// Model evaluation: a trained model tried on one's own images.
import { html, useEffect, useRef, useState } from "../vendor/preact.js";
import { ApiError, failure, url } from "../api/http.js";
import { go } from "../router.js";
import "../i18n/pages.js";
import "../i18n/results.js";
import { t } from "../i18n/texts.js";
import { count, idOf, percent } from "../i18n/format.js";
import { say } from "../state/status.js";
import { useVersions } from "../state/versions.js";
import { Picture, colorOf } from "../vision/boxes.js";
import { Button, Card, Empty, Field, Problem, Progress, Skeleton, Threshold } from "../ui/parts.js";

const LEAST_CONFIDENCE = 0.05;

/** @param {{project: string, version?: string}} props */
export function Page({ project, version }) {
  const { versions, error, reload } = useVersions(project, true, () => {});
  const trained = versions?.filter((one) => one.training && ["COMPLETED", "STOPPED"].includes(one.state)) ?? [];
  const chosen = trained.find((one) => idOf(one.name) === version);
  useEffect(() => {
    if (!version && trained.length) go(`/p/${project}/evaluate/${idOf(trained[0].name)}`, { replace: true });
  }, [version, trained.length]);
  return html`<div class="page stack">
    <h1>${t("nav.evaluate")}</h1>
    ${error && html`<${Problem} error=${error} onRetry=${reload} />`}
    ${!versions && !error && html`<${Skeleton} />`}
    ${versions && !trained.length && html`<${Empty} text=${t("evaluate.none")}><a class="button primary" href=${`/p/${project}/train`}>${t("nav.train")}</a><//>`}
    ${trained.length > 0 &&
    html`<${Field} label=${t("evaluate.version")} for="version">
      <select id="version" value=${version} onChange=${(/** @type {any} */ event) => go(`/p/${project}/evaluate/${event.target.value}`)}>
        ${trained.map((one) => html`<option value=${idOf(one.name)}>${one.displayName}${one.metrics ? ` · mAP50 ${percent(one.metrics.map50)}` : ""}</option>`)}
      </select>
    <//>`}
    ${chosen && html`<${Try} key=${chosen.training} training=${chosen.training} />`}
  </div>`;
}

/** @typedef {{id: number, file: File, address: string, prediction?: any, error?: any}} Item */

/** @param {{training: string}} props */
function Try({ training }) {
  const [items, setItems] = useState(/** @type {Item[]} */ ([]));
  const [threshold, setThreshold] = useState(0.25);
  const [current, setCurrent] = useState(0);
  const working = useRef(Promise.resolve());
  const next = useRef(0);
  const stop = useRef(new AbortController());
  const made = useRef(/** @type {string[]} */ ([]));
  useEffect(
    () => () => {
      stop.current.abort();
      made.current.forEach((address) => URL.revokeObjectURL(address));
    },
    [],
  );

  const put = (/** @type {number} */ id, /** @type {Partial<Item>} */ part) =>
    setItems((before) => before.map((one) => (one.id === id ? { ...one, ...part } : one)));

  // One after the other: the answers come in order, and the model is not asked for more than it can do.
  const add = (/** @type {File[]} */ files) => {
    const added = files.map((file) => ({ id: (next.current += 1), file, address: URL.createObjectURL(file) }));
    made.current.push(...added.map((one) => one.address));
    setItems((before) => [...before, ...added]);
    if (!items.length && added.length) setCurrent(added[0].id);
    for (const one of added) {
      working.current = working.current.then(() => predict(training, one.file, stop.current.signal)).then(
        (prediction) => {
          put(one.id, { prediction });
          say(t("evaluate.said", { name: one.file.name, count: prediction.detections.length }));
        },
        (error) => {
          if (!stop.current.signal.aborted) put(one.id, { error });
        },
      );
    }
  };
  const done = items.filter((one) => one.prediction || one.error).length;
  const shown = items.find((one) => one.id === current);
  return html`
    <${Card}>
      <label
        class="drop"
        onDragOver=${(/** @type {DragEvent} */ event) => event.preventDefault()}
        onDrop=${(/** @type {DragEvent} */ event) => {
          event.preventDefault();
          add([...(event.dataTransfer?.files ?? [])]);
        }}
      >
        <input type="file" class="visually-hidden" multiple accept="image/*" onChange=${(/** @type {any} */ event) => {
          add([...event.target.files]);
          event.target.value = "";
        }} />
        <strong>${t("evaluate.drop")}</strong>
        <span class="muted small">${t("evaluate.formats")}</span>
      </label>
      ${done < items.length &&
      html`<${Progress} value=${done ? (100 * done) / items.length : undefined} label=${t("evaluate.working")} />
        <p class="muted small number">${t(done ? "evaluate.progress" : "evaluate.first", { done: count(done), total: count(items.length) })}</p>`}
    <//>
    ${items.length > 0 &&
    html`<div class="row spread">
        <${Threshold} shown=${threshold} move=${setThreshold} />
        <div class="row">
          <${Button} icon="download" disabled=${!done} onClick=${() => saveJson(items, threshold)}>JSON<//>
          <${Button} icon="download" disabled=${!shown?.prediction} onClick=${() => shown && savePicture(shown, threshold)}>PNG<//>
        </div>
      </div>
      <ul class="strip" aria-label=${t("evaluate.images")}>
        ${items.map(
          (one) => html`<li key=${one.id}>
            <button type="button" aria-pressed=${one.id === current} onClick=${() => setCurrent(one.id)}>
              <img src=${one.address} alt=${one.file.name} />
              <span class="small number">${one.error ? "!" : one.prediction ? count(above(one.prediction, threshold).length) : "…"}</span>
            </button>
          </li>`,
        )}
      </ul>`}
    ${shown && html`<${Shown} item=${shown} threshold=${threshold} />`}
  `;
}

/** @param {any} prediction @param {number} threshold */
const above = (prediction, threshold) => prediction.detections.filter((/** @type {any} */ one) => one.confidence >= threshold);

/** @param {string} training @param {File} file @param {AbortSignal} signal */
async function predict(training, file, signal) {
  const address = url(`/v1/${training}:predict`, { confidenceThreshold: LEAST_CONFIDENCE, fileName: file.name });
  /** @type {Response} */
  let response;
  try {
    response = await fetch(address, { method: "POST", body: file, signal, headers: { "content-type": "application/octet-stream" } });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new ApiError(0, {});
  }
  if (!response.ok) throw await failure(response);
  return response.json();
}

/** @param {{item: Item, threshold: number}} props */
function Shown({ item, threshold }) {
  if (item.error) return html`<${Problem} error=${item.error} />`;
  if (!item.prediction) return html`<${Skeleton} lines=${4} />`;
  const found = above(item.prediction, threshold);
  const latency = item.prediction.latency;
  return html`<${Card} title=${item.file.name}>
    <div class="opened">
      <${Picture}
        large
        src=${item.address}
        alt=${item.file.name}
        width=${item.prediction.widthPx}
        height=${item.prediction.heightPx}
        boxes=${found.map((/** @type {any} */ one) => ({ ...one.box, label: `${one.className} ${one.confidence.toFixed(2)}`, color: colorOf(one.classId) }))}
      />
      <div class="stack-small">
        <p class="muted small number">
          ${t("evaluate.latency", {
            inference: (1000 * latency.inferenceSeconds).toFixed(0),
            total: (1000 * latency.totalSeconds).toFixed(0),
          })}
        </p>
        <div class="table-scroll" tabindex="0">
          <table class="small">
            <thead><tr><th>${t("images.class")}</th><th class="end">${t("images.confidence")}</th></tr></thead>
            <tbody>
              ${found.map((/** @type {any} */ one) => html`<tr><td><span class="swatch" style=${{ background: colorOf(one.classId) }}></span>${one.className}</td><td class="end">${one.confidence.toFixed(2)}</td></tr>`)}
            </tbody>
          </table>
        </div>
        ${!found.length && html`<p class="muted">${t("evaluate.nothing")}</p>`}
      </div>
    </div>
  <//>`;
}

/** @param {Blob} content @param {string} name */
function save(content, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** @param {Item[]} items @param {number} threshold */
function saveJson(items, threshold) {
  const results = items.filter((one) => one.prediction).map((one) => ({ ...one.prediction, confidenceThreshold: threshold, detections: above(one.prediction, threshold) }));
  save(new Blob([JSON.stringify({ predictions: results }, null, 2)], { type: "application/json" }), "predictions.json");
}

/** @param {Item} item @param {number} threshold */
async function savePicture(item, threshold) {
  const bitmap = await createImageBitmap(item.file, { imageOrientation: "from-image" });
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const pen = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  pen.drawImage(bitmap, 0, 0);
  const size = Math.max(12, Math.max(bitmap.width, bitmap.height) / 48);
  pen.lineWidth = Math.max(2, size / 8);
  pen.font = `600 ${size}px ${getComputedStyle(document.body).fontFamily}`;
  pen.textBaseline = "top";
  for (const one of above(item.prediction, threshold)) {
    const { x1, y1, x2, y2 } = one.box;
    const label = `${one.className} ${one.confidence.toFixed(2)}`;
    const width = pen.measureText(label).width + size * 0.6;
    const x = Math.max(0, Math.min(x1, canvas.width - width));
    const y = y1 >= size * 1.4 ? y1 - size * 1.4 : y1;
    pen.strokeStyle = pen.fillStyle = colorOf(one.classId);
    pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    pen.fillRect(x, y, width, size * 1.4);
    pen.fillStyle = "#101418";
    pen.fillText(label, x + size * 0.3, y + size * 0.2);
  }
  canvas.toBlob((blob) => blob && save(blob, item.file.name.replace(/\.[^.]*$/, "") + ".png"), "image/png");
}
