// Members of a project: people with one role each.
import { html, useState } from "../vendor/preact.js";
import { all, call } from "../api/http.js";
import "../i18n/settings.js";
import { t } from "../i18n/texts.js";
import { when } from "../i18n/format.js";
import { useAct } from "../state/act.js";
import { useLoad } from "../state/load.js";
import { say } from "../state/status.js";
import { Confirm, RoleSelect } from "../ui/access_parts.js";
import { Button, Card, Empty, Field, Loaded, Problem } from "../ui/parts.js";

/** @param {{parent: string}} props */
export function Part({ parent }) {
  const state = useLoad((signal) => all(`/v1/${parent}/members`, "members", {}, signal), [parent]);
  const [removing, setRemoving] = useState(/** @type {any} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  const change = async (/** @type {any} */ member, /** @type {string} */ role) => {
    setError(null);
    try {
      await call("PATCH", `/v1/${member.name}`, { query: { updateMask: "role" }, body: { user: member.user, role } });
      say(t("settings.saved"));
    } catch (caught) {
      setError(caught);
    }
    state.reload();
  };
  return html`<${Add} parent=${parent} onChange=${state.reload} />
    <${Card} title=${t("settings.members")}>
      ${error && html`<${Problem} error=${error} />`}
      <${Loaded} state=${state}>
        ${(/** @type {any[]} */ members) =>
          members.length
            ? html`<div class="table-scroll">
                <table>
                  <thead><tr><th>${t("members.user")}</th><th>${t("settings.role")}</th><th>${t("settings.by")}</th><th><span class="visually-hidden">${t("members.remove")}</span></th></tr></thead>
                  <tbody>
                    ${members.map(
                      (one) => html`<tr key=${one.name}>
                        <td class="path">${one.user}</td>
                        <td><${RoleSelect} id=${`role-${one.name.split("/").at(-1)}`} label=${html`<span class="visually-hidden">${t("members.roleOf", { user: one.user })}</span>`} value=${one.role} onChange=${(/** @type {string} */ role) => change(one, role)} /></td>
                        <td class="muted path">${one.creator} · ${when(one.createTime)}</td>
                        <td class="end"><${Button} kind="quiet" icon="bin" label=${`${t("members.remove")}: ${one.user}`} onClick=${() => setRemoving(one)} /></td>
                      </tr>`,
                    )}
                  </tbody>
                </table>
              </div>`
            : html`<${Empty} text=${t("members.empty")} />`}
      <//>
    <//>
    ${removing &&
    html`<${Confirm}
      title=${t("members.remove")}
      question=${t("members.removeQuestion", { user: removing.user })}
      act=${() => call("DELETE", `/v1/${removing.name}`)}
      onDone=${state.reload}
      onClose=${() => setRemoving(null)}
    />`}`;
}

/** @param {{parent: string, onChange: () => void}} props */
function Add({ parent, onChange }) {
  const [user, setUser] = useState("");
  const [role, setRole] = useState("VIEWER");
  const { busy, error, act } = useAct();
  const add = (/** @type {Event} */ event) => {
    event.preventDefault();
    act(async () => {
      await call("POST", `/v1/${parent}/members`, { body: { user: user.trim(), role } });
      say(t("members.added", { user: user.trim() }));
      setUser("");
      onChange();
    });
  };
  return html`<${Card} title=${t("members.new")}>
    <form class="stack" onSubmit=${add}>
      <div class="columns">
        <${Field} label=${t("members.user")} hint=${t("members.userHint")} for="member-user">
          <input id="member-user" maxlength="254" autocomplete="off" value=${user} onInput=${(/** @type {any} */ event) => setUser(event.target.value)} />
        <//>
        <${RoleSelect} id="member-role" value=${role} onChange=${setRole} />
      </div>
      ${error && html`<${Problem} error=${error} />`}
      <div class="row"><${Button} kind="primary" icon="plus" type="submit" busy=${busy} disabled=${!user.trim()}>${t("members.add")}<//></div>
    </form>
  <//>`;
}
