// The texts of the console: of the language in use, and of what has been shown.
import { chooseLanguage, language } from "../state/preferences.js";

/** @type {Record<string, Record<string, string>>} */
const texts = { en: {}, ko: {} };
const parts = ["frame"];

/** @param {string} wanted ko or en */
async function load(wanted) {
  const modules = await Promise.all(parts.map((part) => import(`./${wanted}_${part}.js`)));
  Object.assign(texts[wanted], ...modules.map((module) => module.default));
}

/** Loads the texts of a part, too. @param {string} part */
export async function need(part) {
  if (!parts.includes(part)) parts.push(part);
  await load(language.value);
}

/** Changes the language of the whole page. @param {string} wanted ko or en */
export async function changeLanguage(wanted) {
  await load(wanted);
  chooseLanguage(wanted);
}

/**
 * Returns a text in the language in force; "" if there is none.
 *
 * @param {string} key
 * @param {Record<string, any>} [values] put in place of {name}
 */
export function t(key, values = {}) {
  const text = texts[language.value][key] ?? "";
  return text.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}

await load(language.value);
