// The agents of the node that answers.

import { get, path } from "/console/api.js";
import { el, entitle, problem, table } from "/console/dom.js";
import { poll } from "/console/live.js";

export function showAgents(main, signal) {
  entitle("Agents");
  const titles = ["Name", "Kind", "State", "Default", "Slots in use", "Can"];
  const list = table("Agents of this node", titles);
  const said = el("div");
  main.replaceChildren(el("h1", {}, "Agents"), said, list.node);
  const load = async () => {
    const { agents = [] } = await get(path("agents"), {}, signal);
    said.replaceChildren();
    list.show(agents, (agent) => agent.name, cells);
  };
  poll(load, 2000, signal, (error) => said.replaceChildren(problem(error)));
}

function cells(agent) {
  const used = agent.slotsInUse ?? 0;
  return [
    agent.name,
    agent.kind,
    agent.ready ? "ready" : "not ready",
    agent.isDefault ? "yes" : "",
    agent.slotsLimit === undefined ? `${used}` : `${used} of ${agent.slotsLimit}`,
    (agent.can ?? []).map((ability) => ability.replace("AGENT_ABILITY_", "").toLowerCase()).join(", "),
  ];
}
