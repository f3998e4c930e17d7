// Messages and their parts.

import { el, link, time, word } from "/console/dom.js";
import { json, prose } from "/console/text.js";

// Finish reasons that a reader expects.
const USUAL = ["stop", "tool calls"];

export function messageNode(message) {
  const isUser = message.role === "ROLE_USER";
  const finish = word(message.finishReason, "FINISH_REASON_");
  return el(
    "article",
    { class: "message " + (isUser ? "user" : "agent"), "data-run": message.runId },
    el(
      "header",
      {},
      el("strong", {}, word(message.role, "ROLE_")),
      time(message.createdAt),
      finish && !USUAL.includes(finish) ? el("span", { class: "finish" }, finish) : null,
      message.model ? el("span", {}, message.model) : null,
      message.runId ? link("run", "runs", message.runId) : null,
    ),
    ...joined(message.parts ?? []).map(partNode),
  );
}

// Joins adjacent texts, and adjacent reasoning.
function joined(parts) {
  const all = [];
  for (const part of parts) {
    const last = all.at(-1);
    if (last?.text !== undefined && part.text !== undefined) last.text += part.text;
    else if (last?.reasoning !== undefined && part.reasoning !== undefined) {
      last.reasoning += part.reasoning;
    } else all.push({ ...part });
  }
  return all;
}

export function partNode(part) {
  if (part.text !== undefined) return textNode(part.text);
  if (part.reasoning !== undefined) return folded("Reasoning", part.reasoning);
  if (part.toolCall) return folded(`Tool call: ${part.toolCall.name}`, json(part.toolCall.argumentsJson));
  if (part.toolResult) return resultNode(part.toolResult);
  if (part.artifact) return artifactNode(part.artifact);
  if (part.result !== undefined) return folded("Result", json(part.result));
  if (part.attachment) return attachmentNode(part.attachment);
  // A kind that this console does not know yet.
  return folded(Object.keys(part).join(", ") || "Empty part", JSON.stringify(part, null, 2));
}

export function textNode(text) {
  return el("div", { class: "text" }, document.createTextNode(prose(text)));
}

export function folded(title, text, attributes = {}) {
  return el("details", attributes, el("summary", {}, title), el("pre", { tabindex: 0 }, text));
}

function resultNode(result) {
  const title = `Tool result: ${result.name ?? ""}${result.isError ? " (error)" : ""}`;
  return folded(title, result.content ?? "", { class: result.isError ? "failed" : "" });
}

// An address in it stays text: it may lead anywhere.
export function artifactNode(artifact) {
  const kind = artifact.mimeType ? ` (${artifact.mimeType})` : "";
  return folded(`Artifact: ${artifact.name || artifact.artifactId}${kind}`, artifactText(artifact));
}

export function artifactText(artifact) {
  if (artifact.data !== undefined) return `about ${byteCount(artifact.data)} bytes\n`;
  return artifact.text ?? artifact.uri ?? json(artifact.json);
}

// The size of what is in Base64.
function byteCount(text) {
  return Math.floor((text.length * 3) / 4);
}

function attachmentNode(attachment) {
  const title = `Attachment: ${attachment.name || "without a name"} (${attachment.mimeType})`;
  if (attachment.text !== undefined) return folded(title, attachment.text);
  return el("p", {}, `${title}, about ${byteCount(attachment.data ?? "")} bytes`);
}
