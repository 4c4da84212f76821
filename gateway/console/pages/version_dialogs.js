// Renaming and deleting a version.
import { html, useState } from "../vendor/preact.js";
import { call } from "../api/http.js";
import { go } from "../router.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { say } from "../state/status.js";
import { Button, Dialog, Field, Problem } from "../ui/parts.js";

/** @param {any} version @param {string} displayName */
const rename = (version, displayName) =>
  call("PATCH", `/v1/${version.name}`, { query: { updateMask: "displayName" }, body: { displayName, etag: version.etag } });

/** @param {any} props */
export function Rename({ version, onPut, onClose }) {
  const [name, setName] = useState(version.displayName);
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const save = async (/** @type {Event} */ event) => {
    event.preventDefault();
    setBusy(true);
    try {
      onPut(await rename(version, name.trim()));
      say(t("version.renamed", { name }));
      onClose();
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${t("version.renameTitle")} onClose=${onClose}>
    <form class="stack" onSubmit=${save}>
      <${Field} label=${t("version.name")} for="version-name">
        <input id="version-name" autofocus required maxlength="63" value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} />
      <//>
      ${error && html`<${Problem} error=${error} />`}
      <div class="dialog-actions">
        <${Button} onClick=${onClose}>${t("action.cancel")}<//>
        <${Button} kind="primary" type="submit" busy=${busy}>${t("action.save")}<//>
      </div>
    </form>
  <//>`;
}

/** @param {any} props */
export function Delete({ project, version, onChange, onClose }) {
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const remove = async () => {
    setBusy(true);
    try {
      await call("DELETE", `/v1/${version.name}`);
      say(t("version.deleted", { name: version.displayName }));
      onClose();
      go(`/p/${project}/train`);
      onChange();
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${t("version.deleteTitle")} onClose=${onClose}>
    <p>${t("version.deleteQuestion", { name: version.displayName })}</p>
    <p class="muted">${t("version.deleteNote")}</p>
    ${error && html`<${Problem} error=${error} />`}
    <div class="dialog-actions">
      <button type="button" class="button plain" autofocus onClick=${onClose}>${t("action.cancel")}</button>
      <${Button} kind="danger" busy=${busy} onClick=${remove}>${t("action.yes")}<//>
    </div>
  <//>`;
}
