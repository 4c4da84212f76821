/** Errors of detflow: the status of a failed call, with its google.rpc details read. */
import { Code, ConnectError, type Interceptor } from "@connectrpc/connect";

import { BadRequestSchema, ErrorInfoSchema, RetryInfoSchema } from "./gen/google/rpc/error_details_pb.js";

/** One thing that is wrong with a request. */
export interface Violation {
  /** Path of the field in the request, or of the file and line in what was sent. */
  field: string;
  /** Machine-readable, UPPER_SNAKE_CASE. */
  reason: string;
  /** A sentence for a person: the value and the remedy. */
  description: string;
}

/** What a call failed with. Decide by `code` and `reason`; show `rawMessage`. */
export class DetflowError extends ConnectError {
  /** Machine-readable, e.g. CURSOR_EXPIRED; empty if it was not detflow that answered. */
  readonly reason: string;
  /** Further facts, e.g. the name of the resource in the way. */
  readonly facts: Readonly<Record<string, string>>;
  /** What is wrong in detail. */
  readonly violations: readonly Violation[];
  /** When to try again, in seconds; 0 if nothing is said of it. */
  readonly retrySeconds: number;

  constructor(error: ConnectError) {
    super(error.rawMessage, error.code, error.metadata, undefined, error.cause);
    this.details = error.details;
    const info = error.findDetails(ErrorInfoSchema)[0];
    const retry = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
    this.reason = info?.reason ?? "";
    this.facts = info?.metadata ?? {};
    this.retrySeconds = retry ? Number(retry.seconds) + retry.nanos / 1e9 : 0;
    this.violations = error
      .findDetails(BadRequestSchema)
      .flatMap((one) => one.fieldViolations)
      .map(({ field, reason, description }) => ({ field, reason, description }));
  }

  /** ConnectError takes whatever looks like one for one of its own; this takes its own only. */
  static override [Symbol.hasInstance](value: unknown): value is DetflowError {
    return Object.prototype.isPrototypeOf.call(DetflowError.prototype, value as object);
  }

  /** Whatever was thrown, as an error of detflow. */
  static of(error: unknown): DetflowError {
    return error instanceof DetflowError ? error : new DetflowError(ConnectError.from(error));
  }

  /** Whether a watch may go on after it: the service or the way to it was away for a moment. */
  get isPassing(): boolean {
    return (this.reason ? PASSING : LOST).has(this.code);
  }
}

const PASSING = new Set([Code.Unavailable, Code.ResourceExhausted]);
// Of a broken connection the transport says one of these, of a proxy's 5xx another.
const LOST = new Set([
  ...PASSING, Code.Unknown, Code.Internal, Code.DataLoss, Code.Aborted, Code.DeadlineExceeded,
]);

/** Makes every call fail with a DetflowError. */
export const translate: Interceptor = (next) => async (request) => {
  try {
    const response = await next(request);
    return response.stream ? { ...response, message: translated(response.message) } : response;
  } catch (error) {
    throw DetflowError.of(error);
  }
};

async function* translated<T>(messages: AsyncIterable<T>): AsyncGenerator<T> {
  try {
    yield* messages;
  } catch (error) {
    throw DetflowError.of(error);
  }
}
