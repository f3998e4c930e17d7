// One run: what it is, how it ended, and its events on a time line.

import { get, path, post } from "/console/api.js";
import { announce, button, el, entitle, link, problem, seconds, state, time, word } from "/console/dom.js";
import { follow, poll } from "/console/live.js";
import { folded, textNode } from "/console/messages.js";
import { receiptNode } from "/console/receipt.js";
import { json } from "/console/text.js";
import { Timeline } from "/console/timeline.js";

const ENDED = ["RUN_STATE_COMPLETED", "RUN_STATE_CANCELLED", "RUN_STATE_FAILED"];

export function showRun(main, runId, signal) {
  entitle(`Run ${runId}`);
  const said = el("div");
  const facts = el("div");
  const receipts = el("div", { tabindex: -1 });
  const timeline = new Timeline();
  const fail = (error) => said.replaceChildren(problem(error));
  const cancel = button("Cancel the run", async () => {
    try {
      const receipt = await post(`/v1/runs/${encodeURIComponent(runId)}:cancel`);
      receipts.replaceChildren(receiptNode(receipt));
      receipts.focus();
    } catch (error) {
      fail(error);
    }
  });
  main.replaceChildren(
    el("h1", {}, "Run"),
    said,
    facts,
    el("p", { class: "actions" }, cancel),
    receipts,
    el("h2", {}, "Events"),
    timeline.node,
  );

  const ended = new AbortController();
  let shown = "";
  const load = async () => {
    const { run } = await get(path("runs", runId), {}, signal);
    said.replaceChildren();
    const isEnded = ENDED.includes(run.state);
    cancel.hidden = isEnded;
    if (JSON.stringify(run) !== shown) facts.replaceChildren(...factNodes(run));
    shown = JSON.stringify(run);
    if (isEnded) ended.abort();
  };
  const refresh = poll(load, 1000, AbortSignal.any([signal, ended.signal]), fail);
  const take = (event) => {
    timeline.take(event.data.event ?? {});
    const end = event.data.event?.runComplete;
    if (!end) return false;
    announce(`The run has ended: ${word(end.state, "RUN_STATE_")}.`);
    refresh();
    return true;
  };
  follow(path("runs", runId, "events"), take, signal).catch((error) =>
    timeline.say(
      error.reason === "CURSOR_COMPACTED"
        ? "The retention period has removed the events of this run."
        : error.message,
    ),
  );
}

function factNodes(run) {
  const end = run.runComplete ?? {};
  const facts = [
    ["Run", run.runId],
    ["Session", link(run.sessionId, "sessions", run.sessionId)],
    ["State", state(run.state)],
    ["Finish reason", word(end.finishReason, "FINISH_REASON_")],
    ["Error", end.error && `${end.error.reason}: ${end.error.message ?? ""}`],
    ["Cancel reason", end.cancelReason],
    ["Folded into", run.foldedInto && link(run.foldedInto, "runs", run.foldedInto)],
    ["Number in the session", run.acceptSeq],
    ["Agent", run.agent],
    ["When busy", word(run.whenBusy, "WHEN_BUSY_")],
    ["Attempt", `${run.attempt ?? 0} of ${run.maxAttempts ?? 1}`],
    ["Timeout", run.timeout],
    ["Accepted", time(run.acceptedAt)],
    ["Waited", seconds(run.acceptedAt, run.startedAt ?? run.endedAt)],
    ["Ran", seconds(run.startedAt, run.endedAt)],
    ["Tokens", end.usage && `${end.usage.inputTokens ?? 0} in, ${end.usage.outputTokens ?? 0} out`],
    ...Object.entries(run.metadata ?? {}).map(([name, value]) => [`Label ${name}`, value]),
  ];
  const list = el("dl", {});
  for (const [name, value] of facts) {
    if (value) list.append(el("dt", {}, name), el("dd", {}, value));
  }
  const nodes = [list, el("h2", {}, "Prompt"), textNode(run.promptExcerpt ?? "")];
  if (end.text) nodes.push(el("h2", {}, "Result"), textNode(end.text));
  if (end.result) nodes.push(folded("Structured result", json(end.result)));
  return nodes;
}
