// Boxes over an image as SVG: the most confident ones, with labels that stay inside.
import { html } from "../vendor/preact.js";
import { t } from "../i18n/texts.js";
import { count } from "../i18n/format.js";

const MAX_BOXES = 300;
const COLORS = ["#2dd4bf", "#f5a524", "#a78bfa", "#f472b6", "#38bdf8", "#a3e635", "#fb7185", "#facc15"];

/** @param {number} classId */
export const colorOf = (classId) => COLORS[classId % COLORS.length];

/**
 * @typedef {{x1: number, y1: number, x2: number, y2: number, label: string, color: string, dashed?: boolean}} Drawn
 * @param {{src: string, alt: string, width: number, height: number, boxes: Drawn[], large?: boolean,
 *   onClick?: () => void}} props `large` fills most of the page
 */
export function Picture({ src, alt, width, height, boxes, large = false, onClick }) {
  const drawn = boxes.slice(0, MAX_BOXES);
  const size = Math.max(width, height) / (large ? 64 : 42);
  const picture = html`<div class="picture">
    <img src=${src} alt=${alt} width=${width} height=${height} loading="lazy" decoding="async" />
    <svg viewBox=${`0 0 ${width} ${height}`} aria-hidden="true">
      ${drawn.map((box) => html`<${Box} box=${box} width=${width} height=${height} size=${size} />`)}
    </svg>
  </div>`;
  return html`${onClick
    ? html`<button type="button" class="picture-button" aria-label=${alt} onClick=${onClick}>${picture}</button>`
    : picture}
  ${boxes.length > MAX_BOXES && html`<p class="muted small">${t("boxes.shown", { shown: count(MAX_BOXES), total: count(boxes.length) })}</p>`}`;
}

/** Length of a text in Latin letters; those of wide scripts count for more. @param {string} text */
const lettersOf = (text) => Array.from(text).reduce((sum, letter) => sum + (letter > "\u1100" ? 1.6 : 1), 0);

/** @param {{box: Drawn, width: number, height: number, size: number}} props */
function Box({ box, width, height, size }) {
  const labelWidth = Math.min(width, (lettersOf(box.label) + 1) * size * 0.62);
  const labelHeight = size * 1.4;
  const x = Math.max(0, Math.min(box.x1, width - labelWidth));
  const y = Math.max(0, Math.min(box.y1 >= labelHeight ? box.y1 - labelHeight : box.y1, height - labelHeight));
  return html`<g>
    <rect
      class=${box.dashed ? "box dashed" : "box"}
      x=${box.x1}
      y=${box.y1}
      width=${Math.max(0, box.x2 - box.x1)}
      height=${Math.max(0, box.y2 - box.y1)}
      stroke=${box.color}
    />
    ${box.label &&
    html`<rect x=${x} y=${y} width=${labelWidth} height=${labelHeight} fill=${box.color} />
      <text x=${x + size * 0.3} y=${y + size * 1.05} font-size=${size} textLength=${labelWidth - size * 0.6} lengthAdjust="spacingAndGlyphs">
        ${box.label}
      </text>`}
  </g>`;
}
