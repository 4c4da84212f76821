// Webhooks of a project: who is told when a training ends.
import { html, useState } from "../vendor/preact.js";
import { all, call, get, newRequestId } from "../api/http.js";
import "../i18n/pages.js";
import "../i18n/settings.js";
import { t } from "../i18n/texts.js";
import { when } from "../i18n/format.js";
import { useAct } from "../state/act.js";
import { useLoad } from "../state/load.js";
import { Confirm, Secret } from "../ui/access_parts.js";
import { Button, Card, Chip, Empty, Field, Loaded, Problem } from "../ui/parts.js";

const EVENTS = ["TRAINING_COMPLETED", "TRAINING_FAILED", "TRAINING_STOPPED"];
const TONES = { PENDING: "warn", DELIVERED: "ok", FAILED: "bad" };
const SHOWN_DELIVERIES = 20;

/** @param {{parent: string}} props */
export function Part({ parent }) {
  const state = useLoad((signal) => all(`/v1/${parent}/webhooks`, "webhooks", {}, signal), [parent]);
  const [secret, setSecret] = useState(/** @type {any} */ (null));
  return html`<${Create} parent=${parent} onMade=${setSecret} onChange=${state.reload} />
    <${Loaded} state=${state}>
      ${(/** @type {any[]} */ found) =>
        found.length
          ? found.map((one) => html`<${Webhook} key=${one.name} one=${one} onSecret=${setSecret} onChange=${state.reload} />`)
          : html`<${Empty} text=${t("webhooks.empty")} />`}
    <//>
    ${secret && html`<${Secret} title=${t("webhooks.secret", { name: nameOf(secret) })} value=${secret.secret} onClose=${() => setSecret(null)} />`}`;
}

/** @param {any} webhook */
const nameOf = (webhook) => webhook.displayName || webhook.url;

/** @param {{chosen: string[], onChange: (chosen: string[]) => void}} props */
function Events({ chosen, onChange }) {
  return html`<fieldset class="row">
    <legend class="visually-hidden">${t("webhooks.on")}</legend>
    ${EVENTS.map(
      (one) => html`<label class="check">
        <input type="checkbox" checked=${chosen.includes(one)} onChange=${() => onChange(chosen.includes(one) ? chosen.filter((other) => other !== one) : [...chosen, one])} />
        ${t(`webhooks.${one}`)}
      </label>`,
    )}
  </fieldset>`;
}

/** @param {{parent: string, onMade: (webhook: any) => void, onChange: () => void}} props */
function Create({ parent, onMade, onChange }) {
  const [url, setUrl] = useState("");
  const [name, setName] = useState("");
  const [events, setEvents] = useState(EVENTS);
  const { busy, error, act } = useAct();
  const create = (/** @type {Event} */ event) => {
    event.preventDefault();
    act(async () => {
      const body = { url: url.trim(), displayName: name.trim(), eventTypes: events };
      onMade(await call("POST", `/v1/${parent}/webhooks`, { query: { requestId: newRequestId() }, body }));
      setUrl("");
      setName("");
      onChange();
    });
  };
  return html`<${Card} title=${t("webhooks.new")}>
    <form class="stack" onSubmit=${create}>
      <p class="muted small">${t("webhooks.help")}</p>
      <div class="columns wide-left">
        <${Field} label=${t("webhooks.name")} for="webhook-name">
          <input id="webhook-name" maxlength="63" value=${name} onInput=${(/** @type {any} */ event) => setName(event.target.value)} />
        <//>
        <${Field} label=${t("webhooks.url")} for="webhook-url">
          <input id="webhook-url" type="url" maxlength="2048" placeholder="https://" value=${url} onInput=${(/** @type {any} */ event) => setUrl(event.target.value)} />
        <//>
      </div>
      <${Events} chosen=${events} onChange=${setEvents} />
      ${error && html`<${Problem} error=${error} />`}
      <div class="row"><${Button} kind="primary" icon="plus" type="submit" busy=${busy} disabled=${!url.trim() || !events.length}>${t("action.create")}<//></div>
    </form>
  <//>`;
}

