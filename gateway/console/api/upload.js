// Uploads that go on where they broke off: after a lost connection by themselves, after a reload when the file is
// chosen again.
import { expel } from "../state/session.js";
import { ApiError, call, get, newRequestId } from "./http.js";

const FIRST_RETRY_MS = 1000;
const MAX_RETRY_MS = 15_000;
/** Speed is that of the last seconds. */
const SPEED_SECONDS = 5;
/** How often it is noted how far an upload is; what counts is asked for when it goes on. */
const NOTE_MS = 500;
/** Uploads that are remembered; the oldest are forgotten. */
const MAX_REMEMBERED = 10;

/**
 * @typedef {{name: string, parent: string, fileName: string, size: number, modified: number, sent: number}} Started
 * @typedef {{sent: number, total: number, bytesPerSecond?: number, etaSeconds?: number, waiting: boolean}} Progress
 *   `waiting` for the connection
 */

/** @returns {Started[]} */
function read() {
  try {
    return JSON.parse(localStorage.getItem("detflow.uploads") ?? "[]");
  } catch {
    return [];
  }
}

/** @param {Started} one */
function remember(one) {
  const others = read().filter((other) => other.name !== one.name);
  localStorage.setItem("detflow.uploads", JSON.stringify([...others, one].slice(-MAX_REMEMBERED)));
}

/** Uploads to a project that were begun in this browser and did not end. @param {string} parent @returns {Started[]} */
export const unfinished = (parent) => read().filter((one) => one.parent === parent);

/** Throws an upload away. @param {Started} one */
export async function discard(one) {
  forget(one.name);
  await call("DELETE", `/v1/${one.name}`);
}

/** Forgets an upload: it was made use of. @param {string} name */
export function forget(name) {
  localStorage.setItem("detflow.uploads", JSON.stringify(read().filter((one) => one.name !== name)));
}

/**
 * Uploads a file, or what is missing of it. It is remembered until it is forgotten.
 *
 * @param {string} parent name of the project
 * @param {File} file
 * @param {{onProgress: (progress: Progress) => void, signal: AbortSignal}} options `signal` interrupts it; it can be gone
 *   on with
 * @returns {Promise<string>} name of the upload
 */
export async function upload(parent, file, { onProgress, signal }) {
  let { one, offset } = await begin(parent, file, signal);
  const speed = speedometer(file.size, onProgress);
  let noted = performance.now();
  let retryMs = FIRST_RETRY_MS;
  remember(one);
  while (offset < file.size || !file.size) {
    try {
      speed(offset, false);
      const from = offset;
      const answer = await write(one.name, file.slice(from), from, signal, (sent) => {
        speed(from + sent, false);
        if (performance.now() - noted < NOTE_MS) return;
        noted = performance.now();
        remember({ ...one, sent: from + sent });
      });
      offset = Number(answer.committedBytes);
      break;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      // What another writer sent, or what came before the connection broke, is there already.
      if (!error.passes && error.code !== 408 && error.code !== 409) {
        if (error.code !== 401) forget(one.name);
        throw error;
      }
      speed(offset, true);
      await pause(retryMs, signal);
      retryMs = Math.min(2 * retryMs, MAX_RETRY_MS);
      const now = await committed(one.name, signal);
      if (now > offset) retryMs = FIRST_RETRY_MS;
      offset = Math.max(now, offset);
    }
    one = { ...one, sent: offset };
    remember(one);
  }
  return one.name;
}

/** Begins an upload, or finds the one of the same file. @param {string} parent @param {File} file @param {AbortSignal} signal */
async function begin(parent, file, signal) {
  const known = unfinished(parent).find(
    (one) => one.fileName === file.name && one.size === file.size && one.modified === file.lastModified,
  );
  if (known) {
    try {
      const there = await get(`/v1/${known.name}`, {}, signal);
      return { one: known, offset: Number(there.committedBytes) };
    } catch (error) {
      if (!(error instanceof ApiError) || error.code !== 404) throw error;
      forget(known.name); // it was thrown away meanwhile
    }
  }
  const body = { sizeBytes: String(file.size), requestId: newRequestId() };
  const { name } = await call("POST", `/v1/${parent}/uploads:begin`, { body, signal });
  return { one: { name, parent, fileName: file.name, size: file.size, modified: file.lastModified, sent: 0 }, offset: 0 };
}

/** How much of an upload is there, or -1 if it cannot be asked for now. @param {string} name @param {AbortSignal} signal */
async function committed(name, signal) {
  try {
    return Number((await get(`/v1/${name}`, {}, signal)).committedBytes);
  } catch (error) {
    if (error instanceof ApiError && error.passes) return -1;
    throw error;
  }
}

/**
 * Sends the rest of a file. By XMLHttpRequest: fetch does not tell how far it is.
 *
 * @param {string} name @param {Blob} rest @param {number} offset @param {AbortSignal} signal
 * @param {(sent: number) => void} onSent
 * @returns {Promise<any>}
 */
function write(name, rest, offset, signal, onSent) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    const abort = () => request.abort();
    request.open("PATCH", `/v1/${name}`);
    request.setRequestHeader("content-type", "application/octet-stream");
    request.setRequestHeader("upload-offset", String(offset));
    request.responseType = "json";
    request.upload.onprogress = (event) => onSent(event.loaded);
    request.onload = () => {
      const answer = request.response ?? {};
      if (request.status === 401) expel();
      if (request.status < 300) resolve(answer);
      else reject(new ApiError(request.status, answer.error ?? {}, request.getResponseHeader("x-request-id") ?? ""));
    };
    request.onerror = () => reject(new ApiError(0, {}));
    request.onabort = () => reject(new DOMException("aborted", "AbortError"));
    request.onloadend = () => signal.removeEventListener("abort", abort);
    signal.addEventListener("abort", abort);
    request.send(rest);
  });
}

/** @param {number} ms @param {AbortSignal} signal */
function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, ms);
    signal.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError")), { once: true });
  });
}

/** Tells progress with the speed of the last seconds. @param {number} total @param {(progress: Progress) => void} tell */
function speedometer(total, tell) {
  /** @type {[number, number][]} */
  let seen = [];
  return (/** @type {number} */ sent, /** @type {boolean} */ waiting) => {
    const now = performance.now() / 1000;
    if (waiting) seen = [];
    seen.push([now, sent]);
    while (seen.length > 2 && seen[1][0] < now - SPEED_SECONDS) seen.shift();
    const [since, before] = seen[0];
    const bytesPerSecond = now - since >= 0.5 ? Math.max(0, sent - before) / (now - since) : undefined;
    const etaSeconds = bytesPerSecond ? (total - sent) / bytesPerSecond : undefined;
    tell({ sent, total, bytesPerSecond, etaSeconds, waiting });
  };
}
