// A new version: dataset, split, preprocessing and augmentation, with what will come of them before it is made.
import { html, useEffect, useState } from "../vendor/preact.js";
import { all, call, newRequestId } from "../api/http.js";
import { go, query } from "../router.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { count, idOf } from "../i18n/format.js";
import { say } from "../state/status.js";
import { useLoad } from "../state/load.js";
import { Sketch } from "../vision/sketch.js";
import { Button, Card, Empty, Field, Figure, Loaded, Problem, Skeleton } from "../ui/parts.js";

const TURNS = ["FLIP_LEFT_RIGHT", "FLIP_UP_DOWN", "ROTATE_90", "ROTATE_180", "ROTATE_270"].map((one) => `AUGMENTATION_${one}`);
const PREVIEW_SAMPLES = 2;

/** @param {{project: string}} props */
export function Page({ project }) {
  const datasets = useLoad(async (signal) => (await all(`/v1/projects/${project}/datasets`, "datasets", {}, signal)).filter((one) => one.state === "READY"), [project]);
  return html`<div class="page stack">
    <h1>${t("versions.create")}</h1>
    <${Loaded} state=${datasets} lines=${5}>
      ${(/** @type {any[]} */ found) =>
        found.length
          ? html`<${Form} project=${project} datasets=${found} />`
          : html`<${Empty} text=${t("newVersion.noDataset")}><a class="button primary" href=${`/p/${project}/datasets`}>${t("datasets.import")}</a><//>`}
    <//>
  </div>`;
}

/** @param {{project: string, datasets: any[]}} props */
function Form({ project, datasets }) {
  const wanted = query.value.get("dataset");
  const [dataset, setDataset] = useState(datasets.find((one) => idOf(one.name) === wanted) ?? datasets[0]);
  const [train, setTrain] = useState(70);
  const [val, setVal] = useState(20);
  const [keep, setKeep] = useState(false);
  const [grayscale, setGrayscale] = useState(false);
  const [maxSide, setMaxSide] = useState("");
  const [copies, setCopies] = useState(/** @type {string[]} */ ([]));
  const [brightness, setBrightness] = useState("");
  const [contrast, setContrast] = useState("");
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const test = 100 - train - val;
  const hasSplit = dataset.existingSplit && Number(dataset.existingSplit.train) > 0;
  const recipe = {
    ...(keep && hasSplit ? { keepExistingSplit: true } : { split: { train, val, test } }),
    grayscale,
    maxSidePx: Number(maxSide) || 0,
    augmentations: copies,
    brightness: numbers(brightness),
    contrast: numbers(contrast),
  };
  const create = async (/** @type {Event} */ event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const version = await call("POST", `/v1/projects/${project}/versions`, { query: { requestId: newRequestId() }, body: { dataset: dataset.name, recipe } });
      say(t("newVersion.created", { name: version.displayName }));
      go(`/p/${project}/train/${idOf(version.name)}`);
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  const toggle = (/** @type {string} */ one) => setCopies(copies.includes(one) ? copies.filter((other) => other !== one) : [...copies, one]);
  return html`<form class="stack" onSubmit=${create}>
    <div class="columns wide-left">
      <div class="stack">
        <${Card} title=${t("newVersion.dataset")}>
          <${Field} label=${t("newVersion.dataset")} for="dataset">
            <select id="dataset" value=${dataset.name} onChange=${(/** @type {any} */ event) => setDataset(datasets.find((one) => one.name === event.target.value))}>
              ${datasets.map((one) => html`<option value=${one.name}>${one.displayName} (${count(one.numImages)})</option>`)}
            </select>
          <//>
        <//>
        <${Card} title=${t("split.title")}>
          ${hasSplit && html`<label class="check"><input type="checkbox" checked=${keep} onChange=${() => setKeep(!keep)} />${t("newVersion.keep")}</label>`}
          <fieldset class="stack-small" disabled=${keep && hasSplit}>
            <legend class="visually-hidden">${t("split.title")}</legend>
            <${Share} id="train" value=${train} max=${98} onInput=${(/** @type {number} */ value) => {
              setTrain(value);
              if (value + val > 99) setVal(99 - value);
            }} />
            <${Share} id="val" value=${val} max=${99 - train} onInput=${setVal} />
            <p class="row spread"><span>${t("split.test")}</span><strong class="number">${test}%</strong></p>
            <div class="split-bar" aria-hidden="true">
              <div class="train" style=${{ flexGrow: train }}></div><div class="val" style=${{ flexGrow: val }}></div><div class="test" style=${{ flexGrow: test }}></div>
            </div>
          </fieldset>
        <//>
        <${Card} title=${t("augment.preprocessing")}>
          <label class="check"><input type="checkbox" checked=${grayscale} onChange=${() => setGrayscale(!grayscale)} />${t("recipe.grayscale")}</label>
          <${Field} label=${t("newVersion.maxSide")} for="max-side" hint=${t("newVersion.maxSideHint")}>
            <input id="max-side" type="number" min="32" max="8192" value=${maxSide} placeholder="–" onInput=${(/** @type {any} */ event) => setMaxSide(event.target.value)} />
          <//>
        <//>
        <${Card} title=${t("augment.title")}>
          <p class="muted small">${t("newVersion.copiesHelp")}</p>
          <div class="checks">
            ${[...TURNS, ...(grayscale ? [] : ["AUGMENTATION_GRAYSCALE"])].map(
              (one) => html`<label class="check"><input type="checkbox" checked=${copies.includes(one)} onChange=${() => toggle(one)} />${t(`augment.${one}`)}</label>`,
            )}
          </div>
          <div class="columns">
            <${Field} label=${t("newVersion.brightness")} for="brightness" hint="-90 … 90">
              <input id="brightness" value=${brightness} placeholder="-30, 30" onInput=${(/** @type {any} */ event) => setBrightness(event.target.value)} />
            <//>
            <${Field} label=${t("newVersion.contrast")} for="contrast" hint="0.0 … 3.0">
              <input id="contrast" value=${contrast} placeholder="0.7, 1.3" onInput=${(/** @type {any} */ event) => setContrast(event.target.value)} />
            <//>
          </div>
        <//>
      </div>
      <${Preview} project=${project} dataset=${dataset} recipe=${recipe} />
    </div>
    ${error && html`<${Problem} error=${error} />`}
    <div class="row"><${Button} kind="primary" type="submit" needs="EDITOR" busy=${busy}>${t("newVersion.make")}<//></div>
  </form>`;
}

/** @param {string} text */
const numbers = (text) => text.split(/[\s,]+/).filter(Boolean).map(Number).filter(Number.isFinite);

/** @param {{id: string, value: number, max: number, onInput: (value: number) => void}} props */
function Share({ id, value, max, onInput }) {
  return html`<label class="threshold">
    <span>${t(`split.${id}`)}</span>
    <input type="range" min="1" max=${max} value=${value} onInput=${(/** @type {any} */ event) => onInput(Number(event.target.value))} />
    <output class="number">${value}%</output>
  </label>`;
}

/** @param {{project: string, dataset: any, recipe: any}} props */
function Preview({ project, dataset, recipe }) {
  const key = JSON.stringify([dataset.name, recipe]);
  const [settled, setSettled] = useState(key);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(key), 500);
    return () => clearTimeout(timer);
  }, [key]);
  const state = useLoad((signal) => call("POST", `/v1/projects/${project}/versions:preview`, { body: { dataset: dataset.name, recipe, numSamples: PREVIEW_SAMPLES }, signal }), [settled]);
  const data = state.data;
  return html`<div class="stack">
    <${Card} title=${t("newVersion.counts")}>
      ${state.error && html`<${Problem} error=${state.error} />`}
      <div class="figures" aria-busy=${state.loading}>
        ${["train", "val", "test"].map((split) => html`<${Figure} label=${t(`split.${split}`)} value=${data ? count(data.numImages[split]) : "…"} />`)}
      </div>
      ${data && Number(data.leakReport?.numGroups) > 0 &&
      html`<p class="muted small">${t("newVersion.groups", { groups: count(data.leakReport.numGroups), leaking: count(data.leakReport.numLeakingGroups) })}</p>`}
    <//>
    <${Card} title=${t("newVersion.preview")}>
      ${!data && !state.error && html`<${Skeleton} lines=${6} />`}
      ${data?.samples.map(
        (/** @type {any} */ sample) => html`<div class="stack-small">
          <p class="muted small path">${sample.path} · ${t(`split.${sample.split.slice(6).toLowerCase()}`)}</p>
          <div class="gallery small-tiles">
            <${Sketch} label=${t("newVersion.before")} picture=${sample.before} />
            ${sample.after.map((/** @type {any} */ picture) => html`<${Sketch} label=${stepLabel(picture.step)} picture=${picture} />`)}
          </div>
        </div>`,
      )}
    <//>
  </div>`;
}

/** What a copy is called, e.g. "brightness +30". @param {string} step */
function stepLabel(step) {
  const [name, value] = step.split(" ");
  if (value) return t(`augment.${name}`, { value });
  return t(`augment.AUGMENTATION_${name.toUpperCase()}`) || t("newVersion.after");
}
