// Questions of agents to people, and their answers.

import { get, newId, post } from "/console/api.js";
import { announce, button, el, entitle, field, keyed, link, problem, time, word } from "/console/dom.js";
import { formOf } from "/console/form.js";
import { poll } from "/console/live.js";
import { isJson, json } from "/console/text.js";

export function openQuestions(query, signal) {
  return get("/v1/input-requests", { states: "INPUT_STATE_OPEN", page_size: 200, ...query }, signal);
}

export function showQuestions(main, signal) {
  entitle("Questions");
  const said = el("div", { role: "status" });
  const list = el("div");
  main.replaceChildren(el("h1", {}, "Questions"), said, list);
  const load = async () => {
    const { inputRequests = [] } = await openQuestions({}, signal);
    said.textContent = inputRequests.length ? "" : "No agent asks.";
    showQuestionsIn(list, inputRequests);
  };
  poll(load, 1000, signal, (error) => said.replaceChildren(problem(error)));
}

// A question that stays keeps its form, with what the reader has filled in.
export function showQuestionsIn(parent, questions) {
  // What became of an answer stays when the question is gone.
  const report = (node) => parent.before(node);
  const make = (question) => questionNode(question, report);
  keyed(parent, questions, (question) => question.inputRequestId, make);
}

const CONTROLS = {
  INPUT_KIND_APPROVAL: approval,
  INPUT_KIND_CHOICE: choice,
  INPUT_KIND_FORM: form,
  INPUT_KIND_TEXT: text,
};

function questionNode(question, report) {
  const said = el("div");
  // The same answer again, after a lost connection, is no second answer.
  const answerId = newId();
  const answer = async (value) => {
    const where = `/v1/input-requests/${encodeURIComponent(question.inputRequestId)}:answer`;
    const body = { answerId, questionDigest: question.questionDigest, ...value };
    try {
      const problemText = refusal(await post(where, body));
      said.replaceChildren("Answered.");
      if (problemText) report(problem({ message: problemText }));
      else announce("Answered.");
    } catch (error) {
      said.replaceChildren(problem(error));
    }
  };
  const asked = el("p", { class: "text" }, question.text ?? "");
  const controls = CONTROLS[question.kind]?.(question, answer, said) ?? null;
  return el(
    "section",
    { class: "question", "aria-label": `Question: ${question.text ?? ""}` },
    asked,
    el(
      "p",
      { class: "note" },
      "Session ",
      link(question.sessionId, "sessions", question.sessionId),
      ", asked ",
      time(question.requestedAt),
      ...(question.expiresAt ? [", expires ", time(question.expiresAt)] : []),
    ),
    controls,
    said,
  );
}

// Says why an answer does not count; empty if it does.
function refusal({ inputRequest, acceptedThisAnswer }) {
  if (acceptedThisAnswer) return "";
  const by = inputRequest.answer?.answeredBy;
  const state = word(inputRequest.state, "INPUT_STATE_");
  return `The answer does not count: the question was ${state}${by ? ` by ${by}` : ""} before.`;
}

function approval(question, answer, said) {
  const given = json(question.argumentsJson);
  const rows = Math.min(24, Math.max(4, given.split("\n").length));
  const edited = el("textarea", { name: "arguments", rows }, given);
  const reason = el("input", { name: "reason" });
  const decide = (approved) => () => {
    // What nobody has changed is approved as it came.
    const argumentsJson = approved && edited.value !== given ? edited.value : "";
    if (argumentsJson && !isJson(argumentsJson)) {
      return said.replaceChildren(problem({ message: "The arguments are not JSON." }));
    }
    return answer({ approval: { approved, argumentsJson, reason: reason.value } });
  };
  return el(
    "div",
    {},
    el("p", {}, "Tool ", el("strong", {}, question.toolName ?? "")),
    field("Arguments", edited),
    field("Reason", reason),
    el("p", { class: "actions" }, button("Approve", decide(true)), button("Deny", decide(false))),
  );
}

function choice(question, answer) {
  const choices = question.choices ?? [];
  return el(
    "p",
    { class: "actions" },
    ...choices.map((each) => button(each, () => answer({ choice: each }))),
  );
}

function text(question, answer) {
  const input = el("textarea", { name: "answer", rows: 2, required: true });
  const send = (event) => (event.preventDefault(), answer({ text: input.value }));
  return el("form", { onsubmit: send }, field("Answer", input), el("button", {}, "Answer"));
}

function form(question, answer, said) {
  const fields = formOf(question.schemaJson);
  const send = (event) => {
    event.preventDefault();
    try {
      answer({ formJson: fields.value() });
    } catch (error) {
      said.replaceChildren(problem(error));
    }
  };
  return el("form", { onsubmit: send }, ...fields.nodes, el("button", {}, "Answer"));
}
