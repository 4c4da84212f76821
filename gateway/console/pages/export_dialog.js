// A trained model as a file: what there is, and a new one with its progress.
import { html, useEffect, useState } from "../vendor/preact.js";
import { all, call, newRequestId } from "../api/http.js";
import { watch } from "../api/stream.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { bytes, idOf } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { Button, Chip, Dialog, Field, Loaded, Problem, Progress } from "../ui/parts.js";

const PRECISIONS = { ONNX: ["FP32", "FP16"], OPENVINO: ["FP32", "FP16", "INT8"], PYTORCH: ["FP32", "FP16"] };
const TONES = { QUEUED: "warn", RUNNING: "brand", SUCCEEDED: "ok", FAILED: "bad", CANCELLED: "" };

/** @param {{training: string, onClose: () => void}} props */
export function ExportDialog({ training, onClose }) {
  const list = useLoad((signal) => all(`/v1/${training}/exports`, "exports", {}, signal), [training]);
  const [format, setFormat] = useState("ONNX");
  const [precision, setPrecision] = useState("FP32");
  const [dynamic, setDynamic] = useState(false);
  const [endToEnd, setEndToEnd] = useState(false);
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const make = async (/** @type {Event} */ event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      await call("POST", `/v1/${training}/exports`, {
        query: { requestId: newRequestId() },
        body: { format, precision, dynamic: dynamic && format !== "PYTORCH", endToEnd: endToEnd && format === "ONNX" },
      });
      list.reload();
    } catch (caught) {
      setError(caught);
    }
    setBusy(false);
  };
  return html`<${Dialog} title=${t("export.title")} onClose=${onClose}>
    <form class="stack" onSubmit=${make}>
      <div class="columns">
        <${Field} label=${t("export.format")} for="export-format">
          <select id="export-format" value=${format} onChange=${(/** @type {any} */ event) => {
            setFormat(event.target.value);
            setPrecision("FP32");
          }}>
            ${Object.keys(PRECISIONS).map((one) => html`<option value=${one}>${t(`export.${one}`)}</option>`)}
          </select>
        <//>
        <${Field} label=${t("export.precision")} for="export-precision">
          <select id="export-precision" value=${precision} onChange=${(/** @type {any} */ event) => setPrecision(event.target.value)}>
            ${PRECISIONS[/** @type {keyof typeof PRECISIONS} */ (format)].map((one) => html`<option value=${one}>${one}</option>`)}
          </select>
        <//>
      </div>
      ${format !== "PYTORCH" && html`<label class="check"><input type="checkbox" checked=${dynamic} onChange=${() => setDynamic(!dynamic)} />${t("export.dynamic")}</label>`}
      ${format === "ONNX" && html`<label class="check"><input type="checkbox" checked=${endToEnd} onChange=${() => setEndToEnd(!endToEnd)} />${t("export.endToEnd")}</label>`}
      ${error && html`<${Problem} error=${error} />`}
      <div class="dialog-actions"><${Button} kind="primary" type="submit" busy=${busy}>${t("export.make")}<//></div>
    </form>
    <${Loaded} state=${list}>
      ${(/** @type {any[]} */ found) => html`<ul class="stack-small">${found.map((one) => html`<li key=${one.name}><${Row} one=${one} onChange=${list.reload} /></li>`)}</ul>`}
    <//>
  <//>`;
}

/** @param {{one: any, onChange: () => void}} props */
function Row({ one, onChange }) {
  const [progress, setProgress] = useState(/** @type {any} */ (null));
  const working = ["QUEUED", "RUNNING"].includes(one.state);
  useEffect(() => {
    if (!working) return undefined;
    return watch(`/v1/${one.name}:watch`, {
      on: { export: () => {}, progress: (message) => setProgress(message.progress) },
      newest: ["progress"],
      onEnd: onChange,
      onError: onChange,
    });
  }, [one.name, working]);
  return html`<div class="row spread">
      <span class="row">
        <${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (one.state)]}>${t(`export.state.${one.state}`)}<//>
        ${t(`export.${one.format}`)} ${one.precision === "PRECISION_UNSPECIFIED" ? "FP32" : one.precision}
        ${one.object && html`<span class="muted small number">${bytes(one.object.sizeBytes)}</span>`}
      </span>
      ${one.object && html`<a class="button plain" href=${`/v1/${one.name}:download`} download aria-label=${t("export.download", { name: idOf(one.name) })}>${t("action.download")}</a>`}
    </div>
    ${working && html`<${Progress} value=${progress?.percent} label=${t("export.title")} />`}
    ${one.failure && html`<p class="bad small">${one.failure.status.message}</p>`}`;
}
