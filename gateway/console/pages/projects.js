// Projects: the list, and a new one.
import { html, useState } from "../vendor/preact.js";
import { all, call } from "../api/http.js";
import { go } from "../router.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { idOf, when } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { Button, Dialog, Empty, Field, Loaded, Problem } from "../ui/parts.js";

export function Page() {
  const projects = useLoad((signal) => all("/v1/projects", "projects", {}, signal), []);
  const [creating, setCreating] = useState(false);
  return html`<div class="page stack">
    <div class="row spread">
      <h1>${t("projects.title")}</h1>
      <${Button} kind="primary" icon="plus" needs="ADMIN" onClick=${() => setCreating(true)}>${t("projects.new")}<//>
    </div>
    <${Loaded} state=${projects}>
      ${(/** @type {any[]} */ found) =>
        found.length
          ? html`<ul class="tiles">
              ${found.map(
                (one) => html`<li>
                  <a class="card tile" href=${`/p/${idOf(one.name)}/train`}>
                    <strong>${one.displayName}</strong>
                    <span class="muted small">${idOf(one.name)} · ${when(one.createTime)}</span>
                  </a>
                </li>`,
              )}
            </ul>`
          : html`<${Empty} text=${t("projects.empty")}>
              <${Button} kind="primary" needs="ADMIN" onClick=${() => setCreating(true)}>${t("projects.new")}<//>
            <//>`}
    <//>
    ${creating && html`<${Create} onClose=${() => setCreating(false)} />`}
  </div>`;
}

/** An id that a resource name can hold. @param {string} name */
function idFor(name) {
  const words = name
    .toLowerCase()
    .normalize("NFKD")
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-+|-+$/g, "")
    .slice(0, 40);
  return words || `project-${Date.now().toString(36)}`;
}

/** @param {{onClose: () => void}} props */
function Create({ onClose }) {
  const [name, setName] = useState("");
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const create = async (/** @type {Event} */ event) => {
    event.preventDefault();
    setBusy(true);
    const projectId = idFor(name);
    try {
      await call("POST", "/v1/projects", { query: { projectId }, body: { displayName: name.trim() } });
      go(`/p/${projectId}/datasets`);
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${t("projects.new")} onClose=${onClose}>
    <form class="stack" onSubmit=${create}>
      <${Field} label=${t("projects.name")} for="project-name">
        <input id="project-name" autofocus required maxlength="63" value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} />
      <//>
      ${error && html`<${Problem} error=${error} />`}
      <div class="dialog-actions">
        <${Button} onClick=${onClose}>${t("action.cancel")}<//>
        <${Button} kind="primary" type="submit" busy=${busy}>${t("action.create")}<//>
      </div>
    </form>
  <//>`;
}
