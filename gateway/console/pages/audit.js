// Who did what in a project, newest first.
import { html, useEffect, useState } from "../vendor/preact.js";
import { get } from "../api/http.js";
import "../i18n/settings.js";
import { t } from "../i18n/texts.js";
import { when } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { Button, Card, Chip, Empty, Field, Loaded } from "../ui/parts.js";

const PAGE_SIZE = 50;
// google.rpc.Code by number, as far as it has a text of its own.
const CODES = ["OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"];

/** @param {{parent: string}} props */
export function Part({ parent }) {
  const [subject, setSubject] = useState("");
  const [wanted, setWanted] = useState("");
  // Tokens of the pages up to the one that is shown.
  const [tokens, setTokens] = useState([""]);
  useEffect(() => {
    const timer = setTimeout(() => {
      setWanted(subject.trim());
      setTokens([""]);
    }, 400);
    return () => clearTimeout(timer);
  }, [subject]);
  const query = { pageSize: PAGE_SIZE, subject: wanted, pageToken: tokens[tokens.length - 1] };
  const state = useLoad((signal) => get(`/v1/${parent}/auditEntries`, query, signal), [parent, query]);
  return html`<${Card} title=${t("settings.audit")} actions=${html`<${Button} icon="restore" onClick=${state.reload}>${t("audit.reload")}<//>`}>
    <${Field} label=${t("audit.subject")} hint=${t("audit.subjectHint")} for="audit-subject">
      <input id="audit-subject" type="search" maxlength="512" value=${subject} onInput=${(/** @type {any} */ event) => setSubject(event.target.value)} />
    <//>
    <${Loaded} state=${state} lines=${6}>
      ${(/** @type {any} */ data) => html`
        ${data.auditEntries.length
          ? html`<div class="table-scroll">
              <table class="small">
                <thead><tr><th>${t("audit.time")}</th><th>${t("audit.who")}</th><th>${t("audit.what")}</th><th>${t("audit.on")}</th><th>${t("audit.outcome")}</th></tr></thead>
                <tbody>${data.auditEntries.map((/** @type {any} */ one) => html`<${Entry} key=${one.id} one=${one} onSubject=${setSubject} />`)}</tbody>
              </table>
            </div>`
          : html`<${Empty} text=${t("audit.empty")} />`}
        <div class="row">
          <${Button} icon="left" disabled=${tokens.length < 2} onClick=${() => setTokens(tokens.slice(0, -1))}>${t("audit.newer")}<//>
          <${Button} icon="right" disabled=${!data.nextPageToken} onClick=${() => setTokens([...tokens, data.nextPageToken])}>${t("audit.older")}<//>
        </div>
      `}
    <//>
  <//>`;
}

/** @param {{one: any, onSubject: (subject: string) => void}} props */
function Entry({ one, onSubject }) {
  const code = CODES[one.code] ?? "UNKNOWN";
  return html`<tr>
    <td class="number">${when(one.createTime)}</td>
    <td><button type="button" class="link path" title=${t("audit.only", { subject: one.subject })} onClick=${() => onSubject(one.subject)}>${one.subject}</button></td>
    <td>${one.method.slice(one.method.lastIndexOf("/") + 1)}</td>
    <td class="path mono">${one.resource}</td>
    <td title=${`${t("error.requestId")} ${one.requestId} · ${one.peer}`}>
      ${one.done ? html`<${Chip} tone=${one.code ? "bad" : "ok"}>${one.code ? t(`error.${code}`) || code : t("audit.ok")}<//>` : html`<${Chip} tone="warn">${t("audit.open")}<//>`}
    </td>
  </tr>`;
}
