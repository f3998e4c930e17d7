// The console: signs in, and shows the view that the address names.

import { get, path, token } from "/console/api.js";
import { el, entitle, field, link } from "/console/dom.js";
import { showAgents } from "/console/agents.js";
import { showQuestions } from "/console/questions.js";
import { showRun } from "/console/run.js";
import { showRuns } from "/console/runs.js";
import { showSession } from "/console/session.js";
import { showSessions } from "/console/sessions.js";
import { showWebhooks } from "/console/webhooks.js";
import { visible } from "/console/text.js";

const main = document.getElementById("main");
const nav = document.getElementById("nav");
const signOutButton = document.getElementById("sign-out");
const VIEWS = ["sessions", "runs", "questions", "agents", "webhooks"];

let leaving = new AbortController();

function show() {
  if (takeToken()) return;
  leaving.abort();
  leaving = new AbortController();
  main.replaceChildren();
  const isSignedIn = Boolean(token.get());
  nav.hidden = signOutButton.hidden = !isSignedIn;
  if (!isSignedIn) return showSignIn("");
  const [where, query] = location.hash.slice(2).split("?");
  const parts = where.split("/").map(decode);
  showNav(parts[0] || "sessions");
  // Each view gets a signal that ends its polls and streams when the view is left.
  view(parts, new URLSearchParams(query), leaving.signal);
  main.focus();
  scrollTo(0, 0);
}

function view([name, id], query, signal) {
  if (name === "sessions" && id) return showSession(main, id, signal);
  if (name === "runs" && id) return showRun(main, id, signal);
  if (name === "runs") return showRuns(main, query, signal);
  if (name === "questions") return showQuestions(main, signal);
  if (name === "agents") return showAgents(main, signal);
  if (name === "webhooks") return showWebhooks(main, signal);
  return showSessions(main, signal);
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// Takes the token out of the address, so that it stays in no history and in no screenshot.
function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!given || !location.hash.startsWith("#token=")) return false;
  token.set(given);
  history.replaceState(null, "", location.pathname + "#/sessions");
  show();
  return true;
}

function showNav(current) {
  nav.replaceChildren(
    ...VIEWS.map((name) => {
      const made = link(name[0].toUpperCase() + name.slice(1), name);
      if (name === current) made.setAttribute("aria-current", "page");
      return made;
    }),
  );
}

function showSignIn(message) {
  const input = el("input", { type: "password", name: "token", autocomplete: "off", required: true });
  const said = el("p", { class: "problem", role: "alert" }, message);
  const signIn = async (event) => {
    event.preventDefault();
    const given = input.value.trim();
    if (!/^[!-~]+$/.test(given)) {
      said.textContent = "A token has no spaces and no letters beyond ASCII.";
      return;
    }
    token.set(given);
    try {
      await get(path("sessions"), { page_size: 1 });
    } catch (error) {
      // A token may be good for other things than this list.
      if (error.reason !== "PERMISSION_DENIED") {
        token.clear();
        said.textContent = visible(error.message);
        return;
      }
    }
    show();
  };
  const form = el("form", { onsubmit: signIn }, field("Token", input), el("button", {}, "Sign in"));
  entitle("Sign in");
  main.replaceChildren(
    el("h1", {}, "Sign in"),
    el("p", {}, "The server prints the address with a token when it starts; or use your own token."),
    form,
    said,
  );
  input.focus();
}

function signOut(message = "") {
  token.clear();
  leaving.abort();
  nav.hidden = signOutButton.hidden = true;
  showSignIn(message);
}

signOutButton.addEventListener("click", () => signOut());
addEventListener("signed-out", (event) => token.get() && signOut(event.detail));
// The link to the content moves the focus only.
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", show);
show();
