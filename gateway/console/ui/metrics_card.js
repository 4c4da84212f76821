// The figures of a trained model.
import { html, useState } from "../vendor/preact.js";
import { get } from "../api/http.js";
import { t } from "../i18n/texts.js";
import { count, percent } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { language } from "../state/preferences.js";
import { Button, Card, Figure, Loaded, SplitSwitch } from "./parts.js";

/** @param {{training: string, onMore: () => void}} props */
export function MetricsCard({ training, onMore }) {
  const state = useLoad((signal) => get(`/v1/${training}/evaluations`, {}, signal), [training]);
  const [split, setSplit] = useState("test");
  return html`<${Card}
    title=${t("metrics.title")}
    actions=${html`
      <${SplitSwitch} split=${split} onChoose=${setSplit} />
      <a class="button plain" href=${`/v1/${training}:report?language=${language.value}`} target="_blank" rel="noopener">${t("metrics.report")}</a>
      <${Button} onClick=${onMore}>${t("metrics.more")}<//>
    `}
  >
    <${Loaded} state=${state}>
      ${(/** @type {any} */ data) => {
        const one = data.evaluations.find((/** @type {any} */ e) => e.split === `SPLIT_${split.toUpperCase()}`);
        if (!one || !one.coco) return html`<p class="muted">${one?.failure?.status?.message ?? t("metrics.none")}</p>`;
        return html`
          <div class="figures">
            <${Figure} label=${t("metrics.map")} value=${percent(one.coco.map50)} detail=${`mAP50-95 ${percent(one.coco.map5095)}`} help="metrics.map.help" />
            <${Figure} label=${t("metrics.precision")} value=${percent(one.bestF1?.precision)} help="metrics.precision.help" />
            <${Figure} label=${t("metrics.recall")} value=${percent(one.bestF1?.recall)} help="metrics.recall.help" />
          </div>
          <p class="muted small">
            ${t("metrics.on", { images: count(one.numImages), boxes: count(one.numGroundTruths), threshold: (one.bestF1?.confidenceThreshold ?? 0).toFixed(2) })}
          </p>
        `;
      }}
    <//>
  <//>`;
}
