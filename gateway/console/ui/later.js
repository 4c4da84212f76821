// Parts of a page that are loaded when they are needed.
import { html } from "../vendor/preact.js";
import { useLoad } from "../state/load.js";
import { Problem } from "./parts.js";

/**
 * Shows a component of a module; everything but `load` and `name` is handed on to it.
 *
 * @param {any} props `load` imports the module, `name` says which component
 */
export function Later({ load, name, ...rest }) {
  const module = useLoad(load, [name]);
  if (module.error) return html`<${Problem} error=${module.error} onRetry=${module.reload} />`;
  return module.data ? html`<${module.data[name]} ...${rest} />` : null;
}
