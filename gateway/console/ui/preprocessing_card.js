// How far preprocessing is.
import { html, useEffect, useState } from "../vendor/preact.js";
import { watch } from "../api/stream.js";
import { t } from "../i18n/texts.js";
import { count } from "../i18n/format.js";
import { Card, Chip, Progress } from "./parts.js";
import { Times } from "./progress_card.js";

/** @param {{version: any, onLink: (open: boolean) => void, onChange: () => void}} props */
export function PreprocessingCard({ version, onLink, onChange }) {
  const [progress, setProgress] = useState(/** @type {any} */ (null));
  useEffect(
    () =>
      watch(`/v1/${version.name}/preprocessing:watch`, {
        on: { preprocessing: () => {}, progress: (message) => setProgress(message.progress) },
        newest: ["progress"],
        onLink,
        onEnd: onChange,
        onError: onChange,
      }),
    [version.name],
  );
  return html`<${Card} title=${t("preprocessing.title")}>
    <div class="row spread">
      <${Chip} tone="warn">${t("state.PREPROCESSING")}<//>
      ${progress &&
      html`<span class="muted number">
        ${t("preprocessing.images", { done: count(progress.numDone), total: count(progress.numTotal) })} ·
        <strong>${Math.floor(progress.percent)}%</strong>
      </span>`}
    </div>
    <${Progress} value=${progress?.percent} label=${t("preprocessing.title")} />
    ${progress && html`<${Times} elapsed=${progress.elapsedSeconds} eta=${progress.etaSeconds} />`}
  <//>`;
}
