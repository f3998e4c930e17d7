// Makes elements. Text becomes text nodes only, so that no data is read as HTML. What a browser would
// reorder or hide in it is escaped.

import { visible } from "/console/text.js";

const READ = new Set(["aria-label", "title", "placeholder"]);

export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== undefined) {
      made.setAttribute(key, READ.has(key) ? visible(value) : value);
    }
  }
  const given = children.filter((child) => child !== null && child !== undefined);
  made.append(...given.map((child) => (child instanceof Node ? child : visible(String(child)))));
  return made;
}

// Names the view in the title of the window.
export function entitle(text) {
  document.title = visible(`${text} · Runlane`);
}

export function link(text, ...parts) {
  return el("a", { href: hash(...parts) }, text);
}

export function hash(...parts) {
  return "#/" + parts.map(encodeURIComponent).join("/");
}

// A labelled control.
export function field(label, control) {
  return el("label", { class: "field" }, el("span", {}, label), control);
}

export function select(name, options, chosen = "") {
  const made = el("select", { name });
  for (const [value, text] of options) {
    made.append(el("option", { value, selected: value === chosen }, text));
  }
  return made;
}

export function button(text, onclick, attributes = {}) {
  return el("button", { type: "button", onclick, ...attributes }, text);
}

// A table whose rows stay the same elements while their items do, so that a refresh
// moves neither the focus nor a selection.
export function table(caption, titles) {
  const body = el("tbody");
  const head = el("tr", {}, ...titles.map((title) => el("th", { scope: "col" }, title)));
  const made = el("table", {}, el("caption", {}, caption), el("thead", {}, head), body);
  const row = (cells) =>
    el("tr", {}, ...cells.map((cell, n) => el("td", { "data-title": titles[n] }, cell)));
  return {
    node: made,
    show: (items, key, cells) => keyed(body, items, key, (item) => row(cells(item))),
  };
}

const shown = new WeakMap();

export function keyed(parent, items, key, make) {
  const before = shown.get(parent) ?? new Map();
  const after = new Map();
  let place = parent.firstChild;
  for (const item of items) {
    const text = JSON.stringify(item);
    const old = before.get(key(item));
    let node = old?.node;
    if (old?.text !== text) {
      node = make(item);
      if (old) {
        if (old.node === place) place = place.nextSibling;
        exchange(old.node, node);
      }
    }
    if (node === place) place = place.nextSibling;
    else if (node.nextSibling !== place || !node.parentNode) parent.insertBefore(node, place);
    after.set(key(item), { node, text });
  }
  const kept = new Set([...after.values()].map((each) => each.node));
  for (const node of [...parent.childNodes]) if (!kept.has(node)) node.remove();
  shown.set(parent, after);
}

// Replaces an element, with the focus on the same control as before.
function exchange(old, node) {
  const controls = (root) => [...root.querySelectorAll("a, button, input, select, textarea")];
  const at = controls(old).indexOf(document.activeElement);
  old.replaceWith(node);
  if (at >= 0) controls(node)[at]?.focus();
}

export function announce(text) {
  document.getElementById("announcer").textContent = visible(text);
}

// True if the reader is at the end of the page, and wants to see what comes.
export function atEnd() {
  return innerHeight + scrollY >= document.documentElement.scrollHeight - 80;
}

export function scrollToEnd() {
  scrollTo(0, document.documentElement.scrollHeight);
}

export function problem(error) {
  return el("p", { class: "problem", role: "alert" }, error.message);
}

// Words

export function word(text, prefix) {
  return (text ?? "").replace(prefix, "").toLowerCase().replaceAll("_", " ");
}

export function state(text) {
  const name = word(text, "RUN_STATE_");
  return el("span", { class: "state " + name.replaceAll(" ", "-") }, name);
}

export function time(text) {
  if (!text) return "";
  const at = new Date(text);
  const today = at.toDateString() === new Date().toDateString();
  const shownAs = today ? at.toLocaleTimeString() : at.toLocaleString();
  return el("time", { datetime: text, title: at.toISOString() }, shownAs);
}

export function seconds(from, to) {
  if (!from || !to) return "";
  const ms = new Date(to) - new Date(from);
  return ms < 60_000 ? `${(ms / 1000).toFixed(3)} s` : `${Math.round(ms / 1000)} s`;
}
