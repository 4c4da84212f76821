// The system: whether every service is up, and what waits and runs.
import { html } from "../vendor/preact.js";
import { all } from "../api/http.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { idOf } from "../i18n/format.js";
import { useEvery, useLoad } from "../state/load.js";
import { TONES } from "../state/versions.js";
import { Card, Chip, Empty, Loaded } from "../ui/parts.js";

const REFRESH_SECONDS = 5;
const BUSY = 'state = PREPROCESSING OR state = QUEUED OR state = PROVISIONING OR state = TRAINING OR state = EVALUATING';

export function Page() {
  // Not through `get`: a 503 with the state of each service is an answer too.
  const health = useLoad(async (signal) => (await fetch("/readyz", { signal })).json(), []);
  const work = useLoad(async (signal) => {
    const projects = await all("/v1/projects", "projects", {}, signal);
    const lists = await Promise.all(projects.map((one) => all(`/v1/${one.name}/versions`, "versions", { filter: BUSY }, signal)));
    return lists.flat();
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
        ${(/** @type {any[]} */ found) =>
          found.length
            ? html`<ul class="stack-small">
                ${found.map((one) => {
                  const project = one.name.split("/")[1];
                  return html`<li class="row">
                    <${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (one.state)]}>${t(`state.${one.state}`)}<//>
                    <a href=${`/p/${project}/train/${idOf(one.name)}`}>${one.displayName}</a>
                    <span class="muted small">${project}</span>
                  </li>`;
                })}
              </ul>`
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
