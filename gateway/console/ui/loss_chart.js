// The curves of a training.
import { html } from "../vendor/preact.js";
import { t } from "../i18n/texts.js";
import { Chart } from "../vision/chart.js";
import { Card } from "./parts.js";

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
        .map((name) => html`<${Chart} title=${t(`chart.${name}`) || name} name=${name} xLabel=${t("chart.epoch")} lines=${lossLines(series, /** @type {string} */ (name))} />`)}
      ${quality.length > 0 &&
      html`<${Chart}
        title=${t("chart.quality")} name="quality"
        xLabel=${t("chart.epoch")}
        yRange=${[0, 1]}
        lines=${quality.map((name) => ({ label: name === "val/map50" ? "mAP50" : "mAP50-95", ...series[name] }))}
      />`}
    </div>
  <//>`;
}
