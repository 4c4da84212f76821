// API keys of a project: tokens for programs, each with one role.
import { html, useState } from "../vendor/preact.js";
import { all, call } from "../api/http.js";
import "../i18n/pages.js";
import "../i18n/settings.js";
import { t } from "../i18n/texts.js";
import { when } from "../i18n/format.js";
import { useAct } from "../state/act.js";
import { useLoad } from "../state/load.js";
import { Confirm, RoleSelect, Secret } from "../ui/access_parts.js";
import { Button, Card, Empty, Field, Loaded, Problem } from "../ui/parts.js";

const DAY_MS = 86_400_000;
const DAYS = [30, 90, 365];

/** @param {{parent: string}} props */
export function Part({ parent }) {
  const state = useLoad((signal) => all(`/v1/${parent}/apiKeys`, "apiKeys", {}, signal), [parent]);
  const [deleting, setDeleting] = useState(/** @type {any} */ (null));
  return html`<${Create} parent=${parent} onChange=${state.reload} />
    <${Card} title=${t("settings.keys")}>
      <${Loaded} state=${state}>
        ${(/** @type {any[]} */ keys) =>
          keys.length
            ? html`<div class="table-scroll">
                <table>
                  <thead>
                    <tr><th>${t("settings.keyName")}</th><th>${t("settings.role")}</th><th>${t("settings.expires")}</th><th>${t("settings.used")}</th><th>${t("settings.by")}</th><th><span class="visually-hidden">${t("keys.delete")}</span></th></tr>
                  </thead>
                  <tbody>
                    ${keys.map(
                      (one) => html`<tr key=${one.name}>
                        <td class="path">${one.displayName}</td>
                        <td>${t(`role.${one.role}`)}</td>
                        <td>${one.expireTime ? when(one.expireTime) : t("keys.never")}</td>
                        <td>${one.lastUseTime ? when(one.lastUseTime) : "–"}</td>
                        <td class="muted path">${one.creator} · ${when(one.createTime)}</td>
                        <td class="end"><${Button} kind="quiet" icon="bin" label=${`${t("keys.delete")}: ${one.displayName}`} onClick=${() => setDeleting(one)} /></td>
                      </tr>`,
                    )}
                  </tbody>
                </table>
              </div>`
            : html`<${Empty} text=${t("keys.empty")} />`}
      <//>
    <//>
    ${deleting &&
    html`<${Confirm}
      title=${t("keys.delete")}
      question=${t("keys.deleteQuestion", { name: deleting.displayName })}
      act=${() => call("DELETE", `/v1/${deleting.name}`)}
      onDone=${state.reload}
      onClose=${() => setDeleting(null)}
    />`}`;
}

/** @param {{parent: string, onChange: () => void}} props */
function Create({ parent, onChange }) {
  const [name, setName] = useState("");
  const [role, setRole] = useState("VIEWER");
  const [days, setDays] = useState("90");
  const [made, setMade] = useState(/** @type {any} */ (null));
  const { busy, error, act } = useAct();
  const create = (/** @type {Event} */ event) => {
    event.preventDefault();
    act(async () => {
      const expireTime = days ? new Date(Date.now() + Number(days) * DAY_MS).toISOString() : undefined;
      setMade(await call("POST", `/v1/${parent}/apiKeys`, { body: { displayName: name.trim(), role, expireTime } }));
      setName("");
      onChange();
    });
  };
  return html`<${Card} title=${t("keys.new")}>
    <form class="stack" onSubmit=${create}>
      <div class="fields">
        <${Field} label=${t("keys.purpose")} for="key-name">
          <input id="key-name" maxlength="63" value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} />
        <//>
        <${RoleSelect} id="key-role" value=${role} onChange=${setRole} />
        <${Field} label=${t("settings.expires")} for="key-days">
          <select id="key-days" value=${days} onChange=${(/** @type {any} */ event) => setDays(event.target.value)}>
            ${DAYS.map((one) => html`<option value=${String(one)}>${t("keys.days", { days: one })}</option>`)}
            <option value="">${t("keys.never")}</option>
          </select>
        <//>
      </div>
      ${error && html`<${Problem} error=${error} />`}
      <div class="row"><${Button} kind="primary" icon="plus" type="submit" busy=${busy} disabled=${!name.trim()}>${t("action.create")}<//></div>
    </form>
    ${made && html`<${Secret} title=${t("keys.made", { name: made.displayName })} value=${made.token} onClose=${() => setMade(null)} />`}
  <//>`;
}
