// Versions compared on the same images: curves, parameters, figures with intervals, and where they differ.
import { html } from "../vendor/preact.js";
import { get, url } from "../api/http.js";
import { go, query } from "../router.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { count, decimal, idOf, percent } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { useVersions } from "../state/versions.js";
import { toSeries } from "../state/training.js";
import { Chart } from "../vision/chart.js";
import { Card, Chip, Empty, Loaded, Problem, Skeleton, SplitSwitch } from "../ui/parts.js";

const MAX_CHOSEN = 6;

/** @param {{project: string}} props */
export function Page({ project }) {
  const { versions, error, reload } = useVersions(project, true, () => {});
  const trained = versions?.filter((one) => one.training && ["COMPLETED", "STOPPED"].includes(one.state)) ?? [];
  const wanted = query.value.getAll("v");
  const chosen = wanted.map((id) => trained.find((one) => idOf(one.name) === id)).filter(Boolean);
  const split = query.value.get("split") === "val" ? "val" : "test";
  const choose = (/** @type {string[]} */ ids, to = split) => go(url(`/p/${project}/compare`, { v: ids, split: to === "val" ? "val" : undefined }), { replace: true });
  const toggle = (/** @type {string} */ id) => choose(wanted.includes(id) ? wanted.filter((one) => one !== id) : [...wanted, id].slice(-MAX_CHOSEN));
  return html`<div class="page stack">
    <h1>${t("nav.compare")}</h1>
    ${error && html`<${Problem} error=${error} onRetry=${reload} />`}
    ${!versions && !error && html`<${Skeleton} />`}
    ${versions && trained.length < 2 && html`<${Empty} text=${t("compare.few")}><a class="button primary" href=${`/p/${project}/train`}>${t("nav.train")}</a><//>`}
    ${trained.length > 1 &&
    html`<${Card} title=${t("compare.choose")} actions=${html`<${SplitSwitch} split=${split} onChoose=${(/** @type {string} */ one) => choose(wanted, one)} />`}>
      <p class="muted small">${t("compare.help")}</p>
      <div class="checks">
        ${trained.map(
          (one) => html`<label class="check">
            <input type="checkbox" checked=${wanted.includes(idOf(one.name))} onChange=${() => toggle(idOf(one.name))} />
            ${one.displayName} <span class="muted small number">${one.metrics ? `mAP50 ${percent(one.metrics.map50)}` : ""}</span>
          </label>`,
        )}
      </div>
    <//>`}
    ${chosen.length > 1 &&
    html`<${Curves} versions=${chosen} /><${Result} project=${project} versions=${chosen} split=${split} />`}
  </div>`;
}

/** @param {{versions: any[]}} props */
function Curves({ versions }) {
  const names = ["val/map50", "val/map50_95", "train/box_loss", "val/box_loss"];
  const state = useLoad(
    (signal) => Promise.all(versions.map(async (one) => toSeries((await get(`/v1/${one.training}/metrics`, { names }, signal)).series))),
    versions.map((one) => one.training),
  );
  return html`<${Card} title=${t("compare.curves")}>
    <${Loaded} state=${state}>
      ${(/** @type {any[]} */ all) => html`<div class="charts">
        ${names.map(
          (name) => html`<${Chart} title=${t(`chart.${name}`) || name} xLabel=${t("chart.epoch")}
            lines=${versions.map((one, index) => ({ label: one.displayName, tone: index + 1, ...(all[index][name] ?? { x: [], y: [] }) }))} />`,
        )}
      </div>`}
    <//>
  <//>`;
}

/** @param {{project: string, versions: any[], split: string}} props */
function Result({ project, versions, split }) {
  const trainings = versions.map((one) => one.training);
  const state = useLoad(
    (signal) => get(`/v1/projects/${project}:compareTrainings`, { trainings, split: split === "val" ? "SPLIT_VAL" : "SPLIT_TEST" }, signal),
    [trainings, split],
  );
  const nameOf = (/** @type {string} */ training) => versions.find((one) => one.training === training)?.displayName ?? idOf(training);
  return html`<${Loaded} state=${state} lines=${6}>
    ${(/** @type {any} */ data) => html`
      <${Card} title=${t("compare.figures")}>
        <p class="muted small">
          ${t("compare.interval", { images: count(data.numImages), draws: count(data.numResamples), level: percent(data.confidenceLevel, 0), baseline: nameOf(data.sides[0].training) })}
        </p>
        <${Deltas} rows=${data.deltas} nameOf=${nameOf} labelOf=${(/** @type {any} */ one) => t(`compare.${one.metric}`) || one.metric} />
      <//>
      ${data.parameters.length > 0 &&
      html`<${Card} title=${t("compare.parameters")}>
        <div class="table-scroll">
          <table>
            <thead><tr><th>${t("compare.parameter")}</th>${versions.map((one) => html`<th>${one.displayName}</th>`)}</tr></thead>
            <tbody>
              ${data.parameters.map((/** @type {any} */ one) => html`<tr><td><code>${one.name}</code></td>${one.values.map((/** @type {string} */ value) => html`<td>${value || "–"}</td>`)}</tr>`)}
            </tbody>
          </table>
        </div>
      <//>`}
      <${Card} title=${t("compare.classes")}>
        <${Deltas} rows=${data.classDeltas} nameOf=${nameOf} labelOf=${(/** @type {any} */ one) => one.className} />
      <//>
      ${data.images.length > 0 &&
      html`<${Card} title=${t("compare.images")}>
        <ul class="gallery">
          ${data.images.slice(0, 12).map(
            (/** @type {any} */ one) => html`<li>
              <figure class="stack-small">
                <div class="row pair">
                  ${one.inferenceResults.slice(0, 2).map((/** @type {string} */ result) => html`<img loading="lazy" alt="" src=${url(`/v1/${result}:image`, { maxSidePx: 320, drawDetections: true })} />`)}
                </div>
                <figcaption class="small"><span class="muted path">${one.imagePath}</span> <span class="number">F1 ${one.f1s.map((/** @type {number} */ f1) => decimal(f1, 2)).join(" / ")}</span></figcaption>
              </figure>
            </li>`,
          )}
        </ul>
      <//>`}
    `}
  <//>`;
}

/** @param {{rows: any[], nameOf: (training: string) => string, labelOf: (row: any) => string}} props */
function Deltas({ rows, nameOf, labelOf }) {
  return html`<div class="table-scroll">
    <table>
      <thead>
        <tr><th>${t("compare.what")}</th><th>${t("compare.version")}</th><th class="end">${t("compare.baseline")}</th><th class="end">${t("compare.value")}</th><th class="end">${t("compare.delta")}</th><th></th></tr>
      </thead>
      <tbody>
        ${rows.map(
          (one) => html`<tr>
            <td>${labelOf(one)}</td>
            <td>${nameOf(one.training)}</td>
            <td class="end">${percent(one.baseline)}</td>
            <td class="end">${percent(one.value)}</td>
            <td class="end">${signed(one.delta)} <span class="muted">[${signed(one.low)}, ${signed(one.high)}]</span></td>
            <td><${Chip} tone=${one.significant ? (one.delta > 0 ? "ok" : "bad") : ""}>${t(one.significant ? (one.delta > 0 ? "compare.better" : "compare.worse") : "compare.same")}<//></td>
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}

/** @param {number} share */
const signed = (share) => `${share > 0 ? "+" : share < 0 ? "−" : "±"}${Math.abs(100 * share).toFixed(1)}`;
