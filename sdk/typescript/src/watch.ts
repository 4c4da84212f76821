/** Watches: server streams that are opened again when they break, without gap or repetition. */
import type { CallOptions } from "@connectrpc/connect";

import { DetflowError } from "./errors.js";

/** A message of a watch. */
export interface Watched {
  /** Where to resume behind it; empty keeps the one before. */
  cursor: string;
  what: { case?: string | undefined };
}

/** How to watch. */
export interface WatchOptions {
  /** Where to begin; by default with a snapshot. */
  cursor?: string;
  /** Ends the watch: the iteration throws an error of code Canceled. */
  signal?: AbortSignal;
  /** How long detflow may stay away, once it has been heard, in seconds; 120. */
  patienceSeconds?: number;
}

const FIRST_BACKOFF_MS = 100;
const MAX_BACKOFF_MS = 3000;
/** Heartbeats come every 15 s: after so much silence the connection is dead. */
const SILENCE_MS = 60_000;

/**
 * Follows a watch, without its heartbeats.
 *
 * When the stream breaks it is opened again with the cursor of the last message. If the cursor has
 * expired the watch begins again with a snapshot. The iteration ends when nothing can follow.
 *
 * @param open Calls the RPC, e.g. `(cursor, options) => client.trainer.watchTraining({ name, cursor }, options)`.
 * @throws DetflowError What the service answered; or that it cannot be reached, at once if it was
 *     never heard, or after `patienceSeconds`.
 */
export async function* watch<M extends Watched>(
  open: (cursor: string, options: CallOptions) => AsyncIterable<M>,
  { cursor = "", signal, patienceSeconds = 120 }: WatchOptions = {},
): AsyncGenerator<M, void, undefined> {
  let heard = false;
  let backoffMs = FIRST_BACKOFF_MS;
  let until = 0;
  for (;;) {
    const silence = new AbortController();
    const signals = signal ? [signal, silence.signal] : [silence.signal];
    let timer = setTimeout(() => silence.abort(), SILENCE_MS);
    try {
      for await (const message of open(cursor, { signal: AbortSignal.any(signals) })) {
        clearTimeout(timer);
        heard = true;
        backoffMs = FIRST_BACKOFF_MS;
        until = Date.now() + patienceSeconds * 1000;
        cursor = message.cursor || cursor;
        // While the caller is busy with a message nothing is read, so nothing is silent either.
        if (message.what.case !== "heartbeat") yield message;
        timer = setTimeout(() => silence.abort(), SILENCE_MS);
      }
      return;
    } catch (thrown) {
      const error = DetflowError.of(thrown);
      if (signal?.aborted) throw error;
      if (error.reason === "CURSOR_EXPIRED" && cursor) {
        cursor = "";
        continue;
      }
      const lost = silence.signal.aborted || error.isPassing;
      if (!lost || !heard || Date.now() > until) throw error;
    } finally {
      clearTimeout(timer);
      silence.abort(); // a caller who leaves the iteration leaves the connection, too
    }
    await pause(backoffMs * (0.5 + Math.random() / 2), signal);
    backoffMs = Math.min(backoffMs * 2, MAX_BACKOFF_MS);
  }
}

function pause(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve, reject) => {
    const end = (): void => {
      clearTimeout(timer);
      reject(DetflowError.of(signal?.reason));
    };
    const timer = setTimeout(() => {
      signal?.removeEventListener("abort", end);
      resolve();
    }, ms);
    signal?.addEventListener("abort", end, { once: true });
    if (signal?.aborted) end();
  });
}
