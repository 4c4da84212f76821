// What a button or form does: whether it is at it, and what went wrong.
import { useState } from "../vendor/preact.js";

/**
 * Lets a component do things one after the other; an error stays until the next is done.
 *
 * `act` does `work`; until its end `busy` is `what`, otherwise false.
 *
 * @returns {{busy: any, error: any, act: (work: () => Promise<any>, what?: any) => Promise<void>}}
 */
export function useAct() {
  const [busy, setBusy] = useState(/** @type {any} */ (false));
  const [error, setError] = useState(/** @type {any} */ (null));
  const act = async (/** @type {() => Promise<any>} */ work, /** @type {any} */ what = true) => {
    setBusy(what);
    setError(null);
    try {
      await work();
    } catch (caught) {
      setError(caught);
    }
    setBusy(false);
  };
  return { busy, error, act };
}
