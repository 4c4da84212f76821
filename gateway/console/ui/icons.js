// Icons as paths on a 24 px square.
import { html } from "../vendor/preact.js";

const PATHS = {
  pen: "M4 20h4L19 9l-4-4L4 16v4M13.5 6.5l4 4",
  bin: "M4 7h16M10 11v6M14 11v6M6 7l1 13h10l1-13M9 7V4h6v3",
  plus: "M12 5v14M5 12h14",
  close: "M6 6l12 12M18 6L6 18",
  help: "M9.5 9a2.5 2.5 0 1 1 3.5 2.3c-.7.4-1 .9-1 1.7M12 17v.01M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18",
  wait: "M12 7v5l3 2M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18",
  gear: "M12 15a3 3 0 1 0 0-6 3 3 0 0 0 0 6M12 3v3M12 18v3M3 12h3M18 12h3M5.6 5.6l2.2 2.2M16.2 16.2l2.2 2.2M18.4 5.6l-2.2 2.2M7.8 16.2l-2.2 2.2",
  play: "M8 5l11 7-11 7V5",
  pause: "M9 5v14M15 5v14",
  stop: "M6 6h12v12H6z",
  check: "M5 12.5l5 5L19 7",
  warning: "M12 4l9 16H3L12 4M12 10v4M12 17v.01",
  upload: "M12 16V4M7 9l5-5 5 5M4 20h16",
  download: "M12 4v12M7 11l5 5 5-5M4 20h16",
  restore: "M4 12a8 8 0 1 0 2.5-5.8M4 4v5h5",
  left: "M15 5l-7 7 7 7",
  right: "M9 5l7 7-7 7",
};

/** @param {{name: keyof typeof PATHS, size?: number}} props */
export function Icon({ name, size = 18 }) {
  return html`<svg class="icon" width=${size} height=${size} viewBox="0 0 24 24" aria-hidden="true">
    <path d=${PATHS[name]} />
  </svg>`;
}
