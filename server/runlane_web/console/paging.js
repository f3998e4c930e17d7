// Pages of a list: the tokens that lead to them.

import { button, el } from "/console/dom.js";

export class Pages {
  #tokens = [""];
  #next = "";
  #turned;

  // `turned` is called when the reader wants another page.
  constructor(turned) {
    this.#turned = turned;
    this.before = button("Previous page", () => this.#turn(-1));
    this.after = button("Next page", () => this.#turn(1));
    this.number = el("span", {}, "Page 1");
    this.node = el("p", { class: "pages" }, this.before, this.number, this.after);
    this.#show();
  }

  get token() {
    return this.#tokens.at(-1);
  }

  // Takes what the answer with the current page says about the next one.
  take(next) {
    this.#next = next ?? "";
    this.#show();
  }

  reset() {
    this.#tokens = [""];
    this.take("");
  }

  #turn(by) {
    if (by > 0) this.#tokens.push(this.#next);
    else this.#tokens.pop();
    this.take("");
    this.#turned();
  }

  #show() {
    this.before.disabled = this.#tokens.length === 1;
    this.after.disabled = !this.#next;
    this.number.textContent = `Page ${this.#tokens.length}`;
  }
}
