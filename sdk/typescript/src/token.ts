/** Tokens: who is calling. */
import type { Interceptor } from "@connectrpc/connect";

/** A token, or what gives one before every call, e.g. because it is renewed now and then. */
export type Token = string | (() => string | Promise<string>);

/**
 * Shows a token with every call.
 *
 * @throws Error The token would go over a network unencrypted, where others can read it.
 */
export function bearer(token: Token, baseUrl: string, insecure: boolean): Interceptor {
  const { protocol, hostname } = new URL(baseUrl, globalThis.location?.href);
  if (protocol === "http:" && !isLoopback(hostname) && !insecure) {
    throw new Error(
      `a token is not sent to ${baseUrl} without TLS, where others could read it: say https://,` +
        " or set insecure if nobody else is on this network",
    );
  }
  return (next) => async (request) => {
    request.header.set("authorization", `Bearer ${typeof token === "string" ? token : await token()}`);
    return next(request);
  };
}

function isLoopback(hostname: string): boolean {
  return hostname === "localhost" || hostname === "[::1]" || /^127(\.\d+){3}$/.test(hostname);
}
