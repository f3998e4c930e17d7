// Webhooks: their health and deliveries, and what an operator does with them.

import { get, path, post, request } from "/console/api.js";
import { announce, button, el, entitle, field, problem, table, time } from "/console/dom.js";
import { poll } from "/console/live.js";
import { Pages } from "/console/paging.js";
import { visible } from "/console/text.js";

const TITLES = ["URL", "State", "Delivered", "Waiting", "Last success", "Last error", "Actions"];

export function showWebhooks(main, signal) {
  entitle("Webhooks");
  const list = table("Webhooks, latest first", TITLES);
  const said = el("div");
  const done = el("div");
  const pages = new Pages(() => refresh());
  const load = async () => {
    const token = pages.token;
    const found = await get(path("webhooks"), { page_token: token }, signal);
    if (token !== pages.token) return;
    pages.take(found.nextPageToken);
    said.replaceChildren();
    list.show(found.webhooks ?? [], (webhook) => webhook.webhookId, (webhook) => cells(webhook, act));
    if (!found.webhooks) said.replaceChildren(el("p", {}, "There are no webhooks."));
  };
  const act = async (work, text) => {
    try {
      const answer = await work();
      done.replaceChildren(answer?.secret ? secretOf(answer) : el("p", { role: "status" }, text));
      announce(text);
    } catch (error) {
      done.replaceChildren(problem(error));
    }
    refresh();
  };
  main.replaceChildren(el("h1", {}, "Webhooks"), creation(act), done, said, list.node, pages.node);
  const refresh = poll(load, 2000, signal, (error) => said.replaceChildren(problem(error)));
}

function creation(act) {
  const url = el("input", { name: "url", type: "url", required: true });
  const full = el("input", { name: "full", type: "checkbox" });
  const create = async (event) => {
    event.preventDefault();
    const body = { url: url.value.trim(), full: full.checked };
    await act(() => post(path("webhooks"), body), "The webhook was created.");
  };
  return el(
    "details",
    {},
    el("summary", {}, "New webhook"),
    el("form", { onsubmit: create }, field("URL", url), field("With texts", full), el("button", {}, "Create")),
  );
}

// The server shows a secret in this answer only.
function secretOf({ webhook, secret }) {
  return el(
    "section",
    { "aria-label": "Secret" },
    el("p", {}, `The secret of ${webhook.url}. It is not shown again:`),
    el("pre", { class: "secret" }, secret),
    button("Hide", (event) => event.target.parentNode.remove()),
  );
}

function cells(webhook, act) {
  const health = webhook.health ?? {};
  return [
    webhook.url,
    stateOf(webhook, health),
    `${health.delivered ?? 0}`,
    `${health.heldSessions ?? 0}`,
    time(health.lastSuccessAt),
    health.disabledReason || health.lastError || "",
    actions(webhook, act),
  ];
}

function stateOf(webhook, health) {
  if (!webhook.enabled || health.disabledReason) return "disabled";
  if (health.failingSince) return "failing";
  return health.confirmed ? "delivering" : "unconfirmed";
}

function actions(webhook, act) {
  const its = (name) => `${path("webhooks", webhook.webhookId)}${name}`;
  const named = (text, work, said) =>
    button(text, () => act(work, said), { "aria-label": `${text} ${webhook.url}` });
  const change = async (enabled) => {
    const body = JSON.stringify({ enabled, updateMask: "enabled", etag: webhook.etag });
    const headers = { "Content-Type": "application/json" };
    await request(its(""), { method: "PATCH", body, headers });
  };
  return el(
    "span",
    { class: "actions" },
    webhook.enabled
      ? named("Disable", () => change(false), "The webhook is disabled.")
      : named("Enable", () => change(true), "The webhook is enabled."),
    named(
      "Redeliver",
      () => post(its(":redeliver"), { fromBeginning: true }),
      "Everything in the event log is delivered again.",
    ),
    named("Rotate secret", () => post(its(":rotateSecret")), "The secret was rotated."),
    named("Delete", () => remove(webhook, its("")), "The webhook was deleted."),
  );
}

async function remove(webhook, address) {
  if (!confirm(visible(`Delete the webhook ${webhook.url}?`))) throw new Error("The webhook was kept.");
  await request(address, { method: "DELETE" });
}
