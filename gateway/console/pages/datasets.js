// Datasets: import with progress, the list, and of one its figures.
import { html, useEffect, useState } from "../vendor/preact.js";
import { all, call, get } from "../api/http.js";
import { watch } from "../api/stream.js";
import { go } from "../router.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { count, idOf, when } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { may } from "../state/session.js";
import { Sketch } from "../vision/sketch.js";
import { ImportCard } from "../ui/import_card.js";
import { Button, Card, Chip, Dialog, Empty, Failed, Figure, Loaded, Problem, Progress } from "../ui/parts.js";

const TONES = { IMPORTING: "warn", READY: "ok", FAILED: "bad" };
const NUM_SAMPLES = 6;
const FORMATS = { DATASET_FORMAT_YOLO: "YOLO", DATASET_FORMAT_VOC: "Pascal VOC", DATASET_FORMAT_COCO: "COCO" };

/** @param {{project: string, dataset?: string}} props */
export function Page({ project, dataset }) {
  const list = useLoad((signal) => all(`/v1/projects/${project}/datasets`, "datasets", {}, signal), [project]);
  return html`<div class="page stack">
    <h1>${t("datasets.title")}</h1>
    ${may("EDITOR") && html`<${ImportCard} project=${project} onDone=${list.reload} />`}
    <${Loaded} state=${list} lines=${4}>
      ${(/** @type {any[]} */ found) =>
        found.length
          ? html`<${Card}>
              <div class="table-scroll">
                <table>
                  <thead>
                    <tr><th>${t("datasets.name")}</th><th>${t("datasets.state")}</th><th class="end">${t("datasets.images")}</th><th class="end">${t("datasets.boxes")}</th><th>${t("datasets.classes")}</th><th>${t("datasets.created")}</th></tr>
                  </thead>
                  <tbody>
                    ${found.map((one) => html`<${Row} key=${one.name} project=${project} one=${one} onChange=${list.reload} />`)}
                  </tbody>
                </table>
              </div>
            <//>`
          : html`<${Empty} text=${t("datasets.empty")} />`}
    <//>
    ${dataset &&
    html`<${Details}
      project=${project}
      name=${`projects/${project}/datasets/${dataset}`}
      state=${list.data?.find((one) => idOf(one.name) === dataset)?.state}
      onChange=${list.reload}
    />`}
  </div>`;
}

/** @param {{project: string, one: any, onChange: () => void}} props */
function Row({ project, one, onChange }) {
  const [progress, setProgress] = useState(/** @type {any} */ (null));
  const importing = one.state === "IMPORTING";
  useEffect(() => {
    if (!importing) return undefined;
    return watch(`/v1/${one.name}:watch`, {
      on: {
        dataset: (message) => message.dataset.state !== "IMPORTING" && onChange(),
        progress: (message) => setProgress(message.progress),
      },
      newest: ["progress"],
      onEnd: onChange,
      onError: onChange,
    });
  }, [one.name, importing]);
  return html`<tr>
    <td><a href=${`/p/${project}/datasets/${idOf(one.name)}`}>${one.displayName}</a></td>
    <td>
      <${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (one.state)]}>${t(`dataset.${one.state}`)}<//>
      ${importing && html`<div class="in-cell"><${Progress} value=${progress?.percent} label=${t("datasets.importing")} /></div>`}
    </td>
    <td class="end">${one.state === "READY" ? count(one.numImages) : "–"}</td>
    <td class="end">${one.state === "READY" ? count(one.numBoxes) : "–"}</td>
    <td>${one.classNames.slice(0, 6).join(", ")}${one.classNames.length > 6 ? ` +${one.classNames.length - 6}` : ""}</td>
    <td class="muted small">${when(one.createTime)}</td>
  </tr>`;
}

/** @param {{project: string, name: string, state?: string, onChange: () => void}} props `state` is the one of the list */
function Details({ project, name, state: listed, onChange }) {
  const state = useLoad((signal) => get(`/v1/${name}`, {}, signal), [name, listed]);
  const [deleting, setDeleting] = useState(false);
  return html`<${Loaded} state=${state} lines=${4}>
    ${(/** @type {any} */ one) => html`
      <${Card}
        title=${one.displayName}
        actions=${html`
          ${may("EDITOR") &&
          html`${one.state === "READY" && html`<a class="button primary" href=${`/p/${project}/versions/new?dataset=${idOf(name)}`}>${t("versions.create")}</a>`}
            <${Button} kind="quiet" icon="bin" label=${t("datasets.delete")} onClick=${() => setDeleting(true)} />`}
        `}
      >
        ${one.state === "IMPORTING" && html`<p class="muted">${t("datasets.importing")}</p>`}
        ${one.failure && html`<${Failed} failure=${one.failure} />`}
        ${one.state === "READY" &&
        html`<div class="figures">
            <${Figure} label=${t("datasets.images")} value=${count(one.numImages)} detail=${t("datasets.background", { count: count(one.numBackgroundImages) })} />
            <${Figure} label=${t("datasets.boxes")} value=${count(one.numBoxes)} />
            <${Figure} label=${t("datasets.classes")} value=${count(one.classNames.length)} />
            <${Figure} label=${t("datasets.format")} value=${FORMATS[/** @type {keyof typeof FORMATS} */ (one.format)] ?? "–"} />
          </div>
          ${Number(one.numSkipped) > 0 && html`<${Skipped} name=${name} total=${Number(one.numSkipped)} />`}
          <${Statistics} name=${name} />
          <${Samples} project=${project} dataset=${one} />`}
      <//>
      ${deleting && html`<${Delete} project=${project} dataset=${one} onChange=${onChange} onClose=${() => setDeleting(false)} />`}
    `}
  <//>`;
}