/** @param {{one: any, onSecret: (webhook: any) => void, onChange: () => void}} props */
function Webhook({ one, onSecret, onChange }) {
  const [asking, setAsking] = useState("");
  const { busy, error, act } = useAct();
  const [tried, setTried] = useState(/** @type {any} */ (null));
  const [opened, open] = useState(false);
  const test = () => act(async () => setTried(await call("POST", `/v1/${one.name}:test`, { body: {} })), "test");
  const turn = () =>
    act(async () => {
      await call("PATCH", `/v1/${one.name}`, { query: { updateMask: "disabled" }, body: { disabled: !one.disabled } });
      onChange();
    }, "turn");
  const types = one.eventTypes?.length ? one.eventTypes : EVENTS;
  return html`<${Card}
    title=${html`<span class="row path">${nameOf(one)} <${Chip} tone=${one.disabled ? "" : "ok"}>${t(one.disabled ? "webhooks.disabled" : "webhooks.enabled")}<//></span>`}
    actions=${html`
      <${Button} busy=${busy === "test"} onClick=${test}>${t("webhooks.test")}<//>
      <${Button} busy=${busy === "turn"} onClick=${turn}>${t(one.disabled ? "webhooks.enable" : "webhooks.disable")}<//>
      <${Button} onClick=${() => setAsking("rotate")}>${t("webhooks.rotate")}<//>
      <${Button} kind="quiet" icon="bin" label=${`${t("webhooks.delete")}: ${nameOf(one)}`} onClick=${() => setAsking("delete")} />
    `}
  >
    <p class="path mono">${one.url}</p>
    <p class="muted small">${t("webhooks.on")}: ${types.map((/** @type {string} */ type) => t(`webhooks.${type}`)).join(", ")} · ${when(one.createTime)}</p>
    ${error && html`<${Problem} error=${error} />`}
    ${tried && html`<p role="status"><${Outcome} delivery=${tried} /></p>`}
    <details onToggle=${(/** @type {any} */ event) => open(event.currentTarget.open)}>
      <summary>${t("webhooks.deliveries")}</summary>
      ${opened && html`<${Deliveries} name=${one.name} again=${tried?.id} />`}
    </details>
    ${asking === "delete" &&
    html`<${Confirm} title=${t("webhooks.delete")} question=${t("webhooks.deleteQuestion", { name: nameOf(one) })} act=${() => call("DELETE", `/v1/${one.name}`)} onDone=${onChange} onClose=${() => setAsking("")} />`}
    ${asking === "rotate" &&
    html`<${Confirm}
      title=${t("webhooks.rotate")}
      question=${t("webhooks.rotateQuestion")}
      act=${async () => onSecret(await call("POST", `/v1/${one.name}:rotateSecret`, { body: {} }))}
      onDone=${onChange}
      onClose=${() => setAsking("")}
    />`}
  <//>`;
}

/** How a message fared. @param {{delivery: any}} props */
function Outcome({ delivery }) {
  return html`<${Chip} tone=${TONES[/** @type {keyof typeof TONES} */ (delivery.state)]}>${t(`webhooks.${delivery.state}`)}<//>
    <span class="small">${delivery.httpStatus > 0 && ` HTTP ${delivery.httpStatus}`} <span class="muted path">${delivery.error}</span></span>`;
}

/** @param {{name: string, again?: string}} props `again` reads them again when it changes */
function Deliveries({ name, again }) {
  const state = useLoad((signal) => get(`/v1/${name}/deliveries`, { pageSize: SHOWN_DELIVERIES }, signal), [name, again]);
  return html`<${Loaded} state=${state}>
    ${(/** @type {any} */ data) =>
      data.deliveries.length
        ? html`<div class="table-scroll">
            <table class="small">
              <thead><tr><th>${t("webhooks.time")}</th><th>${t("webhooks.what")}</th><th>${t("webhooks.tries")}</th><th>${t("webhooks.outcome")}</th></tr></thead>
              <tbody>
                ${data.deliveries.map(
                  (/** @type {any} */ one) => html`<tr key=${one.id}>
                    <td class="number">${when(one.createTime)}</td>
                    <td>${one.test ? t("webhooks.isTest") : t(`webhooks.${one.eventType}`)}</td>
                    <td class="number">${one.numTries}</td>
                    <td><${Outcome} delivery=${one} />${one.nextTryTime && one.state === "PENDING" && html`<span class="muted small"> ${t("webhooks.next", { time: when(one.nextTryTime) })}</span>`}</td>
                  </tr>`,
                )}
              </tbody>
            </table>
          </div>`
        : html`<p class="muted small">${t("webhooks.none")}</p>`}
  <//>`;
}
