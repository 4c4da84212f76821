// Language and theme: what a person chose, or else what the browser says.
import { effect, signal } from "../vendor/preact.js";

const LANGUAGES = ["ko", "en"];

function cookieLanguage() {
  return document.cookie.match(/(?:^|; )detflow_language=(ko|en)(?:;|$)/)?.[1];
}

function browserLanguage() {
  for (const tag of navigator.languages) {
    const language = tag.slice(0, 2).toLowerCase();
    if (LANGUAGES.includes(language)) return language;
  }
  return "en";
}

/** ko or en. */
export const language = signal(cookieLanguage() ?? browserLanguage());

/** auto, light or dark. */
export const theme = signal(localStorage.getItem("detflow.theme") ?? "auto");

/** @param {string} chosen */
export function chooseLanguage(chosen) {
  document.cookie = `detflow_language=${chosen}; path=/; max-age=31536000; samesite=lax`;
  language.value = chosen;
}

/** @param {string} chosen */
export function chooseTheme(chosen) {
  localStorage.setItem("detflow.theme", chosen);
  theme.value = chosen;
}

/** Whether the colours in force are dark ones. */
export function isDark() {
  if (theme.value !== "auto") return theme.value === "dark";
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

effect(() => {
  document.documentElement.lang = language.value;
});
effect(() => {
  document.documentElement.dataset.theme = theme.value;
});
