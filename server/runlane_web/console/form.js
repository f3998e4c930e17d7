// The controls for a JSON Schema: one for each property of a flat object, else one for the JSON.

import { el, field, select } from "/console/dom.js";
import { folded } from "/console/messages.js";
import { isJson, isRounded, isVisible, json, jsonNumber } from "/console/text.js";

// Its value is JSON as text, so that a number keeps all its digits.
export function formOf(schemaJson) {
  let schema = {};
  try {
    schema = JSON.parse(schemaJson);
  } catch {
    // It is shown as it is.
  }
  const properties = Object.entries(schema.properties ?? {});
  const isFlat = properties.length && properties.every(([, each]) => KINDS[kind(each)]);
  if (!isFlat || isRounded(schemaJson)) {
    return whole(schemaJson);
  }
  const controls = properties.map(([name, each]) => {
    const isRequired = (schema.required ?? []).includes(name);
    return { name, ...KINDS[kind(each)](name, each, isRequired) };
  });
  return {
    nodes: controls.map(({ name, control, label }) => field(label ?? name, control)),
    value: () => {
      const all = controls.map(({ name, read }) => [name, read()]);
      const given = all.filter(([, value]) => value !== undefined);
      return `{${given.map(([name, value]) => `${JSON.stringify(name)}:${value}`).join(",")}}`;
    },
  };
}

const kind = (property) => (property.enum ? "enum" : property.type);

const KINDS = { enum: choice, boolean: check, string: line, integer: number, number };

function title(name, property) {
  return property.title ?? property.description ?? name;
}

function choice(name, property, isRequired) {
  const options = property.enum.map((each, n) => [String(n), String(each)]);
  const control = select(name, isRequired ? options : [["", ""], ...options]);
  const read = () => 
    control.value === "" ? undefined : JSON.stringify(property.enum[Number(control.value)]);
  return { control, label: title(name, property), read };
}

function check(name, property) {
  const control = el("input", { name, type: "checkbox", checked: property.default === true });
  return { control, label: title(name, property), read: () => String(control.checked) };
}

function line(name, property, isRequired) {
  const given = String(property.default ?? "");
  // A field shows no hidden characters: who answers would send what they do not see.
  const isShown = isVisible(given);
  const control = el("input", { name, required: isRequired, value: isShown ? given : "" });
  const read = () => (control.value || isRequired ? JSON.stringify(control.value) : undefined);
  const label = title(name, property);
  return { control, label: isShown ? label : `${label} (proposed: ${given})`, read };
}

function number(name, property, isRequired) {
  const control = el("input", {
    name,
    type: "number",
    step: property.type === "integer" ? "1" : "any",
    required: isRequired,
    value: property.default ?? "",
  });
  const read = () => (control.value === "" ? undefined : jsonNumber(control.value));
  return { control, label: title(name, property), read };
}

function whole(schemaJson) {
  const control = el("textarea", { name: "json", rows: 4, required: true }, "{}");
  const read = () => {
    if (!isJson(control.value)) throw new Error("The answer is not JSON.");
    return control.value;
  };
  return { nodes: [field("Answer as JSON", control), folded("Schema", json(schemaJson))], value: read };
}
