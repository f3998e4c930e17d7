// Keeps a view up to date: polls, streams that resume by themselves, and whether they succeed.

import { ApiError, fromStatus, request } from "/console/api.js";

const BACKOFF = [300, 600, 1200, 2500, 5000];
// The gateway sends a comment every 15 s.
const SILENCE = 40_000;

const failing = new Set();

function report(source, isWell) {
  if (isWell) failing.delete(source);
  else failing.add(source);
  const shown = document.getElementById("connection");
  const text = failing.size ? "Reconnecting…" : "Connected";
  if (shown.textContent !== text) shown.textContent = text;
  shown.className = failing.size ? "lost" : "";
}

// A source that ends is not failing any more.
function forget(source) {
  if (failing.has(source)) report(source, true);
}

// Waits; ends early if the signal is aborted.
function pause(ms, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, ms);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}

// A tab that nobody sees holds no connection: a browser has six for all tabs.
function visible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const check = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", check);
      resolve();
    };
    document.addEventListener("visibilitychange", check);
    signal.addEventListener("abort", check, { once: true });
  });
}

// Calls `load` every `ms` until the signal is aborted. `fail` gets errors that do not pass by
// themselves. Returns a function that calls it at once.
export function poll(load, ms, signal, fail) {
  const source = {};
  let wake = () => {};
  let again = false;
  const run = async () => {
    while (!signal.aborted) {
      again = false;
      try {
        await load();
        report(source, true);
      } catch (error) {
        if (signal.aborted) break;
        if (!(error instanceof ApiError)) console.error(error);
        const isTemporary = error instanceof ApiError && error.isTemporary;
        report(source, !isTemporary);
        if (!isTemporary) fail(error);
      }
      if (again) continue;
      const waking = new AbortController();
      wake = () => waking.abort();
      await pause(ms, AbortSignal.any([signal, waking.signal]));
      await visible(signal);
    }
    forget(source);
  };
  run();
  return () => ((again = true), wake());
}

// Follows a stream of events until `take` returns true, the stream has no more, or the signal is
// aborted. Resumes after a lost connection, each event once. Raises ApiError.
export async function follow(path, take, signal) {
  const source = {};
  const position = { id: "" };
  let tries = 0;
  try {
    while (!signal.aborted) {
      await visible(signal);
      try {
        const before = position.id;
        if (await read(path, position, take, signal, source)) return;
        if (position.id !== before) tries = 0;
      } catch (error) {
        if (signal.aborted) return;
        if (!(error instanceof ApiError) || !error.isTemporary) throw error;
        report(source, false);
      }
      await pause(BACKOFF[Math.min(tries++, BACKOFF.length - 1)], signal);
    }
  } finally {
    forget(source);
  }
}

// Reads one connection of a stream. Returns true if the stream has ended.
async function read(path, position, take, signal, source) {
  const own = new AbortController();
  const both = AbortSignal.any([signal, own.signal]);
  const hide = () => document.hidden && own.abort();
  document.addEventListener("visibilitychange", hide);
  let timer = setTimeout(() => own.abort(), SILENCE);
  try {
    const headers = { Accept: "text/event-stream" };
    if (position.id) headers["Last-Event-ID"] = position.id;
    const response = await request(path, { headers, signal: both });
    report(source, true);
    if (response.status === 204) return true;
    const parser = new Parser();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return false;
      clearTimeout(timer);
      timer = setTimeout(() => own.abort(), SILENCE);
      for (const event of parser.parse(value)) {
        if (event.id) position.id = event.id;
        if (event.name === "error") throw fromEvent(event.data);
        if (take(event)) return true;
      }
    }
  } catch (error) {
    if (error instanceof ApiError) throw error;
    if (signal.aborted || own.signal.aborted) return false;
    if (error instanceof TypeError) throw new ApiError(0, "UNREACHABLE", "The stream was cut.");
    throw error;
  } finally {
    clearTimeout(timer);
    own.abort();
    document.removeEventListener("visibilitychange", hide);
  }
}

const UNAVAILABLE = 14;

// An error inside a stream. A server that is away comes back.
function fromEvent(status) {
  return fromStatus(status, status.code === UNAVAILABLE ? 503 : 400);
}

// Takes the text of a stream in any pieces; gives whole events.
class Parser {
  #rest = "";
  #fields = {};

  *parse(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line) {
        const at = line.indexOf(": ");
        if (at > 0) this.#fields[line.slice(0, at)] = line.slice(at + 2).replace(/\r$/, "");
        continue;
      }
      const { event, id, data } = this.#fields;
      this.#fields = {};
      if (data !== undefined) yield { name: event, id, data: JSON.parse(data) };
    }
  }
}
