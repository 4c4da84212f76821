// Paths of the console and the pages behind them.
import { signal } from "./vendor/preact.js";

/** The path under way, without the query. */
export const path = signal(location.pathname);
/** The query under way. */
export const query = signal(new URLSearchParams(location.search));

function read() {
  path.value = location.pathname;
  query.value = new URLSearchParams(location.search);
}

/** Goes to a path. @param {string} to @param {{replace?: boolean}} [options] */
export function go(to, { replace = false } = {}) {
  if (to === location.pathname + location.search) return;
  history[replace ? "replaceState" : "pushState"](null, "", to);
  const before = path.value;
  read();
  if (path.value !== before) scrollTo(0, 0);
}

addEventListener("popstate", read);

// Links of the console are followed without loading it again; those to the API and with a modifier are the browser's.
document.addEventListener("click", (event) => {
  if (event.defaultPrevented || event.button || event.metaKey || event.ctrlKey || event.shiftKey || event.altKey) return;
  const link = event.target instanceof Element ? event.target.closest("a") : null;
  if (!link || link.target || link.hasAttribute("download") || link.origin !== location.origin) return;
  if (!/^\/($|projects|p\/|system)/.test(link.pathname)) return;
  event.preventDefault();
  go(link.pathname + link.search);
});

/**
 * Matches a path with a pattern such as /p/:project/train/:version.
 *
 * @param {string} pattern
 * @param {string} text
 * @returns {Record<string, string> | null}
 */
export function match(pattern, text) {
  const [wanted, given] = [pattern, text].map((one) => one.replace(/\/$/, "").split("/"));
  if (wanted.length !== given.length) return null;
  /** @type {Record<string, string>} */
  const values = {};
  for (const [index, part] of wanted.entries()) {
    if (part.startsWith(":")) {
      try {
        values[part.slice(1)] = decodeURIComponent(given[index]);
      } catch {
        return null;
      }
    } else if (part !== given[index]) return null;
  }
  return values;
}
