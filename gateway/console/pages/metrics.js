// The dialog behind a training's figures: images, charts, classes and errors.
import { html, useEffect, useState } from "../vendor/preact.js";
import { get, url } from "../api/http.js";
import { go, query } from "../router.js";
import "../i18n/results.js";
import { t } from "../i18n/texts.js";
import { count, decimal, percent } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { toSeries } from "../state/training.js";
import { Chart } from "../vision/chart.js";
import { Picture, colorOf } from "../vision/boxes.js";
import { Button, Dialog, Empty, Loaded, SplitSwitch, Tabs, Threshold } from "../ui/parts.js";
import { lossLines, lossNames } from "../ui/loss_chart.js";

const TABS = ["images", "charts", "classes", "errors"];
const PAGE_SIZE = 12;
const THUMBNAIL_PX = 640;
const KINDS = ["CLASS", "LOCALIZATION", "BOTH", "DUPLICATE", "BACKGROUND", "MISSED"];

/** Changes the query of the dialog's address. @param {Record<string, string>} part */
function choose(part) {
  const next = new URLSearchParams(query.value);
  for (const [name, value] of Object.entries(part)) {
    if (value) next.set(name, value);
    else next.delete(name);
  }
  go(`${location.pathname}?${next}`, { replace: true });
}

/** @param {{training: string, series?: any, onClose: () => void}} props */
export function MetricsDialog({ training, series, onClose }) {
  const tab = TABS.includes(query.value.get("tab") ?? "") ? /** @type {string} */ (query.value.get("tab")) : "images";
  const split = query.value.get("split") === "test" ? "test" : "val";
  return html`<${Dialog} wide title=${t("metrics.more")} onClose=${onClose}>
    <div class="row spread">
      <${Tabs} label=${t("metrics.more")} current=${tab} onChoose=${(/** @type {string} */ id) => choose({ tab: id })}
        tabs=${TABS.map((id) => ({ id, label: t(`metrics.tab.${id}`) }))} />
      ${tab !== "charts" &&
      html`<${SplitSwitch} split=${split} onChoose=${(/** @type {string} */ one) => choose({ split: one })} />`}
    </div>
    <div role="tabpanel" aria-labelledby=${`tab-${tab}`} class="stack">
      ${tab === "images" && html`<${Images} training=${training} split=${split} />`}
      ${tab === "charts" && html`<${Charts} training=${training} series=${series} />`}
      ${tab === "classes" && html`<${Classes} training=${training} split=${split} />`}
      ${tab === "errors" && html`<${Errors} training=${training} split=${split} />`}
    </div>
  <//>`;
}

/** A class, or the background. @param {string} name */
const classLabel = (name) => name || t("errors.background");

/** Shows the images behind a cell of the confusion matrix. @param {string} actual @param {string} predicted */
function chooseCell(actual, predicted) {
  choose({ tab: "images", error: "", confused: [actual, predicted].map(encodeURIComponent).join(">") });
}

/** @param {string | null} text @returns {string[] | null} */
function readCell(text) {
  const parts = text?.split(">").map(decodeURIComponent);
  return parts?.length === 2 ? parts : null;
}

/** What a slider says, once it has come to rest. @param {string} name @param {number | undefined} standard */
function useThreshold(name, standard) {
  const text = query.value.get(name);
  const value = text === null ? standard : Number(text);
  const [moved, setMoved] = useState(/** @type {number | undefined} */ (undefined));
  useEffect(() => {
    if (moved === undefined) return undefined;
    const timer = setTimeout(() => {
      choose({ [name]: String(moved) });
      setMoved(undefined);
    }, 200);
    return () => clearTimeout(timer);
  }, [moved]);
  return { value, shown: moved ?? value ?? 0, move: setMoved };
}

/** @param {any} box */
const edges = (box) => ({ x1: box.x1, y1: box.y1, x2: box.x2, y2: box.y2 });

