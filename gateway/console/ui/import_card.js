// Importing an archive: it is uploaded, and goes on where it broke off.
import { html, signal, useEffect, useRef, useState } from "../vendor/preact.js";
import { call, newRequestId } from "../api/http.js";
import { discard, forget, unfinished, upload } from "../api/upload.js";
import { go } from "../router.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { bytes, idOf, percent, remaining } from "../i18n/format.js";
import { say } from "../state/status.js";
import { Button, Card, Chip, Field, Problem, Progress } from "./parts.js";

/**
 * The import under way: it goes on while other pages are shown.
 *
 * @type {{value: {parent: string, file: File, progress: any, stop: AbortController} | null}}
 */
const job = signal(null);

/** What the last one failed of. @type {{value: {parent: string, error: any} | null}} */
const trouble = signal(null);

/**
 * Uploads a file and begins its import.
 *
 * @param {string} parent @param {File} file @param {string} displayName @param {boolean} skipInvalid
 * @returns {Promise<any>} the dataset; null if it was interrupted
 */
async function bring(parent, file, displayName, skipInvalid) {
  const stop = new AbortController();
  job.value = { parent, file, progress: null, stop };
  try {
    const uploaded = await upload(parent, file, {
      onProgress: (progress) => (job.value = { parent, file, progress, stop }),
      signal: stop.signal,
    });
    const body = { dataset: { displayName }, upload: uploaded, skipInvalid, requestId: newRequestId() };
    const dataset = await call("POST", `/v1/${parent}/datasets`, { body });
    forget(uploaded);
    return dataset;
  } catch (error) {
    if (stop.signal.aborted) return null;
    throw error;
  } finally {
    job.value = null;
  }
}

/** @param {{project: string, onDone: () => void}} props */
export function ImportCard({ project, onDone }) {
  const parent = `projects/${project}`;
  const current = job.value?.parent === parent ? job.value : null;
  const [chosen, setChosen] = useState(/** @type {File | null} */ (null));
  const [name, setName] = useState("");
  const [skip, setSkip] = useState(false);
  const here = useRef(true);
  useEffect(() => () => void (here.current = false), []);
  const file = current?.file ?? chosen;
  const busy = job.value !== null;

  const take = (/** @type {File | undefined} */ given) => {
    if (!given) return;
    setChosen(given);
    trouble.value = null;
    setName(given.name.replace(/\.(zip|tar|tgz|tar\.gz)$/i, "").slice(0, 63));
  };
  const begin = async (/** @type {Event} */ event) => {
    event.preventDefault();
    if (!file) return;
    trouble.value = null;
    try {
      const dataset = await bring(parent, file, name.trim(), skip);
      if (!dataset) return;
      say(t("datasets.importStarted", { name: dataset.displayName }));
      if (!here.current) return;
      setChosen(null);
      onDone();
      go(`/p/${project}/datasets/${idOf(dataset.name)}`);
    } catch (error) {
      trouble.value = { parent, error };
    }
  };
  return html`<${Card} title=${t("datasets.import")}>
    <form class="stack" onSubmit=${begin}>
      <label
        class="drop"
        onDragOver=${(/** @type {DragEvent} */ event) => event.preventDefault()}
        onDrop=${(/** @type {DragEvent} */ event) => {
          event.preventDefault();
          if (!busy) take(event.dataTransfer?.files[0]);
        }}
      >
        <input type="file" class="visually-hidden" disabled=${busy} accept=".zip,.tar,.tgz,.gz" onChange=${(/** @type {any} */ event) => take(event.target.files[0])} />
        <strong>${file ? file.name : t("datasets.choose")}</strong>
        <span class="muted small">${file ? bytes(file.size) : t("datasets.formats")}</span>
      </label>
      ${!busy && html`<${Unfinished} parent=${parent} file=${file} />`}
      ${file && !current &&
      html`<div class="columns">
          <${Field} label=${t("datasets.name")} for="dataset-name">
            <input id="dataset-name" required maxlength="63" value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} />
          <//>
          <label class="check"><input type="checkbox" checked=${skip} onChange=${() => setSkip(!skip)} />${t("datasets.skip")}</label>
        </div>
        <div class="row"><${Button} kind="primary" icon="upload" type="submit" busy=${busy}>${t("datasets.start")}<//></div>`}
      ${current?.progress && html`<${Sending} progress=${current.progress} />`}
      ${current && html`<div class="row"><${Button} icon="pause" onClick=${() => current.stop.abort()}>${t("datasets.interrupt")}<//></div>`}
      ${trouble.value?.parent === parent && html`<${Problem} error=${trouble.value.error} />`}
    </form>
  <//>`;
}

/** @param {{progress: import("../api/upload.js").Progress}} props */
function Sending({ progress: { sent, total, bytesPerSecond, etaSeconds, waiting } }) {
  return html`<div class="stack-small">
    <${Progress} value=${(100 * sent) / total} label=${t("datasets.uploading")} />
    <div class="row spread small number">
      <span>
        ${t("datasets.uploading")} <strong>${percent(sent / total, 0)}</strong>
        <span class="muted"> · ${t("datasets.sent", { sent: bytes(sent), total: bytes(total) })}</span>
      </span>
      ${waiting
        ? html`<${Chip} tone="warn">${t("link.lost")}<//>`
        : html`<span class="muted">
            ${bytesPerSecond !== undefined && `${t("datasets.speed", { speed: bytes(bytesPerSecond) })} · `}
            ${t("progress.remaining")} ${remaining(etaSeconds)}
          </span>`}
    </div>
  </div>`;
}

/** What was begun and can be gone on with. @param {{parent: string, file: File | null}} props */
function Unfinished({ parent, file }) {
  const [, setTurn] = useState(0);
  const [error, setError] = useState(/** @type {any} */ (null));
  const found = unfinished(parent);
  const remove = async (/** @type {any} */ one) => {
    try {
      await discard(one);
    } catch (caught) {
      if (/** @type {any} */ (caught).code !== 404) setError(caught);
    }
    setTurn((before) => before + 1);
  };
  return html`${found.map((one) => {
    const isThis = file && file.name === one.fileName && file.size === one.size && file.lastModified === one.modified;
    return html`<div class="row spread notice" key=${one.name}>
      <span>${t(isThis ? "datasets.goesOn" : "datasets.unfinished", { name: one.fileName, share: percent(one.sent / one.size, 0) })}</span>
      <${Button} icon="bin" onClick=${() => remove(one)}>${t("datasets.discard")}<//>
    </div>`;
  })}
  ${error && html`<${Problem} error=${error} />`}`;
}
