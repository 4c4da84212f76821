// The versions of a project, live.
import { useEffect, useRef, useState } from "../vendor/preact.js";
import { all } from "../api/http.js";
import { watch } from "../api/stream.js";
import { useEvery } from "./load.js";

const POLL_SECONDS = 5;

/** Tone of a version's state, for its chip. */
export const TONES = {
  PREPROCESSING: "warn",
  READY: "brand",
  QUEUED: "warn",
  PROVISIONING: "warn",
  TRAINING: "brand",
  EVALUATING: "brand",
  COMPLETED: "ok",
  FAILED: "bad",
  STOPPED: "",
  PAUSED: "warn",
};

/** @param {string} state */
export const isLive = (state) => ["QUEUED", "PROVISIONING", "TRAINING", "EVALUATING"].includes(state);

/**
 * Keeps the versions of a project, newest first.
 *
 * A page holds one stream. While another one is needed (`streaming` is false) the list is asked for every few seconds
 * instead.
 *
 * @param {string} project
 * @param {boolean} streaming
 * @param {(open: boolean) => void} onLink
 */
export function useVersions(project, streaming, onLink) {
  const parent = `projects/${project}`;
  const [versions, setVersions] = useState(/** @type {any[] | undefined} */ (undefined));
  const [error, setError] = useState(/** @type {any} */ (null));
  const known = useRef(/** @type {any[]} */ ([]));

  const set = (/** @type {any[]} */ found) => {
    const shown = found.filter((one) => !one.deleteTime);
    shown.sort((a, b) => (a.createTime < b.createTime ? 1 : a.createTime > b.createTime ? -1 : a.name < b.name ? 1 : -1));
    known.current = shown;
    setVersions(shown);
    setError(null);
  };
  const put = (/** @type {any} */ version) => {
    const before = known.current.find((one) => one.name === version.name);
    if (before && Number(before.revision) > Number(version.revision)) return;
    set([...known.current.filter((one) => one.name !== version.name), version]);
  };
  const reload = () => all(`/v1/${parent}/versions`, "versions").then(set, (caught) => caught.code === 401 || setError(caught));

  useEffect(() => {
    known.current = [];
    setVersions(undefined);
    reload();
  }, [project]);
  useEffect(() => {
    if (!streaming) return undefined;
    return watch(`/v1/${parent}/versions:watch`, {
      on: {
        snapshot: (message) => (message.snapshot.more ? reload() : set(message.snapshot.versions)),
        version: (message) => put(message.version),
      },
      onLink,
      onError: setError,
    });
  }, [project, streaming]);
  useEvery(reload, streaming ? 0 : POLL_SECONDS);
  return { versions, error, reload, put };
}
