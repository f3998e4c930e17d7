// The controls for a JSON Schema: one for each property of a flat object, else one for the JSON.

import { el, field, json, select } from "/console/dom.js";
import { folded } from "/console/messages.js";

export function formOf(schemaJson) {
  let schema = {};
  try {
    schema = JSON.parse(schemaJson);
  } catch {
    // It is shown as it is.
  }
  const properties = Object.entries(schema.properties ?? {});
  if (!properties.length || !properties.every(([, each]) => KINDS[kind(each)])) {
    return whole(schemaJson);
  }
  const controls = properties.map(([name, each]) => {
    const isRequired = (schema.required ?? []).includes(name);
    return { name, ...KINDS[kind(each)](name, each, isRequired) };
  });
  return {
    nodes: controls.map(({ name, control, label }) => field(label ?? name, control)),
    value: () =>
      Object.fromEntries(
        controls.map(({ name, read }) => [name, read()]).filter(([, value]) => value !== undefined),
      ),
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
  const read = () => (control.value === "" ? undefined : property.enum[Number(control.value)]);
  return { control, label: title(name, property), read };
}

function check(name, property) {
  const control = el("input", { name, type: "checkbox", checked: property.default === true });
  return { control, label: title(name, property), read: () => control.checked };
}

function line(name, property, isRequired) {
  const control = el("input", { name, required: isRequired, value: property.default ?? "" });
  const read = () => (control.value || isRequired ? control.value : undefined);
  return { control, label: title(name, property), read };
}

function number(name, property, isRequired) {
  const control = el("input", {
    name,
    type: "number",
    step: property.type === "integer" ? "1" : "any",
    required: isRequired,
    value: property.default ?? "",
  });
  const read = () => (control.value === "" ? undefined : Number(control.value));
  return { control, label: title(name, property), read };
}

function whole(schemaJson) {
  const control = el("textarea", { name: "json", rows: 4, required: true }, "{}");
  const read = () => {
    try {
      return JSON.parse(control.value);
    } catch {
      throw new Error("The answer is not JSON.");
    }
  };
  return { nodes: [field("Answer as JSON", control), folded("Schema", json(schemaJson))], value: read };
}
