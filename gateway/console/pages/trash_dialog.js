// Deleted versions, which can be restored for a while.
import { html, useState } from "../vendor/preact.js";
import { all, call } from "../api/http.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { when } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { Button, Dialog, Empty, Loaded, Problem } from "../ui/parts.js";

/** @param {{project: string, onChange: () => void, onClose: () => void}} props */
export function TrashDialog({ project, onChange, onClose }) {
  const list = useLoad(async (signal) => {
    const versions = await all(`/v1/projects/${project}/versions`, "versions", { showDeleted: true }, signal);
    return versions.filter((one) => one.deleteTime);
  }, [project]);
  const [error, setError] = useState(/** @type {any} */ (null));
  const restore = async (/** @type {any} */ version) => {
    setError(null);
    try {
      await call("POST", `/v1/${version.name}:undelete`, { body: {} });
      list.reload();
      onChange();
    } catch (caught) {
      setError(caught);
    }
  };
  return html`<${Dialog} title=${t("trash.title")} onClose=${onClose}>
    ${error && html`<${Problem} error=${error} />`}
    <${Loaded} state=${list}>
      ${(/** @type {any[]} */ found) =>
        found.length
          ? html`<ul class="stack-small">
              ${found.map(
                (one) => html`<li class="row spread" key=${one.name}>
                  <span>${one.displayName} <span class="muted small">${t("trash.until", { time: when(one.purgeTime) })}</span></span>
                  <${Button} icon="restore" needs="EDITOR" onClick=${() => restore(one)}>${t("trash.restore")}<//>
                </li>`,
              )}
            </ul>`
          : html`<${Empty} text=${t("trash.empty")} />`}
    <//>
  <//>`;
}
