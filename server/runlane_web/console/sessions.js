// All sessions: page by page, or those that a search finds.

import { get, newId, path, post } from "/console/api.js";
import { el, entitle, field, hash, link, problem, select, state, table, time } from "/console/dom.js";
import { poll } from "/console/live.js";
import { Pages } from "/console/paging.js";

const SHOWN = 100;
// The server has no search, so the console reads all sessions, and again after this time.
const FRESH_MS = 10_000;

export function showSessions(main, signal) {
  entitle("Sessions");
  const list = table("Sessions, latest first", ["Session", "Title", "State", "Agent", "Updated"]);
  const said = el("div", { role: "status" });
  const text = el("input", { name: "search", type: "search", oninput: () => changed() });
  const busy = el("input", { name: "busy", type: "checkbox", onchange: () => changed() });
  const form = el(
    "form",
    { class: "filter", role: "search", onsubmit: (event) => (event.preventDefault(), changed()) },
    field("Search in id, title, agent and labels", text),
    field("Busy only", busy),
  );
  const pages = new Pages(() => refresh());
  const all = new AllSessions(signal, (count) => {
    said.textContent = `Reading sessions: ${count}…`;
  });
  main.replaceChildren(
    el("h1", {}, "Sessions"), form, newSession(signal), said, list.node, pages.node,
  );

  const changed = () => (pages.reset(), refresh());
  const show = (sessions) => list.show(sessions, (session) => session.sessionId, cells);
  const search = async (wanted, isBusy) => {
    const found = (await all.read()).filter((each) => matches(each, wanted, isBusy));
    if (wanted !== text.value.trim().toLowerCase() || isBusy !== busy.checked) return refresh();
    const more = found.length > SHOWN ? `; the first ${SHOWN} are shown` : "";
    said.textContent = `${found.length} sessions found${more}.`;
    pages.node.hidden = true;
    show(found.slice(0, SHOWN));
  };
  const load = async () => {
    const wanted = text.value.trim().toLowerCase();
    if (wanted || busy.checked) return search(wanted, busy.checked);
    const token = pages.token;
    const found = await get(path("sessions"), { page_size: SHOWN, page_token: token }, signal);
    if (token !== pages.token || text.value.trim() || busy.checked) return;
    said.textContent = found.sessions ? "" : "There are no sessions yet.";
    pages.node.hidden = false;
    pages.take(found.nextPageToken);
    show(found.sessions ?? []);
  };
  const refresh = poll(load, 2000, signal, (error) => said.replaceChildren(problem(error)));
}

class AllSessions {
  #found = [];
  #readAt = -Infinity;

  constructor(signal, progress) {
    this.signal = signal;
    this.progress = progress;
  }

  async read() {
    if (performance.now() - this.#readAt < FRESH_MS) return this.#found;
    const found = [];
    let token = "";
    do {
      const page = await get(path("sessions"), { page_size: 1000, page_token: token }, this.signal);
      found.push(...(page.sessions ?? []));
      token = page.nextPageToken ?? "";
      if (token && !this.#found.length) this.progress(found.length);
    } while (token);
    this.#found = found;
    this.#readAt = performance.now();
    return found;
  }
}

function matches(session, text, isBusy) {
  if (isBusy && !session.busy) return false;
  const labels = Object.entries(session.metadata ?? {}).flat();
  return [session.sessionId, session.title ?? "", session.agent ?? "", ...labels].some((each) =>
    each.toLowerCase().includes(text),
  );
}

function cells(session) {
  return [
    link(session.sessionId, "sessions", session.sessionId),
    session.title ?? "",
    sessionState(session),
    session.agent ?? "",
    time(session.updatedAt),
  ];
}

export function sessionState(session) {
  if (!session.busy) return state("idle");
  const waiting = session.waitingRuns ? `, ${session.waitingRuns} waiting` : "";
  const made = state(session.activeRunId ? "active" : "accepted");
  made.append(waiting);
  return made;
}

function newSession(signal) {
  const id = el("input", { name: "session_id", maxlength: 128, placeholder: "made if empty" });
  const title = el("input", { name: "title", maxlength: 200 });
  const agent = select("agent", [["", "default"]]);
  const said = el("div");
  const create = async (event) => {
    event.preventDefault();
    const sessionId = id.value.trim() || newId();
    try {
      await post(path("sessions"), { sessionId, title: title.value, agent: agent.value });
      location.hash = hash("sessions", sessionId);
    } catch (error) {
      said.replaceChildren(problem(error));
    }
  };
  // A caller who may not list the agents gets the default one.
  get(path("agents"), {}, signal).then(
    ({ agents = [] }) => agent.append(...agents.map(({ name }) => el("option", { value: name }, name))),
    () => {},
  );
  const form = el(
    "form",
    { class: "filter", onsubmit: create },
    field("Session id", id),
    field("Title", title),
    field("Agent", agent),
    el("button", {}, "Create"),
  );
  return el("details", {}, el("summary", {}, "New session"), form, said);
}
