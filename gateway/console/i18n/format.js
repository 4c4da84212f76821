// Numbers, times and sizes as a person reads them.
import { language } from "../state/preferences.js";
import { t } from "./texts.js";

/** @param {number | string} value */
export function count(value) {
  return new Intl.NumberFormat(language.value).format(Number(value));
}

/** A share of one as a percentage, "-" where nothing could be measured. @param {number | undefined} share */
export function percent(share, digits = 1) {
  if (share === undefined || share === null || !Number.isFinite(share) || share < 0) return "–";
  return `${(100 * share).toFixed(digits)}%`;
}

/** @param {number | undefined} value */
export function decimal(value, digits = 3) {
  return value === undefined || !Number.isFinite(value) || value < 0 ? "–" : value.toFixed(digits);
}

/** Seconds as 1:02:03 or 2:03. @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor((whole % 3600) / 60), whole % 60];
  if (whole >= 3600) parts.unshift(Math.floor(whole / 3600));
  return parts.map((part, index) => (index ? String(part).padStart(2, "0") : String(part))).join(":");
}

/** @param {number | undefined} seconds */
export const remaining = (seconds) => (seconds === undefined ? t("progress.calculating") : duration(seconds));

/** @param {number | string} value */
export function bytes(value) {
  let number = Number(value);
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (number < 1000) return `${number < 10 && unit !== "B" ? number.toFixed(1) : Math.round(number)} ${unit}`;
    number /= 1000;
  }
  return `${number.toFixed(1)} TB`;
}

/** @param {string | undefined} time RFC 3339 */
export function when(time) {
  if (!time) return "–";
  return new Intl.DateTimeFormat(language.value, { dateStyle: "medium", timeStyle: "short" }).format(new Date(time));
}

/** Last part of a resource name. @param {string} name */
export const idOf = (name) => name.slice(name.lastIndexOf("/") + 1);
