// Streams of server-sent events: resumed by cursor, closed while the tab is hidden, and handed on at most ten times a
// second in step with the screen.
import { onSession } from "../state/session.js";
import { ApiError, failure, url } from "./http.js";
import { TURN_MS, takeSlot } from "./slots.js";

const FLUSH_MS = 100;
const FIRST_RETRY_MS = 500;
const MAX_RETRY_MS = 10_000;
const BETWEEN_TURNS_MS = 1000;

/**
 * Follows a stream until it ends, fails for good, or is stopped.
 *
 * A browser allows six connections to a host: a hidden tab closes its own and goes on behind the last event when it is
 * shown again, and of many windows some take turns. A session that ends closes it until somebody has signed in again.
 *
 * @param {string} path
 * @param {{
 *   query?: Record<string, any>,
 *   on: Record<string, (message: any) => void>,
 *   newest?: string[],
 *   onLink?: (open: boolean) => void,
 *   onEnd?: () => void,
 *   onError?: (error: ApiError) => void,
 * }} options `on` by the name of the event; of the events in `newest` only the last of several is handed on
 * @returns {() => void} stops it
 */
export function watch(path, { query = {}, on, newest = [], onLink, onEnd, onError }) {
  /** @type {EventSource | null} */
  let source = null;
  /** @type {import("./slots.js").Slot | null} */
  let slot = null;
  /** @type {AbortController | null} */
  let waiting = null;
  let cursor = "";
  let stopped = false;
  let retryMs = FIRST_RETRY_MS;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer;
  /** @type {[string, any][]} */
  let queue = [];
  let flushing = false;
  let flushed = 0;

  function flush() {
    flushing = false;
    flushed = performance.now();
    const events = queue;
    queue = [];
    for (const [name, message] of events) {
      if (stopped) return;
      on[name](message);
    }
  }

  /** @param {string} name @param {any} message */
  function enqueue(name, message) {
    if (newest.includes(name)) queue = queue.filter(([other]) => other !== name);
    queue.push([name, message]);
    if (flushing) return;
    flushing = true;
    const wait = Math.max(0, FLUSH_MS - (performance.now() - flushed));
    setTimeout(() => requestAnimationFrame(flush), wait);
  }

  async function open() {
    clearTimeout(timer);
    if (stopped || source || waiting || document.hidden) return;
    const asking = new AbortController();
    waiting = asking;
    const taken = await takeSlot(asking.signal);
    if (waiting === asking) waiting = null;
    if (asking.signal.aborted) taken?.release();
    else {
      slot = taken;
      connect();
    }
  }

  function connect() {
    const address = url(path, { ...query, cursor });
    const current = new EventSource(address);
    source = current;
    current.onopen = () => {
      retryMs = FIRST_RETRY_MS;
      onLink?.(true);
      if (slot?.isTurn) timer = setTimeout(pass, TURN_MS);
    };
    for (const name of [...Object.keys(on), "heartbeat"]) {
      current.addEventListener(name, (event) => {
        cursor = event.lastEventId || cursor;
        if (on[name]) enqueue(name, JSON.parse(event.data));
      });
    }
    current.addEventListener("end", () => {
      close();
      const last = () => {
        if (stopped) return;
        stop();
        onEnd?.();
      };
      if (queue.length) setTimeout(() => requestAnimationFrame(last), 2 * FLUSH_MS);
      else last();
    });
    // Both what the service says of a stream that breaks off, and that there is no connection.
    current.addEventListener("error", (event) => {
      if (source !== current) return;
      const data = /** @type {MessageEvent} */ (event).data;
      const wasClosed = current.readyState === EventSource.CLOSED;
      close();
      onLink?.(false);
      if (data) refuse(new ApiError(503, JSON.parse(data).error ?? {}));
      else if (wasClosed) explain(address);
      else retry();
    });
  }

  /** Lets the next window have its turn. */
  function pass() {
    close();
    timer = setTimeout(open, BETWEEN_TURNS_MS);
  }

  /** Asks again for what was refused: an EventSource does not tell why. @param {string} address */
  async function explain(address) {
    const asking = new AbortController();
    try {
      const response = await fetch(address, { signal: asking.signal });
      if (!response.ok) return refuse(await failure(response));
    } catch {
      // There is no connection: try again.
    } finally {
      asking.abort();
    }
    retry();
  }

  /** @param {ApiError} error */
  function refuse(error) {
    if (stopped) return;
    // The connection is there; what is missing is said elsewhere, and waited for.
    if (error.code === 401) return onLink?.(true);
    if (error.reason === "CURSOR_EXPIRED") cursor = "";
    else if (!error.passes && error.code >= 400 && error.code < 500) {
      stop();
      onError?.(error);
      return;
    }
    retry();
  }

  function retry() {
    if (stopped) return;
    clearTimeout(timer);
    timer = setTimeout(open, retryMs * (0.5 + Math.random()));
    retryMs = Math.min(2 * retryMs, MAX_RETRY_MS);
  }

  function close() {
    clearTimeout(timer);
    waiting?.abort();
    waiting = null;
    source?.close();
    source = null;
    slot?.release();
    slot = null;
  }

  function onVisibility() {
    if (document.hidden) close();
    else open();
  }

  function stop() {
    stopped = true;
    close();
    forget();
    document.removeEventListener("visibilitychange", onVisibility);
  }

  document.addEventListener("visibilitychange", onVisibility);
  const forget = onSession((isIn) => (isIn ? open() : close()));
  open();
  return stop;
}
