// The receipt of a cancel: each run that it covered, and the state of that run.

import { button, el, link, state, table } from "/console/dom.js";

export function receiptNode(receipt) {
  const runs = receipt.cancelled ?? [];
  const made = el("section", { class: "receipt", "aria-label": "Receipt of the cancel" });
  const dismiss = button("Dismiss", () => made.remove());
  if (!runs.length) {
    made.append(el("p", {}, "There was nothing to cancel."), dismiss);
    return made;
  }
  const fence = `Cancelled ${runs.length}; the fence is ${receipt.fenceAcceptSeq}.`;
  const list = table(fence, ["Number", "Run", "State at the cancel"]);
  list.show(runs, (run) => run.runId, (run) => [
    run.acceptSeq,
    link(run.runId, "runs", run.runId),
    state(run.stateWhenCancelled),
  ]);
  made.append(list.node, dismiss);
  return made;
}
