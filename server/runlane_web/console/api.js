// Calls of the gateway, with the token of this tab.

const KEY = "runlane-token";

export class ApiError extends Error {
  constructor(status, reason, message) {
    super(message);
    this.status = status;
    this.reason = reason;
  }

  // True if the same request may succeed later.
  get isTemporary() {
    return this.status === 0 || this.status === 429 || this.status >= 500;
  }
}

export const token = {
  get: () => sessionStorage.getItem(KEY),
  set: (text) => sessionStorage.setItem(KEY, text),
  clear: () => sessionStorage.removeItem(KEY),
};

// Sends a request; raises ApiError, or AbortError once the signal is aborted.
export async function request(path, options = {}) {
  const headers = { Authorization: `Bearer ${token.get()}`, ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ApiError(0, "UNREACHABLE", "The gateway cannot be reached.");
  }
  if (response.ok) return response;
  throw await failure(response);
}

async function failure(response) {
  let status = {};
  try {
    status = await response.json();
  } catch {
    // Not an answer of the gateway itself, such as that of a proxy.
  }
  return fromStatus(status, response.status);
}

export function fromStatus(status, http = 0) {
  const reason = status.details?.find((each) => each.reason)?.reason ?? "";
  const error = new ApiError(http, reason, status.message || `The answer has the code ${http}.`);
  if (error.status === 401) dispatchEvent(new CustomEvent("signed-out", { detail: error.message }));
  return error;
}

export async function get(path, query = {}, signal = undefined) {
  const response = await request(path + asQuery(query), { signal });
  return response.json();
}

export function post(path, body = {}, headers = {}) {
  return send("POST", path, body, headers);
}

export function patch(path, body, headers = {}) {
  return send("PATCH", path, body, headers);
}

async function send(method, path, body, headers) {
  const response = await request(path, {
    method,
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", ...headers },
  });
  return response.json();
}

function asQuery(query) {
  const pairs = Object.entries(query).flatMap(([name, value]) =>
    [value].flat().filter((each) => each !== "" && each !== undefined).map((each) => [name, each]),
  );
  return pairs.length ? "?" + new URLSearchParams(pairs) : "";
}

export function path(...parts) {
  return "/v1/" + parts.map(encodeURIComponent).join("/");
}

// An id that nobody else makes. randomUUID needs a secure context.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
