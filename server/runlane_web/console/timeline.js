// The events of a run. Pieces of text that follow each other are one entry.

import { el, link, word } from "/console/dom.js";
import { folded } from "/console/messages.js";
import { visible } from "/console/text.js";

// More entries than this make a page slow.
const MAX_ENTRIES = 2000;

const DELTAS = { textDelta: "Text", reasoningDelta: "Reasoning" };

export class Timeline {
  #list = el("ol", { class: "timeline" });
  #said = el("p", { class: "note" });
  #start = null;
  #group = null;
  #entries = 0;

  constructor() {
    this.node = el("div", {}, this.#list, this.#said);
  }

  say(text) {
    this.#said.textContent = visible(text);
  }

  take({ index, time, ...event }) {
    this.#start ??= new Date(time);
    const at = `+${((new Date(time) - this.#start) / 1000).toFixed(3)} s`;
    const [kind = "damaged", value = {}] = Object.entries(event)[0] ?? [];
    if (kind in DELTAS && this.#group?.kind === kind) return this.#grow(at, value.text);
    this.#group = null;
    this.#entries += 1;
    if (this.#entries > MAX_ENTRIES) {
      return this.say(`${this.#entries - MAX_ENTRIES} more entries are not shown.`);
    }
    const content = kind in DELTAS ? this.#begin(kind, at, value.text) : summary(kind, value);
    const name = el("strong", {}, kind in DELTAS ? DELTAS[kind] : words(kind));
    this.#list.append(
      el("li", { class: kind, "data-index": index }, el("span", { class: "at" }, at), name, " ", content),
    );
  }

  #begin(kind, at, text = "") {
    const node = folded("", text);
    const pre = node.querySelector("pre");
    if (!pre.firstChild) pre.append("");
    const title = node.querySelector("summary");
    this.#group = { kind, pieces: 0, size: 0, from: at, text: pre.firstChild, title };
    this.#count(at, text);
    return node;
  }

  #grow(at, text = "") {
    this.#group.text.appendData(visible(text));
    this.#count(at, text);
  }

  #count(at, text) {
    const group = this.#group;
    group.pieces += 1;
    group.size += text.length;
    const until = group.pieces > 1 ? ` until ${at}` : "";
    const pieces = group.pieces > 1 ? `${group.pieces} pieces` : "1 piece";
    group.title.textContent = `${group.size} characters in ${pieces}${until}`;
  }
}

function words(kind) {
  const text = kind.replace(/[A-Z]/g, (letter) => " " + letter.toLowerCase());
  return text[0].toUpperCase() + text.slice(1);
}

function summary(kind, value) {
  if (kind === "accepted") return `number ${value.acceptSeq} of the session`;
  if (kind === "inputRequested") return value.inputRequest?.text ?? "";
  if (kind === "resumed") return `attempt ${value.attempt}`;
  if (kind === "started") return `attempt ${value.attempt}`;
  if (kind === "folded") {
    return el("span", {}, link(value.runId, "runs", value.runId), " joined ", link(value.intoRunId, "runs", value.intoRunId));
  }
  if (kind === "runComplete") {
    const error = value.error ? `; ${value.error.reason}: ${value.error.message ?? ""}` : "";
    return word(value.state, "RUN_STATE_") + error;
  }
  const name = value.name || value.key || value.type || "Content";
  return folded(name, JSON.stringify(value, null, 2));
}