/** @param {{name: string, total: number}} props */
function Skipped({ name, total }) {
  const state = useLoad((signal) => get(`/v1/${name}/importProblems`, { pageSize: 50 }, signal), [name]);
  return html`<details>
    <summary>${t("datasets.skipped", { count: count(total) })}</summary>
    <${Loaded} state=${state}>
      ${(/** @type {any} */ data) => html`<ul class="small problems">
        ${data.problems.map((/** @type {any} */ one) => html`<li><code>${one.field}</code> ${one.description}</li>`)}
      </ul>`}
    <//>
  </details>`;
}

/** @param {{name: string}} props */
function Statistics({ name }) {
  const state = useLoad((signal) => get(`/v1/${name}/statistics`, {}, signal), [name]);
  return html`<${Loaded} state=${state}>
    ${(/** @type {any} */ data) => {
      const most = Math.max(1, ...data.classes.map((/** @type {any} */ one) => Number(one.numBoxes)));
      const suspicions = data.suspicions.filter((/** @type {any} */ one) => Number(one.numTotal) > 0);
      return html`<div class="columns">
        <div class="stack-small">
          <h3>${t("datasets.perClass")}</h3>
          <ul class="bars">
            ${data.classes.map(
              (/** @type {any} */ one) => html`<li class="bar-row">
                <span>${one.className}</span>
                <span class="bar-track"><span style=${{ width: `${(100 * Number(one.numBoxes)) / most}%` }}></span></span>
                <span class="number">${count(one.numBoxes)}</span>
              </li>`,
            )}
          </ul>
        </div>
        <div class="stack-small">
          <h3>${t("datasets.sizes")}</h3>
          <ul class="small number">
            ${data.imageSizes.slice(0, 8).map((/** @type {any} */ one) => html`<li>${one.widthPx} × ${one.heightPx}: ${count(one.numImages)}</li>`)}
          </ul>
          ${suspicions.length > 0 &&
          html`<h3>${t("datasets.suspicions")}</h3>
            <ul class="small">
              ${suspicions.map(
                (/** @type {any} */ one) => html`<li>
                  ${t(`suspicion.${one.kind}`)}: ${count(one.numTotal)} <span class="muted path">${one.examples.slice(0, 2).join(", ")}</span>
                </li>`,
              )}
            </ul>`}
        </div>
      </div>`;
    }}
  <//>`;
}

/** Some of the images with their boxes. @param {{project: string, dataset: any}} props */
function Samples({ project, dataset }) {
  const body = { dataset: dataset.name, recipe: {}, numSamples: NUM_SAMPLES };
  const state = useLoad((signal) => call("POST", `/v1/projects/${project}/versions:preview`, { body, signal }), [dataset.name]);
  return html`<div class="stack-small">
    <h3>${t("datasets.samples")}</h3>
    <${Loaded} state=${state}>
      ${(/** @type {any} */ data) => html`<div class="gallery small-tiles">
        ${data.samples.map((/** @type {any} */ one) => html`<${Sketch} label=${labelOf(dataset, one)} picture=${one.before} />`)}
      </div>`}
    <//>
  </div>`;
}

/** An image's path, and what is in it. @param {any} dataset @param {any} sample */
function labelOf(dataset, sample) {
  const names = new Set(sample.before.classIds.map((/** @type {number} */ id) => dataset.classNames[id]));
  return [sample.path, [...names].join(", ")].filter(Boolean).join(" · ");
}

/** @param {{project: string, dataset: any, onChange: () => void, onClose: () => void}} props */
function Delete({ project, dataset, onChange, onClose }) {
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const remove = async () => {
    setBusy(true);
    try {
      await call("DELETE", `/v1/${dataset.name}`);
      onClose();
      go(`/p/${project}/datasets`);
      onChange();
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${t("datasets.delete")} onClose=${onClose}>
    <p>${t("datasets.deleteQuestion", { name: dataset.displayName })}</p>
    ${error && html`<${Problem} error=${error} />`}
    <div class="dialog-actions">
      <button type="button" class="button plain" autofocus onClick=${onClose}>${t("action.cancel")}</button>
      <${Button} kind="danger" busy=${busy} onClick=${remove}>${t("action.yes")}<//>
    </div>
  <//>`;
}