/** @param {{training: string, split: string}} props */
function Images({ training, split }) {
  const kinds = query.value.getAll("error").filter((kind) => KINDS.includes(kind));
  const confused = readCell(query.value.get("confused"));
  const threshold = useThreshold("threshold", undefined);
  const [pages, setPages] = useState(/** @type {string[]} */ ([""]));
  const [truth, setTruth] = useState(true);
  const [opened, open] = useState(/** @type {any} */ (null));
  const filters = {
    split: split === "val" ? "SPLIT_VAL" : "SPLIT_TEST",
    confidenceThreshold: threshold.value,
    errorKinds: kinds.map((kind) => `ERROR_KIND_${kind}`),
    ...(confused && { "confusion.actualClass": confused[0], "confusion.predictedClass": confused[1] }),
  };
  const key = JSON.stringify([training, filters]);
  useEffect(() => setPages([""]), [key]);
  const token = pages[pages.length - 1];
  const state = useLoad(
    (signal) => get(`/v1/${training}/inferenceResults`, { ...filters, pageSize: PAGE_SIZE, pageToken: token }, signal),
    [key, token],
  );
  return html`
    <p class="muted small">${t("images.help")}</p>
    <div class="row spread">
      <${Threshold} shown=${threshold.shown || state.data?.confidenceThreshold || 0} move=${threshold.move} />
      <label class="check"><input type="checkbox" checked=${truth} onChange=${() => setTruth(!truth)} />${t("images.truth")}</label>
      ${(kinds.length > 0 || confused) &&
      html`<${Button} kind="quiet" icon="close" onClick=${() => choose({ error: "", confused: "" })}>
        ${confused ? confused.map(classLabel).join(" → ") : kinds.map((kind) => t(`errors.${kind}`)).join(", ")}
      <//>`}
    </div>
    <${Loaded} state=${state} lines=${6}>
      ${(/** @type {any} */ data) =>
        data.inferenceResults.length
          ? html`
              <ul class="gallery">
                ${data.inferenceResults.map((/** @type {any} */ one) => html`<li key=${one.name}><${Result} one=${one} truth=${truth} onClick=${() => open(one)} /></li>`)}
              </ul>
              <div class="row spread">
                <span class="muted small">${t("images.total", { count: count(data.totalSize) })}</span>
                <div class="row">
                  <${Button} icon="left" disabled=${pages.length === 1} onClick=${() => setPages(pages.slice(0, -1))}>${t("action.previous")}<//>
                  <${Button} icon="right" disabled=${!data.nextPageToken} onClick=${() => setPages([...pages, data.nextPageToken])}>${t("action.next")}<//>
                </div>
              </div>
            `
          : html`<${Empty} text=${t("images.none")} />`}
    <//>
    ${opened && html`<${Opened} one=${opened} truth=${truth} onClose=${() => open(null)} />`}
  `;
}

/** @param {any} one @param {boolean} truth */
function drawn(one, truth) {
  const found = one.detections.map((/** @type {any} */ detection) => ({
    ...edges(detection.box),
    label: `${detection.className} ${detection.confidence.toFixed(2)}`,
    color: colorOf(detection.classId),
  }));
  if (!truth) return found;
  return [
    ...one.groundTruths.map((/** @type {any} */ box) => ({ ...edges(box.box), label: "", color: box.found || box.crowd ? "#ffffff" : "#ff4d4f", dashed: true })),
    ...found,
  ];
}

/** @param {{one: any, truth: boolean, onClick: () => void}} props */
function Result({ one, truth, onClick }) {
  return html`<figure class="stack-small">
    <${Picture} src=${url(`/v1/${one.name}:image`, { maxSidePx: THUMBNAIL_PX })} alt=${one.imagePath} width=${one.widthPx} height=${one.heightPx}
      boxes=${drawn(one, truth)} onClick=${onClick} />
    <figcaption class="small">
      <span class="muted path">${one.imagePath}</span>
      <span class="number">
        ${t("images.counts", { right: one.numTruePositives, wrong: one.numFalsePositives, missed: one.numFalseNegatives })}
      </span>
    </figcaption>
  </figure>`;
}

/** @param {{one: any, truth: boolean, onClose: () => void}} props */
function Opened({ one, truth, onClose }) {
  return html`<${Dialog} wide title=${one.imagePath} onClose=${onClose}>
    <div class="opened">
      <${Picture} large src=${`/v1/${one.name}:image`} alt=${one.imagePath} width=${one.widthPx} height=${one.heightPx} boxes=${drawn(one, truth)} />
      <div class="table-scroll" tabindex="0">
        <table class="small">
          <thead><tr><th>${t("images.class")}</th><th class="end">${t("images.confidence")}</th><th>${t("images.match")}</th><th class="end">IoU</th></tr></thead>
          <tbody>
            ${one.detections.map(
              (/** @type {any} */ detection) => html`<tr>
                <td><span class="swatch" style=${{ background: colorOf(detection.classId) }}></span>${detection.className}</td>
                <td class="end">${detection.confidence.toFixed(2)}</td>
                <td>${detection.match === "FALSE_POSITIVE" ? t(`errors.${detection.errorKind.replace("ERROR_KIND_", "")}`) : t(`match.${detection.match}`)}</td>
                <td class="end">${decimal(detection.iou, 2)}</td>
              </tr>`,
            )}
            ${one.groundTruths
              .filter((/** @type {any} */ box) => !box.found && !box.crowd)
              .map((/** @type {any} */ box) => html`<tr><td>${box.className}</td><td></td><td>${t("errors.MISSED")}</td><td></td></tr>`)}
          </tbody>
        </table>
      </div>
    </div>
  <//>`;
}

