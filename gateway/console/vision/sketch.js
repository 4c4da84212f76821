// A small image with its boxes, as a preview of the API holds it.
import { html, useEffect, useState } from "../vendor/preact.js";
import { colorOf } from "./boxes.js";

/** @param {{label: string, picture: any}} props */
export function Sketch({ label, picture }) {
  const [address, setAddress] = useState("");
  useEffect(() => {
    const data = Uint8Array.from(atob(picture.jpeg), (letter) => letter.charCodeAt(0));
    const made = URL.createObjectURL(new Blob([data], { type: "image/jpeg" }));
    setAddress(made);
    return () => URL.revokeObjectURL(made);
  }, [picture.jpeg]);
  return html`<figure class="stack-small">
    <div class="picture">
      ${address && html`<img src=${address} alt=${label} width=${picture.widthPx} height=${picture.heightPx} />`}
      <svg viewBox=${`0 0 ${picture.widthPx} ${picture.heightPx}`} aria-hidden="true">
        ${picture.classIds.map((/** @type {number} */ id, /** @type {number} */ index) => {
          const [x1, y1, x2, y2] = picture.boxes.slice(4 * index, 4 * index + 4);
          return html`<rect class="box" x=${x1} y=${y1} width=${x2 - x1} height=${y2 - y1} stroke=${colorOf(id)} />`;
        })}
      </svg>
    </div>
    <figcaption class="muted small">${label}</figcaption>
  </figure>`;
}
