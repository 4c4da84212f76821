// One training, live: state, progress, epochs and log.
import { useEffect, useState } from "../vendor/preact.js";
import { get } from "../api/http.js";
import { watch } from "../api/stream.js";

const MAX_LOG_LINES = 500;

/**
 * @typedef {{training: any, progress: any, series: Record<string, {x: number[], y: number[]}>, log: string[]}} Live
 */

/** @param {any[]} list @returns {Record<string, {x: number[], y: number[]}>} */
export function toSeries(list) {
  return Object.fromEntries(list.map((one) => [one.name, { x: one.epochs, y: one.values }]));
}

/**
 * Puts an epoch into series: it replaces the same epoch, and everything later is void.
 *
 * @param {Record<string, {x: number[], y: number[]}>} series
 * @param {{epoch: number, values: Record<string, number>}} epoch
 */
export function withEpoch(series, epoch) {
  const names = new Set([...Object.keys(series), ...Object.keys(epoch.values)]);
  /** @type {Record<string, {x: number[], y: number[]}>} */
  const next = {};
  for (const name of names) {
    const before = series[name] ?? { x: [], y: [] };
    const kept = before.x.filter((x) => x < epoch.epoch).length;
    const x = before.x.slice(0, kept);
    const y = before.y.slice(0, kept);
    if (name in epoch.values) {
      x.push(epoch.epoch);
      y.push(epoch.values[name]);
    }
    next[name] = { x, y };
  }
  return next;
}

/**
 * Follows a training; `name` may be empty while there is none.
 *
 * @param {string} name
 * @param {(open: boolean) => void} onLink
 * @param {() => void} onChange called when its state changes
 */
export function useTraining(name, onLink, onChange) {
  const [live, setLive] = useState(/** @type {Live | null} */ (null));
  const [error, setError] = useState(/** @type {any} */ (null));
  useEffect(() => {
    setLive(null);
    setError(null);
    if (!name) return undefined;
    let gone = false;
    /** @type {Live} */
    let now = { training: null, progress: null, series: {}, log: [] };
    const change = (/** @type {Partial<Live>} */ part) => {
      now = { ...now, ...part };
      if (!gone) setLive(now);
    };
    get(`/v1/${name}/metrics`).then(
      (answer) => {
        // What came by the stream meanwhile is newer.
        const read = toSeries(answer.series);
        for (const [key, value] of Object.entries(now.series)) {
          if (value.x.length >= (read[key]?.x.length ?? 0)) read[key] = value;
        }
        change({ series: read });
      },
      () => {}, // before its first event metrics does not know a training
    );
    const stop = watch(`/v1/${name}:watch`, {
      on: {
        training: (message) => {
          const before = now.training?.state;
          change({ training: message.training });
          if (before && before !== message.training.state) onChange();
        },
        progress: (message) => change({ progress: message.progress }),
        epoch: (message) => change({ series: withEpoch(now.series, message.epoch) }),
        log: (message) => change({ log: [...now.log, ...message.log.lines].slice(-MAX_LOG_LINES) }),
      },
      newest: ["progress"],
      onLink,
      onEnd: onChange,
      onError: (caught) => gone || setError(caught),
    });
    return () => {
      gone = true;
      stop();
    };
  }, [name]);
  return { live, error };
}