const OTHER_CHARTS = [
  ["val/precision", "val/recall"],
  ["lr"],
  ["images_per_second"],
  ["data_wait_share"],
];

/** @param {{training: string, series?: any}} props */
function Charts({ training, series }) {
  const [smoothing, setSmoothing] = useState(0);
  const state = useLoad(async (signal) => toSeries((await get(`/v1/${training}/metrics`, {}, signal)).series), [training]);
  return html`
    <p class="muted small">${t("charts.help")}</p>
    <label class="threshold">
      <span>${t("charts.smoothing")}</span>
      <input type="range" min="0" max="0.99" step="0.01" value=${smoothing} onInput=${(/** @type {any} */ event) => setSmoothing(Number(event.target.value))} />
      <output class="number">${smoothing.toFixed(2)}</output>
    </label>
    <${Loaded} state=${state} lines=${6}>
      ${(/** @type {any} */ read) => {
        const all = series && Object.keys(series).length ? { ...read, ...series } : read;
        const quality = ["val/map50", "val/map50_95"].filter((name) => all[name]);
        return html`<div class="charts">
          ${lossNames(all).map((name) => html`<${Chart} title=${t(`chart.${name}`) || name} xLabel=${t("chart.epoch")} smoothing=${smoothing} lines=${lossLines(all, /** @type {string} */ (name))} />`)}
          ${quality.length > 0 &&
          html`<${Chart} title=${t("chart.quality")} xLabel=${t("chart.epoch")} smoothing=${smoothing} yRange=${[0, 1]}
            lines=${quality.map((name) => ({ label: name === "val/map50" ? "mAP50" : "mAP50-95", ...all[name] }))} />`}
          ${OTHER_CHARTS.map((names) => names.filter((name) => all[name]))
            .filter((names) => names.length)
            .map((names) => html`<${Chart} title=${names.map((name) => t(`chart.${name}`)).join(" · ")} xLabel=${t("chart.epoch")} smoothing=${smoothing}
              lines=${names.map((name) => ({ label: t(`chart.${name}`), ...all[name] }))} />`)}
        </div>`;
      }}
    <//>
  `;
}

/** @param {{training: string, split: string}} props */
function Classes({ training, split }) {
  const name = `${training}/evaluations/${split}`;
  const evaluation = useLoad((signal) => get(`/v1/${name}`, {}, signal), [name]);
  const curves = useLoad((signal) => get(`/v1/${name}:curves`, { classNames: "*" }, signal), [name]);
  return html`
    <${Loaded} state=${evaluation} lines=${6}>
      ${(/** @type {any} */ data) => html`<div class="table-scroll">
        <table>
          <thead>
            <tr>
              <th>${t("images.class")}</th><th class="end">AP50-95</th><th class="end">AP50</th><th class="end">AP75</th>
              <th class="end">${t("metrics.precision.short")}</th><th class="end">${t("metrics.recall.short")}</th><th class="end">${t("classes.boxes")}</th>
            </tr>
          </thead>
          <tbody>
            ${data.classes.map(
              (/** @type {any} */ one) => html`<tr>
                <td>${one.className}</td>
                <td class="end"><span class="bar" style=${{ "--share": Math.max(0, one.ap5095) }}></span>${percent(one.ap5095)}</td>
                <td class="end">${percent(one.ap50)}</td>
                <td class="end">${percent(one.ap75)}</td>
                <td class="end">${percent(one.bestF1?.precision)}</td>
                <td class="end">${percent(one.bestF1?.recall)}</td>
                <td class="end">${count(one.numGroundTruths)}</td>
              </tr>`,
            )}
          </tbody>
        </table>
      </div>`}
    <//>
    <${Loaded} state=${curves} lines=${4}>
      ${(/** @type {any} */ data) => html`<div class="charts">
        <${Chart} title=${t("classes.pr")} xLabel=${t("metrics.recall.short")} xRange=${[0, 1]} yRange=${[0, 1]}
          lines=${data.precisionRecall
            .filter((/** @type {any} */ one) => one.iou === 0.5 && one.precisions.length)
            .slice(0, 7)
            .map((/** @type {any} */ one) => ({ label: one.className || t("classes.all"), x: data.recalls, y: one.precisions }))} />
        ${data.confidence[0]?.recalls.length > 0 &&
        html`<${Chart} title=${t("classes.confidence")} xLabel=${t("images.confidence")} xRange=${[0, 1]} yRange=${[0, 1]}
          lines=${[
            { label: t("metrics.precision.short"), x: data.thresholds, y: data.confidence[0].precisions },
            { label: t("metrics.recall.short"), x: data.thresholds, y: data.confidence[0].recalls },
            { label: "F1", x: data.thresholds, y: data.confidence[0].f1s },
          ]} />`}
        <${Chart} title=${t("classes.calibration")} xLabel=${t("images.confidence")} xRange=${[0, 1]} yRange=${[0, 1]}
          lines=${[
            (() => {
              const bins = data.calibration.bins.filter((/** @type {any} */ bin) => Number(bin.numDetections) > 0);
              return { label: t("metrics.precision.short"), x: bins.map((/** @type {any} */ bin) => bin.meanConfidence), y: bins.map((/** @type {any} */ bin) => bin.precision) };
            })(),
            { label: t("classes.perfect"), x: [0, 1], y: [0, 1], dashed: true },
          ]} />
      </div>`}
    <//>
  `;
}

