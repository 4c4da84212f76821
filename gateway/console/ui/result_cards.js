// What came of a training: its figures, and its curves.
import { html, useState } from "../vendor/preact.js";
import { get } from "../api/http.js";
import { t } from "../i18n/texts.js";
import { count, percent } from "../i18n/format.js";
import { useLoad } from "../state/load.js";
import { language } from "../state/preferences.js";
import { Chart } from "../vision/chart.js";
import { Button, Card, Figure, Loaded, SplitSwitch } from "./parts.js";

/** @param {string} key */
const paragraphs = (key) => t(key).split("\n").map((text) => html`<p>${text}</p>`);

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
            <${Figure} label=${t("metrics.map")} value=${percent(one.coco.map50)} detail=${`mAP50-95 ${percent(one.coco.map5095)}`} help=${paragraphs("metrics.map.help")} />
            <${Figure} label=${t("metrics.precision")} value=${percent(one.bestF1?.precision)} help=${paragraphs("metrics.precision.help")} />
            <${Figure} label=${t("metrics.recall")} value=${percent(one.bestF1?.recall)} help=${paragraphs("metrics.recall.help")} />
          </div>
          <p class="muted small">
            ${t("metrics.on", { images: count(one.numImages), boxes: count(one.numGroundTruths), threshold: (one.bestF1?.confidenceThreshold ?? 0).toFixed(2) })}
          </p>
        `;
      }}
    <//>
  <//>`;
}

/** Names of the losses there are, without their split. @param {Record<string, any>} series */
export function lossNames(series) {
  return [...new Set(Object.keys(series).map((name) => name.match(/^(?:train|val)\/(.*loss)$/)?.[1]).filter(Boolean))].sort();
}

/** @param {Record<string, {x: number[], y: number[]}>} series @param {string} name */
export function lossLines(series, name) {
  return [
    { key: `train/${name}`, label: t("chart.train"), dashed: false },
    { key: `val/${name}`, label: t("chart.val"), dashed: true },
  ]
    .filter((line) => series[line.key])
    .map((line, index) => ({ label: line.label, dashed: line.dashed, tone: index + 1, ...series[line.key] }));
}

/** @param {{series: Record<string, {x: number[], y: number[]}>}} props */
export function LossChart({ series }) {
  const quality = ["val/map50", "val/map50_95"].filter((name) => series[name]);
  return html`<${Card} title=${t("chart.title")}>
    <div class="columns">
      ${lossNames(series)
        .slice(0, 1)
        .map((name) => html`<${Chart} title=${t(`chart.${name}`) || name} xLabel=${t("chart.epoch")} lines=${lossLines(series, /** @type {string} */ (name))} />`)}
      ${quality.length > 0 &&
      html`<${Chart}
        title=${t("chart.quality")}
        xLabel=${t("chart.epoch")}
        yRange=${[0, 1]}
        lines=${quality.map((name) => ({ label: name === "val/map50" ? "mAP50" : "mAP50-95", ...series[name] }))}
      />`}
    </div>
  <//>`;
}
