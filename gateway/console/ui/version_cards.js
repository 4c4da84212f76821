// What a version is made of: its split and its augmentations.
import { html } from "../vendor/preact.js";
import { t } from "../i18n/texts.js";
import { count } from "../i18n/format.js";
import { Card, Figure, Help } from "./parts.js";

const SPLITS = ["train", "val", "test"];

/** @param {{version: any}} props */
export function SplitCard({ version }) {
  const counts = version.numImages;
  const ratio = version.recipe.split ?? { train: 70, val: 20, test: 10 };
  return html`<${Card} title=${html`<span class="row">${t("split.title")}<${Help} about=${t("split.title")} text="split.help" /></span>`}>
    <div class="figures">
      ${SPLITS.map(
        (split) => html`<${Figure}
          label=${t(`split.${split}`)}
          value=${counts ? count(counts[split]) : "–"}
          detail=${version.recipe.keepExistingSplit ? t("split.kept") : `${ratio[split]}%`}
        />`,
      )}
    </div>
    <div class="split-bar" aria-hidden="true">
      ${SPLITS.map((split) => html`<div class=${split} style=${{ flexGrow: counts ? Number(counts[split]) : ratio[split] }}></div>`)}
    </div>
  <//>`;
}

/** The steps of a recipe in words, in the order they are done. @param {any} recipe @returns {string[]} */
export function stepsOf(recipe) {
  const steps = [];
  if (recipe.grayscale) steps.push(t("recipe.grayscale"));
  if (recipe.maxSidePx) steps.push(t("recipe.maxSide", { px: recipe.maxSidePx }));
  if (recipe.exactSize) steps.push(t("recipe.exactSize", { width: recipe.exactSize.widthPx, height: recipe.exactSize.heightPx }));
  return steps;
}

/** @param {any} recipe @returns {string[]} */
export function copiesOf(recipe) {
  return [
    ...(recipe.augmentations ?? []).map((/** @type {string} */ one) => t(`augment.${one}`)),
    ...(recipe.brightness ?? []).map((/** @type {number} */ one) => t("augment.brightness", { value: one > 0 ? `+${one}` : one })),
    ...(recipe.contrast ?? []).map((/** @type {number} */ one) => t("augment.contrast", { value: one })),
  ];
}

/** @param {{version: any}} props */
export function AugmentationCard({ version }) {
  const steps = stepsOf(version.recipe);
  const copies = copiesOf(version.recipe);
  return html`<${Card} title=${t("augment.title")}>
    <dl class="pairs">
      <dt>${t("augment.preprocessing")}</dt>
      <dd>${steps.length ? steps.join(", ") : t("augment.none")}</dd>
      <dt>${t("augment.copies")}</dt>
      <dd>${copies.length ? copies.join(", ") : t("augment.none")}</dd>
      <dt>${t("augment.classes")}</dt>
      <dd>${version.classNames.join(", ")}</dd>
    </dl>
  <//>`;
}
