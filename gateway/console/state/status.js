// The one polite status region: what a screen reader is told of.
import { signal } from "../vendor/preact.js";

/** What was said last. */
export const said = signal("");

/** How often a project was renamed here: its name is read again. */
export const renames = signal(0);

/** @param {string} text */
export function say(text) {
  said.value = text;
}
