// What the pages about access share: secrets that are shown once, roles, and questions before something is deleted.
import { html, useState } from "../vendor/preact.js";
import "../i18n/pages.js";
import "../i18n/settings.js";
import { t } from "../i18n/texts.js";
import { may } from "../state/session.js";
import { say } from "../state/status.js";
import { Button, Dialog, Field, Problem } from "./parts.js";

const ROLES = ["VIEWER", "EDITOR", "ADMIN"];

/** A role in the project; nobody gives a higher one than the own. @param {any} props */
export function RoleSelect({ id, value, onChange, label = t("settings.role") }) {
  return html`<${Field} label=${label} for=${id}>
    <select id=${id} value=${value} onChange=${(/** @type {any} */ event) => onChange(event.target.value)}>
      ${ROLES.filter((one) => may(/** @type {any} */ (one))).map((one) => html`<option value=${one} selected=${one === value}>${t(`role.${one}`)} · ${t(`role.${one}.help`)}</option>`)}
    </select>
  <//>`;
}

/**
 * A secret that is shown this once.
 *
 * @param {{title: string, value: string, onClose: () => void}} props
 */
export function Secret({ title, value, onClose }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    // The clipboard is there on https and on this machine only; elsewhere the marked text is copied by hand.
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(value);
      setCopied(true);
      say(t("secret.copied"));
    } else getSelection()?.selectAllChildren(/** @type {Node} */ (document.getElementById("secret")));
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <p>${t("secret.once")}</p>
    <pre class="command" id="secret" tabindex="0">${value}</pre>
    <div class="dialog-actions">
      <${Button} icon=${copied ? "check" : undefined} onClick=${copy}>${t(copied ? "secret.copied" : "secret.copy")}<//>
      <${Button} kind="primary" onClick=${onClose}>${t("secret.kept")}<//>
    </div>
  <//>`;
}

/**
 * Asks before something that cannot be undone.
 *
 * @param {{title: string, question: string, act: () => Promise<any>, onDone: () => void, onClose: () => void}} props
 */
export function Confirm({ title, question, act, onDone, onClose }) {
  const [error, setError] = useState(/** @type {any} */ (null));
  const [busy, setBusy] = useState(false);
  const agree = async () => {
    setBusy(true);
    try {
      await act();
      onClose();
      onDone();
    } catch (caught) {
      setError(caught);
      setBusy(false);
    }
  };
  return html`<${Dialog} title=${title} onClose=${onClose}>
    <p>${question}</p>
    ${error && html`<${Problem} error=${error} />`}
    <div class="dialog-actions">
      <button type="button" class="button plain" autofocus onClick=${onClose}>${t("action.cancel")}</button>
      <${Button} kind="danger" busy=${busy} onClick=${agree}>${t("action.yes")}<//>
    </div>
  <//>`;
}
