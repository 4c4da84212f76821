// Who is signed in, and what that person may do here.
import { effect, signal } from "../vendor/preact.js";
import { path } from "../router.js";

/** @typedef {"asking" | "in" | "out" | "ended"} State nobody was signed in at the start, or not any more */

/** Whether somebody is signed in. */
export const session = signal(/** @type {State} */ ("asking"));

/** Who is. */
export const principal = signal(/** @type {any} */ (null));

const RANKS = { VIEWER: 1, EDITOR: 2, ADMIN: 3 };

/** @typedef {keyof typeof RANKS} Role */

/** Takes note of who is signed in. @param {any} who */
export function enter(who) {
  // What is on the page was read for somebody else.
  if (principal.value && principal.value.subject !== who.subject) location.reload();
  principal.value = who;
  session.value = "in";
}

/** Takes note of an answer that says that nobody is. */
export function expel() {
  session.value = principal.value ? "ended" : "out";
}

/**
 * Calls something when the session ends, and when somebody has signed in again.
 *
 * @param {(isIn: boolean) => void} act
 * @returns {() => void} ends that
 */
export function onSession(act) {
  let before = session.peek();
  return effect(() => {
    const now = session.value;
    if (now === before) return;
    before = now;
    act(now === "in");
  });
}

/** What somebody may do in the project of this page, or in all: "" for nothing. @returns {Role | ""} */
export function role(project = path.value.match(/^\/p\/([^/]+)/)?.[1] ?? "-") {
  const who = principal.value;
  if (!who) return "";
  const roles = who.grants
    .filter((/** @type {any} */ one) => ["projects/-", `projects/${project}`].includes(one.project))
    .map((/** @type {any} */ one) => one.role);
  return roles.sort((/** @type {Role} */ a, /** @type {Role} */ b) => RANKS[b] - RANKS[a])[0] ?? "";
}

/** Whether somebody has at least this role. @param {Role} wanted @param {string} [project] */
export function may(wanted, project) {
  const has = role(project);
  return has !== "" && RANKS[has] >= RANKS[wanted];
}
