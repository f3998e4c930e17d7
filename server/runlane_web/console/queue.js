// The queue of a session: its runs in the order in which they start, and what can be done to each.

import { get, newId, patch, path } from "/console/api.js";
import { announce, button, el, field, keyed, link, problem, state, word } from "/console/dom.js";
import { follow } from "/console/live.js";

// The waiting runs in the order in which they start, from the snapshot of the session.
async function waitingIn(sessionId, signal) {
  const ids = [];
  await follow(path("sessions", sessionId, "events"), ({ data }) => {
    ids.push(...(data.snapshot?.queue ?? []).map((run) => run.runId));
    return !data.snapshot?.continues;
  }, signal);
  return ids;
}

export class Queue {
  #said = el("div");
  #editor = el("div");
  #list = el("ol", { class: "queue" });
  #title = el("h2", { hidden: true }, "Queue");
  #runs = [];
  #dragged = null;

  // `cancel` cancels a run; `refresh` loads the session again.
  constructor(sessionId, signal, { cancel, refresh }) {
    this.sessionId = sessionId;
    this.signal = signal;
    this.cancel = cancel;
    this.refresh = refresh;
    this.nodes = [this.#title, this.#said, this.#list, this.#editor];
  }

  // Shows the open runs except for the active one.
  async show(runs) {
    const isMoved = runs.length > 1 && runs.some((run) => run.state !== "RUN_STATE_FOLDED");
    const order = isMoved ? await waitingIn(this.sessionId, this.signal) : [];
    const place = (run) => order.indexOf(run.runId);
    this.#runs = runs.toSorted((one, other) => place(one) - place(other));
    this.#title.hidden = !runs.length;
    this.#title.textContent = `Queue (${runs.length})`;
    // Where a run can be moved to depends on its neighbours.
    const items = this.#runs.map((run, n) => ({ run, before: this.#movable(n - 1), after: this.#movable(n + 1) }));
    const held = this.#list.contains(document.activeElement) ? document.activeElement : null;
    keyed(this.#list, items, (item) => item.run.runId, (item) => this.#node(item));
    this.#hold(held?.getAttribute("aria-label"));
  }

  // Keeps the focus on the control of a run whose row was moved, or on another one of that row.
  #hold(label) {
    if (!label || this.#list.contains(document.activeElement)) return;
    const controls = [...this.#list.querySelectorAll("button")];
    const same = controls.find((each) => each.getAttribute("aria-label") === label);
    const target = same?.disabled ? same.parentNode.querySelector("button:enabled") : same;
    target?.focus();
  }

  // The run at a place in the queue; none if it does not wait for its first start.
  #movable(n) {
    const run = this.#runs[n];
    return run && isWaiting(run) ? run.runId : undefined;
  }

  #node({ run, before, after }) {
    const cells = [
      state(run.state),
      link(`#${run.acceptSeq}`, "runs", run.runId),
      el("span", { class: "excerpt" }, run.promptExcerpt ?? ""),
      el("span", { class: "note" }, word(run.whenBusy, "WHEN_BUSY_")),
    ];
    if (!isWaiting(run)) return el("li", {}, ...cells, el("span", { class: "actions" }, this.#drop(run)));
    const move = (position) => this.#update(run, { position }, "Moved.");
    const send = (whenBusy) => this.#update(run, { whenBusy }, "Sent.");
    const act = (text, what, onclick, more = {}) =>
      button(text, onclick, { "aria-label": `${what} ${run.acceptSeq}`, title: what, ...more });
    const actions = el(
      "span",
      { class: "actions" },
      act("↑", "Move up run", () => move({ beforeRunId: before }), { disabled: !before }),
      act("↓", "Move down run", () => move({ afterRunId: after }), { disabled: !after }),
      act("Edit", "Edit run", () => this.#edit(run)),
      act("Fold", "Fold into the active turn run", () => send("WHEN_BUSY_FOLD")),
      act("Interrupt", "Interrupt the active run with run", () => send("WHEN_BUSY_INTERRUPT")),
      this.#drop(run),
    );
    return this.#draggable(run, el("li", { draggable: "true" }, ...cells, actions));
  }

  #drop(run) {
    return button("Cancel", () => this.cancel(run.runId), { "aria-label": `Cancel run ${run.acceptSeq}` });
  }

  // A run that is dropped on another one takes its place.
  #draggable(run, node) {
    node.addEventListener("dragstart", (event) => {
      this.#dragged = run;
      event.dataTransfer.effectAllowed = "move";
      event.dataTransfer.setData("text/plain", run.runId);
    });
    node.addEventListener("dragover", (event) => {
      if (!this.#dragged || this.#dragged.runId === run.runId) return;
      event.preventDefault();
      node.classList.add("target");
    });
    node.addEventListener("dragleave", () => node.classList.remove("target"));
    node.addEventListener("dragend", () => (this.#dragged = null));
    node.addEventListener("drop", (event) => {
      event.preventDefault();
      node.classList.remove("target");
      const moved = this.#dragged;
      this.#dragged = null;
      if (!moved) return;
      const at = (id) => this.#runs.findIndex((each) => each.runId === id);
      const isDown = at(moved.runId) < at(run.runId);
      const position = isDown ? { afterRunId: run.runId } : { beforeRunId: run.runId };
      this.#update(moved, { position }, "Moved.");
    });
    return node;
  }

  async #edit({ runId }) {
    let run, text;
    try {
      const found = await get(path("runs", runId), { withPrompt: true }, this.signal);
      [run, text] = [found.run, found.prompt.text ?? ""];
    } catch (error) {
      if (!this.signal?.aborted) this.#said.replaceChildren(problem(error));
      return;
    }
    const prompt = el("textarea", { name: "edited", rows: 3, required: true });
    prompt.value = text;
    const said = el("div");
    const close = () => this.#editor.replaceChildren();
    const save = async (event) => {
      event.preventDefault();
      const changes = { prompt: prompt.value, revision: run.revision ?? "0" };
      if (await this.#update(run, changes, "Saved.", said)) close();
    };
    const form = el(
      "form",
      { class: "composer editor", onsubmit: save },
      field(`Prompt of run ${run.acceptSeq}`, prompt),
      el("div", {}, el("button", {}, "Save"), button("Close", close)),
      said,
    );
    form.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    this.#editor.replaceChildren(form);
    prompt.focus();
  }

  // Sends an update; returns whether it was done.
  async #update(run, changes, done, said = this.#said) {
    const updateMask = Object.keys(changes).filter((name) => name !== "revision").join(",");
    try {
      const headers = { "Idempotency-Key": newId() };
      await patch(path("runs", run.runId), { ...changes, updateMask }, headers);
      said.replaceChildren();
      announce(done);
      return true;
    } catch (error) {
      said.replaceChildren(problem(error));
      return false;
    } finally {
      this.refresh();
    }
  }
}

// Whether a run can be edited: it waits, and has not begun its turn.
function isWaiting(run) {
  return !run.attempt && ["RUN_STATE_QUEUED", "RUN_STATE_ACCEPTED"].includes(run.state);
}
