// The hyper-parameters: which model, batch size, epochs, and the advanced ones by the schema of the API.
import { html, useEffect, useState } from "../vendor/preact.js";
import { get } from "../api/http.js";
import { t } from "../i18n/texts.js";
import { useLoad } from "../state/load.js";
import { Later } from "./later.js";
import { Card, Field, Loaded } from "./parts.js";

const FAMILIES = ["yolov5", "yolov8", "efficientdet"];
const DEFAULTS = { model: "yolov5s", batchSize: 16, epochs: 200, advanced: {}, warmStart: "", priority: 0, numNodes: 1, numDevices: 1 };

/**
 * What is chosen, or of a training that there is, what it was started with.
 *
 * @param {any} training
 */
export function useHyperparameters(training) {
  const [values, setValues] = useState(/** @type {any} */ (DEFAULTS));
  useEffect(() => {
    if (!training) return;
    setValues({
      model: training.model,
      batchSize: training.batchSize,
      epochs: training.epochs,
      advanced: training.hyperparameters ?? {},
      warmStart: training.warmStart?.training ?? training.warmStart?.weights ?? "",
      priority: training.priority,
      numNodes: training.resources?.numNodes || 1,
      numDevices: training.resources?.numDevicesPerNode || 1,
    });
  }, [training?.name]);
  return {
    values,
    set: (/** @type {any} */ part) => setValues((/** @type {any} */ before) => ({ ...before, ...part })),
    body: () => ({
      model: values.model,
      batchSize: Number(values.batchSize),
      epochs: Number(values.epochs),
      hyperparameters: values.advanced,
      warmStart: values.warmStart ? { [values.warmStart.includes("/trainings/") ? "training" : "weights"]: values.warmStart } : undefined,
      priority: Number(values.priority),
      resources: { numNodes: Number(values.numNodes), numDevicesPerNode: Number(values.numDevices) },
    }),
  };
}

/** @param {{project: string, values: ReturnType<typeof useHyperparameters>, readOnly: boolean, training?: any}} props */
export function HyperparametersCard({ project, values: state, readOnly, training }) {
  const { values, set } = state;
  const loaded = useLoad(async (signal) => {
    const [models, schema] = await Promise.all([get("/v1/models", {}, signal), get("/v1/hyperparameterSchema", {}, signal)]);
    return { models: models.models, schema: schema.hyperparameters };
  }, []);
  return html`<${Card} title=${t("hyper.title")}>
    <${Loaded} state=${loaded} lines=${6}>
      ${(/** @type {any} */ data) => {
        const model = data.models.find((/** @type {any} */ one) => one.name === `models/${values.model}`);
        return html`
          <fieldset disabled=${readOnly}>
            <legend class="visually-hidden">${t("hyper.model")}</legend>
            ${FAMILIES.filter((family) => !readOnly || family === model?.family).map(
              (family) => html`<div class="family">
                <h3>${t(`family.${family}`)}</h3>
                <p class="muted small">${t(`family.${family}.help`)}</p>
                <div class="models">
                  ${data.models
                    .filter((/** @type {any} */ one) => one.family === family && (!readOnly || one === model))
                    .map(
                      (/** @type {any} */ one) =>
                        html`<${ModelCard} model=${one} chosen=${one === model} onChoose=${(/** @type {string} */ id) => set({ model: id, advanced: {} })} />`,
                    )}
                </div>
              </div>`,
            )}
          </fieldset>
          <div class="columns">
            <${Number_} id="batch-size" label=${t("hyper.batch")} help="hyper.batch.help" max=${1024}
              value=${values.batchSize} readOnly=${readOnly} onInput=${(/** @type {string} */ text) => set({ batchSize: text })} />
            <${Number_} id="epochs" label=${t("hyper.epochs")} help="hyper.epochs.help" max=${10000}
              value=${values.epochs} readOnly=${readOnly} onInput=${(/** @type {string} */ text) => set({ epochs: text })} />
          </div>
          ${training?.stepBatchSize > 0 && training.stepBatchSize < training.batchSize &&
          html`<p class="muted small">${t("hyper.reduced", { size: training.stepBatchSize })}</p>`}
          ${model && html`<${Advanced} project=${project} schema=${data.schema} model=${model} state=${state} readOnly=${readOnly} />`}
        `;
      }}
    <//>
  <//>`;
}

/** @param {{model: any, chosen: boolean, onChoose: (id: string) => void}} props */
function ModelCard({ model, chosen, onChoose }) {
  const id = model.name.slice("models/".length);
  return html`<label class="model">
    <input type="radio" name="model" value=${id} checked=${chosen} onChange=${() => onChoose(id)} />
    <span class="name">${model.displayName}</span>
    <span class="muted small">${model.inputSizePx} × ${model.inputSizePx} · <span title=${t("hyper.parameters")}>${(Number(model.numParameters) / 1e6).toFixed(1)} M</span></span>
    <span class="muted small">${model.licence}</span>
  </label>`;
}

/** @param {any} props */
function Number_({ id, label, help, value, max, readOnly, onInput }) {
  return html`<${Field} label=${label} help=${help} for=${id}>
    <input id=${id} type="number" inputmode="numeric" required min="1" max=${max} step="1" value=${value} disabled=${readOnly}
      onInput=${(/** @type {any} */ event) => onInput(event.target.value)} />
  <//>`;
}

/** @param {any} props */
function Advanced(props) {
  const [opened, open] = useState(false);
  const changed = Object.keys(props.state.values.advanced).length;
  return html`<details class="advanced" onToggle=${(/** @type {any} */ event) => open(event.currentTarget.open)}>
    <summary>${t("hyper.advanced")} ${!props.readOnly && changed > 0 && html`<span class="muted small">${t("hyper.changed", { count: changed })}</span>`}</summary>
    ${opened && html`<${Later} load=${() => import("./advanced_hyperparameters.js")} name="Advanced" ...${props} />`}
  </details>`;
}
