// Text of others, as it may be shown to people who decide by it.

// What a browser reorders or shows as nothing: the characters that the command line escapes too.
const UNSAFE = new RegExp(
  "[" +
    "\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f" + // control characters, but newline and tab
    "\\u2028\\u2029" + // line separators
    "\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069" + // direction of text
    // Shown as nothing (Default_Ignorable_Code_Point, without the variation selectors of emoji).
    "\\u00ad\\u034f\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f\\u200b-\\u200d\\u2060-\\u2065" +
    "\\u206a-\\u206f\\u3164\\ufeff\\uffa0\\ufff0-\\ufffb\\u{1bca0}-\\u{1bca3}\\u{1d173}-\\u{1d17a}" +
    "\\u{e0000}-\\u{e0fff}" +
    "\\ud800-\\udfff" +
    "]",
  "gu",
);

const JOINERS = "\u200c\u200d";

// Escapes what a browser would reorder or hide, as `\u202e`.
export function visible(text) {
  return text.replace(UNSAFE, codePoint);
}

// The same for text that nobody decides by. It keeps the joiners of emoji and of some scripts.
export function prose(text) {
  return text.replace(UNSAFE, (each) => (JOINERS.includes(each) ? each : codePoint(each)));
}

export function isVisible(text) {
  return text.search(UNSAFE) < 0;
}

function codePoint(character) {
  const code = character.codePointAt(0);
  return code < 0x10000 ? "\\u" + hex(code) : `\\u{${hex(code)}}`;
}

function hex(code) {
  return code.toString(16).padStart(4, "0");
}

// JSON

const TOKEN = /"(?:[^"\\]|\\.)*"|[{}[\],:]|[^\s"{}[\],:]+/g;
const OPENS = "{[";
const CLOSES = "}]";

// Indents JSON and escapes what is not visible. The value stays the same: it is not read and
// written again, which would round large numbers and drop repeated names. Other text is only
// made visible.
export function json(text = "") {
  if (!isJson(text)) return visible(text);
  let out = "";
  let depth = 0;
  let last = "";
  for (const [token] of text.matchAll(TOKEN)) {
    if (CLOSES.includes(token)) depth -= 1;
    if (CLOSES.includes(token) ? !OPENS.includes(last || " ") : OPENS.includes(last || " ")) {
      out += line(depth);
    }
    out += token[0] === '"' ? string(token) : token;
    if (token === ",") out += line(depth);
    if (token === ":") out += " ";
    if (OPENS.includes(token)) depth += 1;
    last = token;
  }
  return out;
}

export function isJson(text) {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

// True if a number in JSON has more digits than JavaScript keeps.
export function isRounded(text) {
  const numbers = [...text.matchAll(TOKEN)].map(([token]) => token).filter((each) => /^[-\d]/.test(each));
  return numbers.some((each) => each.replace(/e.*|\D/gi, "").length > 15 || !isFinite(Number(each)));
}

// A number that a person has written, as JSON; it keeps all its digits.
export function jsonNumber(text) {
  if (/^-?(0|[1-9]\d*)(\.\d+)?(e[+-]?\d+)?$/i.test(text)) return text;
  if (/^-?\d+$/.test(text)) return String(BigInt(text));
  return JSON.stringify(Number(text));
}

function line(depth) {
  return "\n" + "  ".repeat(depth);
}

function string(token) {
  return JSON.stringify(JSON.parse(token)).replace(UNSAFE, escaped);
}

// In the notation of JSON, which has no code points above U+FFFF.
function escaped(character) {
  return [...Array(character.length).keys()].map((n) => "\\u" + hex(character.charCodeAt(n))).join("");
}
