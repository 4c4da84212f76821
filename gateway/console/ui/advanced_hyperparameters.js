// The advanced hyper-parameters of a family, as the schema of the API describes them.
import { html } from "../vendor/preact.js";
import { count } from "../i18n/format.js";
import { language } from "../state/preferences.js";
import { Field } from "./parts.js";
import { Placing } from "./placing.js";

/** @param {any} props */
export function Advanced({ project, schema, model, state, readOnly }) {
  const shown = schema.filter((/** @type {any} */ one) => one.families.includes(model.family));
  const values = state.values.advanced;
  const onChange = (/** @type {any} */ advanced) => state.set({ advanced });
  return html`<${Placing} project=${project} state=${state} readOnly=${readOnly} />
    <div class="advanced-fields">
      ${shown.map(
        (/** @type {any} */ one) => html`<${Hyperparameter}
          one=${one}
          model=${model}
          value=${values[one.name]}
          readOnly=${readOnly}
          onChange=${(/** @type {any} */ value) => {
            const next = { ...values };
            if (value === undefined) delete next[one.name];
            else next[one.name] = value;
            onChange(next);
          }}
        />`,
      )}
    </div>`;
}

/** @param {any} props */
function Hyperparameter({ one, model, value, readOnly, onChange }) {
  const id = `hyper-${one.name}`;
  const range = one.familyRanges[model.family] ?? one;
  const standard = one.name === "image_size" ? model.inputSizePx : one.defaults[model.family];
  const now = value ?? standard;
  const help = html`<p>${language.value === "ko" ? one.helpKo : one.helpEn}</p>`;
  if (one.type === "BOOLEAN") {
    return html`<${Field} label=${html`<code>${one.name}</code>`} about=${one.name} help=${help} for=${id}>
      <label class="check"><input id=${id} type="checkbox" checked=${Boolean(now)} disabled=${readOnly} onChange=${(/** @type {any} */ event) => onChange(event.target.checked)} /></label>
    <//>`;
  }
  if (one.type === "CHOICE") {
    return html`<${Field} label=${html`<code>${one.name}</code>`} about=${one.name} help=${help} for=${id}>
      <select id=${id} value=${now} disabled=${readOnly} onChange=${(/** @type {any} */ event) => onChange(event.target.value)}>
        ${one.choices.map((/** @type {string} */ choice) => html`<option value=${choice}>${choice}</option>`)}
      </select>
    <//>`;
  }
  const isText = typeof standard === "string";
  return html`<${Field} label=${html`<code>${one.name}</code>`} about=${one.name} help=${help} for=${id}
    hint=${range.minimum === undefined ? "" : `${short(range.minimum)} – ${short(range.maximum)}`}>
    <input
      id=${id}
      type=${isText ? "text" : "number"}
      min=${range.minimum}
      max=${range.maximum}
      step=${one.type === "INTEGER" ? range.multipleOf || 1 : "any"}
      value=${value ?? ""}
      placeholder=${String(standard ?? "")}
      disabled=${readOnly}
      onInput=${(/** @type {any} */ event) => {
        const text = event.target.value;
        onChange(text === "" ? undefined : isText ? text : Number(text));
      }}
    />
  <//>`;
}

/** @param {number} value */
const short = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(0) : count(value));
