// Calls of the HTTP API: JSON in and out, and every failure as an ApiError.
import { expel } from "../state/session.js";

/** What a call failed of: the `error` of an answer, or that there was none. */
export class ApiError extends Error {
  /**
   * @param {number} code HTTP status; 0 if there was no answer
   * @param {{status?: string, message?: string, details?: any[]}} error
   * @param {string} requestId
   */
  constructor(code, error, requestId = "") {
    super(error.message ?? "");
    this.name = "ApiError";
    this.code = code;
    this.status = error.status ?? "UNAVAILABLE";
    this.details = error.details ?? [];
    this.requestId = requestId;
  }

  /** Machine-readable reason, e.g. DUPLICATE_NAME. */
  get reason() {
    return this.details.find((one) => one.reason)?.reason ?? "";
  }

  /** @returns {{field: string, reason: string, description: string}[]} what is wrong with which field */
  get violations() {
    return this.details.flatMap((one) => one.fieldViolations ?? []);
  }

  /** Whether trying again later may help; a limit passes where the answer says when. */
  get passes() {
    return this.code === 0 || this.code >= 502 || (this.code === 429 && this.details.some((one) => one.retryDelay));
  }
}

/**
 * @param {string} path
 * @param {Record<string, any>} [query] lists become repeated parameters; what is undefined or "" is left out
 */
export function url(path, query = {}) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    for (const one of Array.isArray(value) ? value : [value]) {
      if (one !== undefined && one !== null && one !== "") parameters.append(name, String(one));
    }
  }
  const text = parameters.toString();
  return text ? `${path}?${text}` : path;
}

/**
 * Calls a method and returns its answer.
 *
 * @param {string} method
 * @param {string} path
 * @param {{query?: Record<string, any>, body?: any, signal?: AbortSignal, timeoutSeconds?: number}} [options]
 * @returns {Promise<any>}
 */
export async function call(method, path, { query, body, signal, timeoutSeconds } = {}) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (timeoutSeconds) headers["x-request-timeout"] = String(timeoutSeconds);
  const response = await reach(url(path, query), {
    method,
    headers,
    signal,
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  return response.json();
}

/** @param {string} path @param {Record<string, any>} [query] @param {AbortSignal} [signal] */
export const get = (path, query, signal) => call("GET", path, { query, signal });

/** Fetches, and turns a failure into an ApiError. @param {string} address @param {RequestInit} init */
export async function reach(address, init) {
  /** @type {Response} */
  let response;
  try {
    response = await fetch(address, init);
  } catch (error) {
    if (init.signal?.aborted) throw error;
    throw new ApiError(0, { message: "" });
  }
  if (response.ok) return response;
  throw await failure(response);
}

/** @param {Response} response */
export async function failure(response) {
  if (response.status === 401) expel();
  const id = response.headers.get("x-request-id") ?? "";
  const answer = await response.json().catch(() => ({}));
  return new ApiError(response.status, answer.error ?? {}, id);
}

/**
 * Reads all pages of a list.
 *
 * @param {string} path
 * @param {string} field what the items are called
 * @param {Record<string, any>} [query]
 * @param {AbortSignal} [signal]
 */
export async function all(path, field, query = {}, signal) {
  const items = [];
  let pageToken = "";
  do {
    const page = await get(path, { pageSize: 1000, ...query, pageToken }, signal);
    items.push(...page[field]);
    pageToken = page.nextPageToken;
  } while (pageToken);
  return items;
}

/** An id that makes the retry of a create safe; works on plain http too, where randomUUID does not. */
export function newRequestId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
