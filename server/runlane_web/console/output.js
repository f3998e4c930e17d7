// The output of the active run, as it is written.

import { path } from "/console/api.js";
import { announce, atEnd, el, link, scrollToEnd, word } from "/console/dom.js";
import { follow } from "/console/live.js";
import { artifactNode, artifactText, folded, partNode, textNode } from "/console/messages.js";
import { json, prose, visible } from "/console/text.js";

export class Output {
  #parts = el("div");
  #artifacts = new Map();
  #last = { kind: "", text: null };

  constructor(run, signal) {
    this.run = run;
    this.signal = signal;
    const title = el("strong", {}, "assistant");
    const head = el("header", {}, title, el("span", {}, "writing…"), link("run", "runs", run.runId));
    this.node = el(
      "article",
      { class: "message agent live", "data-run": run.runId, "aria-busy": "true" },
      head,
      this.#parts,
    );
  }

  // Follows the run to its end. Raises ApiError.
  async follow() {
    await follow(path("runs", this.run.runId, "events"), ({ data }) => this.#take(data.event), this.signal);
  }

  #take(event) {
    if (!event) return false;
    const isAtEnd = atEnd();
    if (event.started) this.#start(event.started.attempt);
    else if (event.textDelta) this.#append("text", event.textDelta.text);
    else if (event.reasoningDelta) this.#append("reasoning", event.reasoningDelta.text);
    else if (event.toolCall) this.#add(partNode({ toolCall: event.toolCall }));
    else if (event.toolResult) this.#add(partNode({ toolResult: event.toolResult }));
    else if (event.folded) this.#fold(event.folded);
    else if (event.artifact) this.#artifact(event.artifact);
    else if (event.step) this.#add(folded(`Step: ${event.step.key}`, json(event.step.result)));
    else if (event.custom) this.#add(folded(event.custom.type, json(event.custom.json)));
    else if (event.inputRequested) this.#note("Asks people: " + event.inputRequested.inputRequest.text);
    else if (event.inputAnswered) this.#note("Was answered.");
    else if (event.inputExpired) this.#note("Nobody answered in time.");
    else if (event.resumed) this.#note("Continues.");
    else if (!event.accepted && !event.runComplete) this.#other(event);
    if (isAtEnd) scrollToEnd();
    if (!event.runComplete) return false;
    announce(`The run has ended: ${word(event.runComplete.state, "RUN_STATE_")}.`);
    return true;
  }

  // An attempt begins its output again.
  #start(attempt) {
    this.#parts.replaceChildren();
    this.#artifacts.clear();
    this.#last = { kind: "", text: null };
    if (attempt > 1) this.#note(`Attempt ${attempt}`);
  }

  #append(kind, text = "") {
    if (this.#last.kind === kind) {
      return this.#last.text.appendData(kind === "text" ? prose(text) : visible(text));
    }
    const node = kind === "text" ? textNode(text) : folded("Reasoning", text);
    this.#add(node);
    const holder = kind === "text" ? node : node.querySelector("pre");
    if (!holder.firstChild) holder.append("");
    this.#last = { kind, text: holder.firstChild };
  }

  #fold({ runId, intoRunId }) {
    if (intoRunId !== this.run.runId) return;
    this.#add(el("p", { class: "note" }, "A waiting prompt joined: ", link(runId, "runs", runId)));
  }

  // An artifact may come in pieces.
  #artifact(artifact) {
    const known = this.#artifacts.get(artifact.artifactId);
    if (artifact.append && known) return known.append(visible(artifactText(artifact)));
    const node = artifactNode(artifact);
    this.#artifacts.set(artifact.artifactId, node.querySelector("pre"));
    this.#add(node);
  }

  #note(text) {
    this.#add(el("p", { class: "note" }, text));
  }

  #other({ index, time, ...event }) {
    const [[name, value] = ["damaged event", {}]] = Object.entries(event);
    this.#add(folded(name, json(JSON.stringify(value))));
  }

  #add(node) {
    this.#last = { kind: "", text: null };
    this.#parts.append(node);
  }
}
