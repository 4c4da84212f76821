// The one polite status region: what a screen reader is told of.
import { signal } from "../vendor/preact.js";

/** What was said last. */
export const said = signal("");

/** @param {string} text */
export function say(text) {
  said.value = text;
}
