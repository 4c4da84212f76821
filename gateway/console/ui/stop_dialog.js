// How a training is stopped.
import { html } from "../vendor/preact.js";
import "../i18n/pages.js";
import { t } from "../i18n/texts.js";
import { Button, Dialog, Problem } from "./parts.js";

const MODES = ["PAUSE", "FINISH", "DISCARD"].map((one) => `STOP_MODE_${one}`);

/** @param {{busy: boolean, error: any, onStop: (mode: string) => void, onClose: () => void}} props */
export function StopDialog({ busy, error, onStop, onClose }) {
  return html`<${Dialog} title=${t("stop.title")} onClose=${onClose}>
    <div class="stack-small">
      ${MODES.map(
        (mode) => html`<button type="button" class="choice" disabled=${busy} onClick=${() => onStop(mode)}>
          <strong>${t(`stop.${mode}`)}</strong>
          <span class="muted">${t(`stop.${mode}.help`)}</span>
        </button>`,
      )}
    </div>
    ${error && html`<${Problem} error=${error} />`}
    <div class="dialog-actions"><${Button} onClick=${onClose}>${t("action.cancel")}<//></div>
  <//>`;
}
