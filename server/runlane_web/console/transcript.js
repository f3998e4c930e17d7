// The transcript of a session: the pages that the reader asked for, from the last one back.

import { get, path } from "/console/api.js";
import { button, el, keyed } from "/console/dom.js";
import { messageNode } from "/console/messages.js";
import { visible } from "/console/text.js";

const PAGE = 200;

export class Transcript {
  // The token of every page up to the last; the list has no order but oldest first.
  #tokens = [""];
  #first = -1;
  #earlier;
  #tail = el("div", { class: "page" });
  #pages = el("div");
  #said = el("p", { role: "status" });

  constructor(sessionId, signal) {
    this.sessionId = sessionId;
    this.signal = signal;
    this.messages = [];
    this.#earlier = button("Earlier messages", () => this.#showEarlier(), { hidden: true });
    this.node = el("div", {}, this.#said, this.#earlier, this.#pages, this.#tail);
  }

  // Reads from the last known page to the end.
  async refresh() {
    let found = await this.#page(this.#tokens.length - 1);
    while (found.nextPageToken) {
      if (this.#first >= 0) this.#keep(found.messages ?? []);
      this.#tokens.push(found.nextPageToken);
      if (this.#first < 0) this.#said.textContent = `Reading page ${this.#tokens.length}…`;
      found = await this.#page(this.#tokens.length - 1);
    }
    this.#said.textContent = "";
    this.messages = found.messages ?? [];
    this.#show(this.#tail, this.messages);
    if (this.#first < 0) {
      this.#first = this.#tokens.length - 1;
      if (this.messages.length < PAGE / 2) await this.#showEarlier();
    }
    this.#earlier.hidden = this.#first === 0;
  }

  #page(n) {
    const query = { page_size: PAGE, page_token: this.#tokens[n] };
    return get(path("sessions", this.sessionId, "messages"), query, this.signal);
  }

  // The last page became full: its messages stay above the new last one.
  #keep(messages) {
    const page = el("div", { class: "page" });
    this.#show(page, messages);
    this.#pages.append(page);
  }

  async #showEarlier() {
    if (this.#first <= 0) return;
    this.#earlier.disabled = true;
    try {
      const { messages = [] } = await this.#page(this.#first - 1);
      this.#first -= 1;
      const page = el("div", { class: "page" });
      this.#show(page, messages);
      const height = document.documentElement.scrollHeight;
      this.#pages.prepend(page);
      scrollBy(0, document.documentElement.scrollHeight - height);
    } catch (error) {
      if (!this.signal.aborted) this.#said.textContent = visible(error.message);
    }
    this.#earlier.disabled = false;
    this.#earlier.hidden = this.#first === 0;
  }

  #show(parent, messages) {
    keyed(parent, merged(messages), (message) => message.key, messageNode);
  }
}

// Joins the pieces of a message that has no room in one answer.
function merged(messages) {
  const all = [];
  for (const message of messages) {
    const last = all.at(-1);
    if (last && last.messageId === message.messageId) {
      last.parts = [...(last.parts ?? []), ...(message.parts ?? [])];
    } else all.push({ ...message, key: message.messageId });
  }
  return all;
}
