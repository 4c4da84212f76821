// What a page reads once, and again when asked to.
import { useEffect, useRef, useState } from "../vendor/preact.js";
import { session } from "./session.js";

/**
 * Reads something when a component appears and when `inputs` change; when it is read again, what is there stays until then.
 *
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} read
 * @param {any[]} inputs
 * @returns {{data: T | undefined, error: any, loading: boolean, reload: () => void}}
 */
export function useLoad(read, inputs) {
  const key = JSON.stringify(inputs);
  const [state, setState] = useState(/** @type {any} */ ({ key, data: undefined, error: null, loading: true }));
  const [turn, setTurn] = useState(0);
  // What was read for other inputs is not shown for these, not even once.
  const now = state.key === key ? state : { data: undefined, error: null, loading: true };
  useEffect(() => {
    if (session.peek() === "ended" && now.data !== undefined) return undefined;
    const asking = new AbortController();
    setState({ ...now, key, error: null, loading: true });
    read(asking.signal).then(
      (data) => asking.signal.aborted || setState({ key, data, error: null, loading: false }),
      // Whose session has ended is told so above the page, and what is on it stays.
      (error) => asking.signal.aborted || setState({ key, data: now.data, error: error.code === 401 ? null : error, loading: false }),
    );
    return () => asking.abort();
  }, [key, turn, session.value === "in"]);
  return {
    data: now.data,
    error: now.error,
    loading: now.loading,
    reload: () => setTurn((before) => before + 1),
  };
}

/**
 * Calls something every few seconds while the tab is seen.
 *
 * @param {() => void} act
 * @param {number} seconds 0 for never
 */
export function useEvery(act, seconds) {
  const latest = useRef(act);
  latest.current = act;
  useEffect(() => {
    if (!seconds) return undefined;
    const timer = setInterval(() => {
      if (!document.hidden && session.peek() === "in") latest.current();
    }, 1000 * seconds);
    return () => clearInterval(timer);
  }, [seconds]);
}
