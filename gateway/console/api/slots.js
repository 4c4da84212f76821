// How many streams the windows of one browser hold at once: some hold theirs for good, the others take turns.
//
// A browser opens six connections to a host over HTTP/1.1, all of its windows together. Four of them at most are streams,
// so that calls always get through. Locks end with the window that holds them, whatever becomes of it.

const NUM_HELD = 3;

/** How long a turn is: time to catch up with what happened, and to see the progress of now. */
export const TURN_MS = 600;

/** @typedef {{isTurn: boolean, release: () => void}} Slot */

/**
 * Waits until a stream may be opened.
 *
 * Browsers have locks on https and on this machine only; elsewhere every window that is seen has its stream.
 *
 * @param {AbortSignal} signal gives up waiting
 * @returns {Promise<Slot | null>} null if it was given up
 */
export async function takeSlot(signal) {
  if (!navigator.locks) return { isTurn: false, release() {} };
  for (let number = 0; number < NUM_HELD; number += 1) {
    const release = await hold(`detflow.stream.${number}`, { ifAvailable: true });
    if (release) return { isTurn: false, release };
  }
  const release = await hold("detflow.stream.turn", { signal });
  return release && { isTurn: true, release };
}

/** @param {string} name @param {LockOptions} options @returns {Promise<(() => void) | null>} lets go of the lock */
function hold(name, options) {
  return new Promise((resolve) => {
    const held = navigator.locks.request(name, options, (lock) => {
      if (lock) return new Promise((release) => resolve(() => release(undefined)));
      resolve(null);
      return undefined;
    });
    held.catch(() => resolve(null)); // the waiting was given up
  });
}
