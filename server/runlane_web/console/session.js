// One session: its transcript, what its agent writes, its queue, cancels, and new prompts.

import { get, newId, path, post } from "/console/api.js";
import {
  announce, atEnd, button, el, entitle, field, problem, scrollToEnd, select,
} from "/console/dom.js";
import { poll } from "/console/live.js";
import { textNode } from "/console/messages.js";
import { Output } from "/console/output.js";
import { Queue } from "/console/queue.js";
import { openQuestions, showQuestionsIn } from "/console/questions.js";
import { receiptNode } from "/console/receipt.js";
import { OPEN } from "/console/runs.js";
import { sessionState } from "/console/sessions.js";
import { visible } from "/console/text.js";
import { Transcript } from "/console/transcript.js";

const WHEN_BUSY = [
  ["WHEN_BUSY_QUEUE", "queue: wait behind the others"],
  ["WHEN_BUSY_FOLD", "fold: join the active turn"],
  ["WHEN_BUSY_INTERRUPT", "interrupt: cancel the active run, go next"],
  ["WHEN_BUSY_REJECT", "reject: do nothing"],
];

const CANCELS = [
  ["CANCEL_SCOPE_SESSION", "Cancel all runs"],
  ["CANCEL_SCOPE_ACTIVE", "Cancel the active run"],
  ["CANCEL_SCOPE_WAITING", "Clear the queue"],
];

export function showSession(main, sessionId, signal) {
  new SessionView(main, sessionId, signal);
}

class SessionView {
  #seen = "";
  #output = null;
  #prompt = null;
  #said = el("div");
  #summary = el("p", { class: "summary" });
  #receipts = el("div", { tabindex: -1 });
  #live = el("div");
  #questions = el("div");

  constructor(main, sessionId, signal) {
    this.sessionId = sessionId;
    this.signal = signal;
    this.title = el("h1", {}, sessionId);
    this.transcript = new Transcript(sessionId, signal);
    this.queue = new Queue(sessionId, signal, {
      cancel: (runId) => this.#cancel({ runId }),
      refresh: () => this.refresh(),
    });
    entitle(sessionId);
    const runs = el("a", { href: "#/runs?" + new URLSearchParams({ session: sessionId }) }, "All runs");
    main.replaceChildren(
      this.title,
      this.#summary,
      el("p", {}, runs),
      this.#said,
      el("h2", { class: "hidden" }, "Transcript"),
      this.transcript.node,
      this.#live,
      this.#questions,
      ...this.queue.nodes,
      el("div", { class: "foot" }, this.#receipts, this.#composer()),
    );
    this.refresh = poll(() => this.#load(), 1000, signal, (error) =>
      this.#said.replaceChildren(problem(error)),
    );
  }

  async #load() {
    const asked = { states: OPEN, page_size: 1000 };
    const [{ session }, { runs = [] }] = await Promise.all([
      get(path("sessions", this.sessionId), {}, this.signal),
      get(path("sessions", this.sessionId, "runs"), asked, this.signal),
    ]);
    this.#said.replaceChildren();
    if (session.title) this.title.textContent = visible(session.title);
    const agent = session.agent ? `agent ${session.agent}` : "";
    const id = visible(this.sessionId);
    this.#summary.replaceChildren(id, " ", sessionState(session), " ", visible(agent));
    await this.#ask(runs);
    const seen = JSON.stringify([session, runs.map((run) => [run.runId, run.state, run.revision])]);
    if (seen !== this.#seen) {
      const isAtEnd = !this.#seen || atEnd();
      await this.transcript.refresh();
      this.#seen = seen;
      await this.#show(session, runs);
      if (isAtEnd) scrollToEnd();
    }
  }

  // Shows the open questions of the agent, if it waits for people.
  async #ask(runs) {
    const isAsking = runs.some((run) => run.state === "RUN_STATE_INPUT_REQUIRED");
    if (!isAsking) return showQuestionsIn(this.#questions, []);
    try {
      const found = await openQuestions({ session_id: this.sessionId }, this.signal);
      showQuestionsIn(this.#questions, found.inputRequests ?? []);
    } catch (error) {
      // Who may not see the questions still sees the session.
      if (error.reason !== "PERMISSION_DENIED") throw error;
    }
  }

  async #show(session, runs) {
    const ordered = runs.sort((one, other) => Number(one.acceptSeq) - Number(other.acceptSeq));
    const active = ordered.find((run) => run.runId === session.activeRunId);
    this.#follow(active);
    await this.queue.show(ordered.filter((run) => run !== active));
  }

  #follow(run) {
    // The user message is in the transcript as soon as the run has started.
    const hasPrompt = this.transcript.messages.some((each) => each.runId === run?.runId);
    if (this.#output?.run.runId !== run?.runId) this.#begin(run);
    if (run) this.#prompt.hidden = hasPrompt;
  }

  #begin(run) {
    this.#live.replaceChildren();
    this.#output = run ? new Output(run, this.signal) : null;
    if (!run) return;
    this.#prompt = el(
      "article",
      { class: "message user" },
      el("header", {}, el("strong", {}, "user")),
      textNode(run.promptExcerpt ?? ""),
    );
    this.#live.append(this.#prompt, this.#output.node);
    this.#output.follow().then(
      // The transcript has it now; the view shows it from there.
      () => this.refresh(),
      (error) => this.#said.replaceChildren(problem(error)),
    );
  }

  async #cancel({ scope, runId }) {
    try {
      const where = runId ? `/v1/runs/${encodeURIComponent(runId)}:cancel` : this.#at(":cancel");
      const receipt = await post(where, runId ? {} : { scope });
      this.#receipts.replaceChildren(receiptNode(receipt));
      this.#receipts.focus();
      this.refresh();
    } catch (error) {
      this.#said.replaceChildren(problem(error));
    }
  }

  #at(verb) {
    return `/v1/sessions/${encodeURIComponent(this.sessionId)}${verb}`;
  }

  #composer() {
    const prompt = el("textarea", { name: "prompt", rows: 2, required: true });
    const whenBusy = select("when_busy", WHEN_BUSY);
    const cancels = CANCELS.map(([scope, text]) => button(text, () => this.#cancel({ scope })));
    const said = el("div");
    // The key of the prompt: sent again after a failure, it is accepted once.
    let key = newId();
    prompt.addEventListener("input", () => (key = newId()));
    const send = async (event) => {
      event.preventDefault();
      if (!prompt.value.trim()) return;
      try {
        const body = { prompt: prompt.value, whenBusy: whenBusy.value };
        await post(this.#at("/runs"), body, { "Idempotency-Key": key });
        prompt.value = "";
        key = newId();
        said.replaceChildren();
        announce("Accepted.");
        this.refresh();
      } catch (error) {
        said.replaceChildren(problem(error));
      }
    };
    const form = el(
      "form",
      { class: "composer", onsubmit: send },
      field("Prompt (Ctrl+Enter sends)", prompt),
      el("div", {}, field("If busy", whenBusy), el("button", {}, "Send"), ...cancels),
      said,
    );
    prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    return form;
  }
}
