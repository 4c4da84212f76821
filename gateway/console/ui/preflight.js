// What was tried on the real data before a training began.
import { html } from "../vendor/preact.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";

/** @param {{checks: any[]}} props */
export function Checks({ checks }) {
  return html`<div class="table-scroll">
    <table class="small">
      <tbody>
        ${checks.map((one) => html`<tr><td>${t(`preflight.${one.name}`) || one.name}</td><td>${one.detail}</td></tr>`)}
      </tbody>
    </table>
  </div>`;
}
