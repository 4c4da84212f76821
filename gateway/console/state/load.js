// What a page reads once, and again when asked to.
import { useEffect, useRef, useState } from "../vendor/preact.js";

/**
 * Reads something when a component appears and when `inputs` change; what came before stays until then.
 *
 * @template T
 * @param {(signal: AbortSignal) => Promise<T>} read
 * @param {any[]} inputs
 * @returns {{data: T | undefined, error: any, loading: boolean, reload: () => void, set: (data: T) => void}}
 */
export function useLoad(read, inputs) {
  const [state, setState] = useState(/** @type {any} */ ({ data: undefined, error: null, loading: true }));
  const [turn, setTurn] = useState(0);
  const key = JSON.stringify(inputs);
  const last = useRef(key);
  useEffect(() => {
    const asking = new AbortController();
    const isOther = last.current !== key;
    last.current = key;
    setState((/** @type {any} */ before) => ({ data: isOther ? undefined : before.data, error: null, loading: true }));
    read(asking.signal).then(
      (data) => asking.signal.aborted || setState({ data, error: null, loading: false }),
      (error) =>
        asking.signal.aborted ||
        setState((/** @type {any} */ before) => ({ data: before.data, error, loading: false })),
    );
    return () => asking.abort();
  }, [key, turn]);
  return {
    ...state,
    reload: () => setTurn((before) => before + 1),
    set: (data) => setState({ data, error: null, loading: false }),
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
    const timer = setInterval(() => document.hidden || latest.current(), 1000 * seconds);
    return () => clearInterval(timer);
  }, [seconds]);
}
