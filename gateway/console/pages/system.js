// The system: whether every service is up, and what waits and runs.
import { html } from "../vendor/preact.js";
import { all, get } from "../api/http.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { count, idOf } from "../i18n/format.js";
import { useEvery, useLoad } from "../state/load.js";
import { TONES, isLive } from "../state/versions.js";
import { Card, Chip, Empty, Loaded } from "../ui/parts.js";

const REFRESH_SECONDS = 5;
const BUSY = 'state = PREPROCESSING OR state = QUEUED OR state = PROVISIONING OR state = TRAINING OR state = EVALUATING';

export function Page() {
  // Not through `get`: a 503 with the state of each service is an answer too.
  const health = useLoad(async (signal) => (await fetch("/readyz", { signal })).json(), []);
  const work = useLoad(async (signal) => {
    const projects = await all("/v1/projects", "projects", {}, signal);
    const lists = await Promise.all(projects.map((one) => all(`/v1/${one.name}/versions`, "versions", { filter: BUSY }, signal)));
    const found = await Promise.all(lists.flat().map(async (version) => ({ version, training: await trainingOf(version, signal) })));
    return found.sort((a, b) => placeOf(a) - placeOf(b));
  }, []);
  useEvery(() => {
    health.reload();
    work.reload();
  }, REFRESH_SECONDS);
  return html`<div class="page stack">
    <h1>${t("nav.system")}</h1>
    <${Card} title=${t("system.services")}>
      <${Loaded} state=${health}>
        ${(/** @type {any} */ data) => html`<ul class="row">
          ${Object.entries(data.services ?? {}).map(([name, state]) => html`<li><${Chip} tone=${state === "SERVING" ? "ok" : "bad"}>${name}: ${t(`system.${state}`) || state}<//></li>`)}
        </ul>`}
      <//>
    <//>
    <${Card} title=${t("system.work")}>
      <${Loaded} state=${work}>
        ${(/** @type {{version: any, training: any}[]} */ found) =>
          found.length
            ? html`<div class="table-scroll">
                <table>
                  <thead>
                    <tr><th>${t("system.state")}</th><th>${t("system.version")}</th><th>${t("system.project")}</th><th>${t("system.model")}</th><th>${t("system.where")}</th><th>${t("system.device")}</th></tr>
                  </thead>
                  <tbody>${found.map((one) => html`<${Work} key=${one.version.name} ...${one} />`)}</tbody>
                </table>
              </div>`
            : html`<${Empty} text=${t("system.idle")} />`}
      <//>
    <//>
    <${Card} title=${t("system.more")}>
      <ul class="row">
        <li><a href="/docs" target="_blank" rel="noopener">${t("system.docs")}</a></li>
        <li><a href="/openapi.json" target="_blank" rel="noopener">OpenAPI</a></li>
        <li><a href="/metrics" target="_blank" rel="noopener">Prometheus</a></li>
      </ul>
    <//>
  </div>`;
}

/** @param {any} version @param {AbortSignal} signal */
const trainingOf = (version, signal) => (isLive(version.state) && version.training ? get(`/v1/${version.training}`, {}, signal) : null);

/** What runs comes before what waits, in the order of the queue. @param {{training: any}} one */
const placeOf = ({ training }) => training?.queuePosition ?? 0;

/** @param {{version: any, training: any}} props */
function Work({ version, training }) {
  const project = version.name.split("/")[1];
  const { numNodes = 1, numDevicesPerNode = 1 } = training?.resources ?? {};
  const numDevices = Math.max(1, numNodes) * Math.max(1, numDevicesPerNode);
  return html`<tr>
    <td><${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (version.state)]}>${t(`state.${version.state}`)}<//></td>
    <td class="path"><a href=${`/p/${project}/train/${idOf(version.name)}`}>${version.displayName}</a></td>
    <td class="muted">${project}</td>
    <td>${training?.model ?? "–"}</td>
    <td class="number">
      ${!training
        ? "–"
        : training.queuePosition
          ? `${t("progress.queue", { position: training.queuePosition })}${training.priority ? ` · ${t("system.priority", { priority: training.priority })}` : ""}`
          : t("progress.epoch", { epoch: count(training.numEpochsDone), total: count(training.epochs) })}
    </td>
    <td>${training?.preflight?.device ? `${numDevices > 1 ? `${numDevices} × ` : ""}${training.preflight.device}` : "–"}</td>
  </tr>`;
}
