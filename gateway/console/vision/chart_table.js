// The values of a chart as a table.
import { html } from "../vendor/preact.js";
import { short } from "./chart.js";

/** @param {{lines: import("./chart.js").Line[], data: any, xLabel: string}} props */
export function Values({ lines, data, xLabel }) {
  return html`<div class="table-scroll values">
    <table>
      <thead>
        <tr><th>${xLabel}</th>${lines.map((line) => html`<th class="end">${line.label}</th>`)}</tr>
      </thead>
      <tbody>
        ${data[0].map(
          (/** @type {number} */ x, /** @type {number} */ row) => html`<tr>
            <td class="number">${x}</td>
            ${lines.map((_, column) => html`<td class="end">${short(data[column + 1][row])}</td>`)}
          </tr>`,
        )}
      </tbody>
    </table>
  </div>`;
}
