// What a training begins with, and where and when it runs.
import { html, useState } from "../vendor/preact.js";
import { all, reach, url } from "../api/http.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { idOf, percent } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { Field, Problem } from "./parts.js";

/** @param {{project: string, state: any, readOnly: boolean}} props */
export function Placing({ project, state: { values, set }, readOnly }) {
  const number = (/** @type {string} */ key, /** @type {string} */ id, /** @type {number} */ min, /** @type {number} */ max) =>
    html`<${Field} label=${t(`hyper.${key}`)} help=${`hyper.${key}.help`} hint=${`${min} – ${max}`} for=${id}>
      <input id=${id} type="number" required min=${min} max=${max} step="1" value=${values[key]} disabled=${readOnly}
        onInput=${(/** @type {any} */ event) => set({ [key]: event.target.value })} />
    <//>`;
  return html`<div class="advanced-fields">
    <${WarmStart} project=${project} value=${values.warmStart} readOnly=${readOnly} onChange=${(/** @type {string} */ warmStart) => set({ warmStart })} />
    ${number("numDevices", "num-devices", 1, 16)} ${number("numNodes", "num-nodes", 1, 64)} ${number("priority", "priority", -100, 100)}
  </div>`;
}

/** @param {{project: string, value: string, readOnly: boolean, onChange: (name: string) => void}} props */
function WarmStart({ project, value, readOnly, onChange }) {
  const parent = `/v1/projects/${project}`;
  const state = useLoad(async (signal) => {
    const [versions, weights] = await Promise.all([
      all(`${parent}/versions`, "versions", {}, signal),
      all(`${parent}/weights`, "weights", {}, signal),
    ]);
    return { versions: versions.filter((one) => one.training && one.metrics), weights };
  }, [project]);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(/** @type {any} */ (null));
  const bring = async (/** @type {File | undefined} */ file) => {
    if (!file) return;
    setBusy(true);
    setError(null);
    try {
      const address = url(`${parent}/weights`, { displayName: file.name.slice(0, 63) });
      const headers = { "content-type": "application/octet-stream" };
      const made = await (await reach(address, { method: "POST", body: file, headers })).json();
      state.reload();
      onChange(made.name);
    } catch (caught) {
      setError(caught);
    }
    setBusy(false);
  };
  const { versions = [], weights = [] } = state.data ?? {};
  // What a training was begun with may be gone since.
  const isListed = !value || [...versions.map((one) => one.training), ...weights.map((one) => one.name)].includes(value);
  return html`<${Field} label=${t("hyper.warmStart")} help="hyper.warmStart.help" for="warm-start">
    <select id="warm-start" value=${value} disabled=${readOnly} onChange=${(/** @type {any} */ event) => onChange(event.target.value)}>
      <option value="">${t("hyper.warmStart.none")}</option>
      ${versions.length > 0 &&
      html`<optgroup label=${t("versions.title")}>
        ${versions.map((one) => html`<option value=${one.training} selected=${one.training === value}>${one.displayName} · mAP50 ${percent(one.metrics.map50)}</option>`)}
      </optgroup>`}
      ${weights.length > 0 &&
      html`<optgroup label=${t("hyper.weights")}>
        ${weights.map((one) => html`<option value=${one.name} selected=${one.name === value}>${one.displayName}${one.model && ` · ${one.model}`}</option>`)}
      </optgroup>`}
      ${!isListed && html`<option value=${value} selected>${idOf(value)}</option>`}
    </select>
    ${!readOnly &&
    html`<label class=${`link small ${busy ? "muted" : ""}`}>
      <input type="file" class="visually-hidden" accept=".pt,.safetensors" disabled=${busy} onChange=${(/** @type {any} */ event) => bring(event.target.files[0])} />
      ${t(busy ? "hyper.weights.busy" : "hyper.weights.bring")}
    </label>`}
    ${(error ?? state.error) && html`<${Problem} error=${error ?? state.error} />`}
  <//>`;
}
