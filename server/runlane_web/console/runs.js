// Runs, filtered by state and session.

import { get, path } from "/console/api.js";
import { el, entitle, field, link, problem, select, state, table, time, seconds, word } from "/console/dom.js";
import { poll } from "/console/live.js";
import { Pages } from "/console/paging.js";

const ENDED = ["COMPLETED", "CANCELLED", "FAILED"];
const NOT_ENDED = ["ACCEPTED", "QUEUED", "ACTIVE", "INPUT_REQUIRED", "FOLDED", "CANCELLING"];

export const OPEN = NOT_ENDED.map((each) => "RUN_STATE_" + each);

const STATES = [
  ["", "all"],
  ["open", "not ended"],
  ...[...NOT_ENDED, ...ENDED].map((each) => ["RUN_STATE_" + each, word(each, "")]),
];

export function showRuns(main, query, signal) {
  entitle("Runs");
  const titles = ["Run", "Session", "State", "Agent", "Prompt", "Accepted", "Duration"];
  const list = table("Runs, latest first", titles);
  const said = el("div");
  const states = select("state", STATES, query.get("state") ?? "");
  const session = el("input", { name: "session", type: "search", value: query.get("session") ?? "" });
  const pages = new Pages(() => refresh());
  const choose = (event) => {
    event.preventDefault();
    const wanted = new URLSearchParams({ state: states.value, session: session.value.trim() });
    // Not location.hash, which would show the view again and take the focus.
    history.replaceState(null, "", "#/runs?" + wanted);
    pages.reset();
    refresh();
  };
  const form = el(
    "form",
    { class: "filter", role: "search", onsubmit: choose, onchange: choose },
    field("State", states),
    field("Session id", session),
    el("button", {}, "Filter"),
  );
  main.replaceChildren(el("h1", {}, "Runs"), form, said, list.node, pages.node);

  const load = async () => {
    const token = pages.token;
    const wanted = states.value === "open" ? OPEN : states.value;
    const asked = { states: wanted, session_id: session.value.trim(), page_token: token };
    const found = await get(path("runs"), asked, signal);
    if (token !== pages.token) return;
    said.replaceChildren();
    pages.take(found.nextPageToken);
    list.show(found.runs ?? [], (run) => run.runId, cells);
    if (!found.runs) said.replaceChildren(el("p", {}, "There are no such runs."));
  };
  const refresh = poll(load, 2000, signal, (error) => said.replaceChildren(problem(error)));
}

function cells(run) {
  return [
    link(run.runId, "runs", run.runId),
    link(run.sessionId, "sessions", run.sessionId),
    state(run.state),
    run.agent ?? "",
    el("span", { class: "excerpt" }, run.promptExcerpt ?? ""),
    time(run.acceptedAt),
    seconds(run.startedAt, run.endedAt),
  ];
}