/** @param {{training: string, split: string}} props */
function Errors({ training, split }) {
  const name = `${training}/evaluations/${split}`;
  const threshold = useThreshold("threshold", undefined);
  const state = useLoad((signal) => get(`/v1/${name}:analyze`, { confidenceThreshold: threshold.value }, signal), [name, threshold.value]);
  return html`
    <${Threshold} shown=${threshold.shown || state.data?.confidenceThreshold || 0} move=${threshold.move} />
    <${Loaded} state=${state} lines=${6}>
      ${(/** @type {any} */ data) => {
        const most = Math.max(1, ...data.errors.map((/** @type {any} */ one) => Number(one.count)));
        return html`
          <p class="muted small">${t("errors.help")}</p>
          <ul class="bars">
            ${data.errors.map((/** @type {any} */ one) => {
              const kind = one.kind.replace("ERROR_KIND_", "");
              return html`<li>
                <button type="button" class="bar-button" onClick=${() => choose({ tab: "images", error: kind, confused: "" })}>
                  <span>${t(`errors.${kind}`)}<span class="muted small"> ${t(`errors.${kind}.help`)}</span></span>
                  <span class="bar-track"><span style=${{ width: `${(100 * Number(one.count)) / most}%` }}></span></span>
                  <span class="number">${count(one.count)}</span>
                  <span class="muted small number">${t("errors.gain", { gain: (100 * one.map50Gain).toFixed(1) })}</span>
                </button>
              </li>`;
            })}
          </ul>
          <${Confusion} analysis=${data} />
        `;
      }}
    <//>
  `;
}

const MAX_MATRIX = 20;

/** @param {{analysis: any}} props */
function Confusion({ analysis }) {
  const names = [...analysis.classes.map((/** @type {any} */ one) => one.className), ""];
  const cells = new Map(analysis.confusion.map((/** @type {any} */ one) => [`${one.actualClass}\n${one.predictedClass}`, Number(one.count)]));
  const sums = new Map(names.map((actual) => [actual, names.reduce((sum, predicted) => sum + (cells.get(`${actual}\n${predicted}`) ?? 0), 0)]));
  if (names.length > MAX_MATRIX) {
    const worst = analysis.confusion
      .filter((/** @type {any} */ one) => one.actualClass !== one.predictedClass)
      .sort((/** @type {any} */ a, /** @type {any} */ b) => Number(b.count) - Number(a.count))
      .slice(0, 30);
    return html`<h3>${t("confusion.most")}</h3>
      <ul class="stack-small">${worst.map((/** @type {any} */ one) => html`<li><button type="button" class="link" onClick=${() => chooseCell(one.actualClass, one.predictedClass)}>${classLabel(one.actualClass)} → ${classLabel(one.predictedClass)}: ${count(one.count)}</button></li>`)}</ul>`;
  }
  return html`<h3>${t("confusion.title")}</h3>
    <p class="muted small">${t("confusion.help")}</p>
    <div class="table-scroll">
      <table class="matrix">
        <thead><tr><th scope="col">${t("confusion.axes")}</th>${names.map((one) => html`<th scope="col" class="end">${classLabel(one)}</th>`)}</tr></thead>
        <tbody>
          ${names.map(
            (actual) => html`<tr>
              <th scope="row">${classLabel(actual)}</th>
              ${names.map((predicted) => {
                const value = cells.get(`${actual}\n${predicted}`) ?? 0;
                const share = value / (sums.get(actual) || 1);
                return html`<td class=${actual === predicted ? "end right" : "end"} style=${{ "--share": share }}>
                  ${value > 0
                    ? html`<button type="button" class="link number" onClick=${() => chooseCell(actual, predicted)}>${count(value)}</button>`
                    : html`<span class="muted">0</span>`}
                </td>`;
              })}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>`;
}
