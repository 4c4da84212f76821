// The settings of a project: its name and limits, and for admins who may use it and who is told of what.
import { html, useState } from "../vendor/preact.js";
import { call, get } from "../api/http.js";
import { go } from "../router.js";
import "../i18n/pages.js";
import "../i18n/settings.js";
import { t } from "../i18n/texts.js";
import { bytes, idOf, when } from "../i18n/format.js";
import { useAct } from "../state/act.js";
import { useLoad } from "../state/load.js";
import { may } from "../state/session.js";
import { renames, say } from "../state/status.js";
import { Later } from "../ui/later.js";
import { Button, Card, Empty, Field, Loaded, Problem, Progress, Tabs } from "../ui/parts.js";

/** What admins see, each loaded when it is opened. @type {Record<string, () => Promise<any>>} */
const PARTS = {
  keys: () => import("./keys.js"),
  members: () => import("./members.js"),
  webhooks: () => import("./webhooks.js"),
  audit: () => import("./audit.js"),
};

/** @param {{project: string, tab?: string}} props */
export function Page({ project, tab = "general" }) {
  const tabs = ["general", ...Object.keys(PARTS)].map((id) => ({ id, label: t(`settings.${id}`) }));
  return html`<div class="page stack">
    <h1>${t("nav.settings")}</h1>
    <${Tabs} tabs=${tabs} current=${tab} label=${t("nav.settings")} onChoose=${(/** @type {string} */ id) => go(`/p/${project}/settings${id === "general" ? "" : `/${id}`}`)} />
    ${tab === "general"
      ? html`<${General} key=${project} project=${project} />`
      : !PARTS[tab]
        ? html`<${Empty} text=${t("error.noPage")} />`
        : may("ADMIN")
          ? html`<${Later} key=${tab} load=${PARTS[tab]} name="Part" parent=${`projects/${project}`} />`
          : html`<${Empty} text=${`${t("role.needs", { role: t("role.ADMIN") })}.`} />`}
  </div>`;
}

/** @param {{project: string}} props */
function General({ project }) {
  const state = useLoad((signal) => get(`/v1/projects/${project}`, {}, signal), [project]);
  return html`<${Loaded} state=${state}>
    ${(/** @type {any} */ data) => html`<${Name} data=${data} onChange=${state.reload} /><${Limits} data=${data} onChange=${state.reload} />`}
  <//>`;
}

/** Sends changes of a project, and what became of that. @param {any} data @param {() => void} onChange */
function useUpdate(data, onChange) {
  const { busy, error, act } = useAct();
  const update = (/** @type {string} */ updateMask, /** @type {any} */ body) =>
    act(async () => {
      await call("PATCH", `/v1/${data.name}`, { query: { updateMask }, body });
      say(t("settings.saved"));
      onChange();
    });
  return { busy, error, update };
}

/** @param {{data: any, onChange: () => void}} props */
function Name({ data, onChange }) {
  const [name, setName] = useState(data.displayName);
  const { busy, error, update } = useUpdate(data, () => {
    renames.value += 1;
    onChange();
  });
  const save = (/** @type {Event} */ event) => {
    event.preventDefault();
    update("displayName", { displayName: name.trim() });
  };
  return html`<${Card} title=${t("settings.project")}>
    <form class="stack" onSubmit=${save}>
      <${Field} label=${t("settings.name")} hint=${t("settings.id", { id: idOf(data.name), time: when(data.createTime) })} for="project-name">
        <input id="project-name" required maxlength="63" disabled=${!may("ADMIN")} value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} />
      <//>
      ${error && html`<${Problem} error=${error} />`}
      <div class="row"><${Button} kind="primary" type="submit" needs="ADMIN" busy=${busy} disabled=${name.trim() === data.displayName}>${t("action.save")}<//></div>
    </form>
  <//>`;
}

/** How much is stored, of how much. @param {{project: string}} props */
function Usage({ project }) {
  const state = useLoad((signal) => get(`/v1/${project}/storageUsage`, {}, signal), [project]);
  return html`<${Loaded} state=${state} lines=${1}>
    ${(/** @type {any} */ data) => {
      const parts = [data.datasetBytes, data.bundleBytes, data.uploadBytes].map(Number);
      const used = parts.reduce((sum, one) => sum + one, 0);
      const limit = Number(data.maxStorageBytes);
      return html`<div class="stack-small">
        <div class="row spread number">
          <span>${t("settings.used.storage")} <strong>${bytes(used)}</strong>${limit > 0 && ` / ${bytes(limit)}`}</span>
          <span class="muted small">${t("settings.parts", { datasets: bytes(parts[0]), versions: bytes(parts[1]), uploads: bytes(parts[2]) })}</span>
        </div>
        ${limit > 0 && html`<${Progress} value=${Math.min(100, (100 * used) / limit)} label=${t("settings.used.storage")} />`}
      </div>`;
    }}
  <//>`;
}

const GIB = 2 ** 30;

/** Limits protect the installation: who may set them is admin of all projects. @param {{data: any, onChange: () => void}} props */
function Limits({ data, onChange }) {
  const quota = data.quota ?? {};
  const [storage, setStorage] = useState(String(Number(quota.maxStorageBytes ?? 0) / GIB || ""));
  const [trainings, setTrainings] = useState(String(quota.maxRunningTrainings || ""));
  const { busy, error, update } = useUpdate(data, onChange);
  const fixed = !may("ADMIN", "-");
  const save = (/** @type {Event} */ event) => {
    event.preventDefault();
    update("quota", { quota: { maxStorageBytes: String(Math.round(Number(storage) * GIB)), maxRunningTrainings: Number(trainings) } });
  };
  return html`<${Card} title=${t("settings.limits")}>
    <form class="stack" onSubmit=${save}>
      <${Usage} project=${data.name} />
      <p class="muted small">${t("settings.limits.help")}</p>
      <div class="columns">
        <${Field} label=${t("settings.storage")} for="max-storage">
          <input id="max-storage" type="number" min="0" step="any" disabled=${fixed} placeholder=${t("settings.unlimited")} value=${storage} onInput=${(/** @type {any} */ event) => setStorage(event.target.value)} />
        <//>
        <${Field} label=${t("settings.trainings")} for="max-trainings">
          <input id="max-trainings" type="number" min="0" step="1" disabled=${fixed} placeholder=${t("settings.unlimited")} value=${trainings} onInput=${(/** @type {any} */ event) => setTrainings(event.target.value)} />
        <//>
      </div>
      ${error && html`<${Problem} error=${error} />`}
      ${fixed
        ? html`<p class="muted small">${t("settings.limits.fixed")}</p>`
        : html`<div class="row"><${Button} kind="primary" type="submit" busy=${busy}>${t("action.save")}<//></div>`}
    </form>
  <//>`;
}
