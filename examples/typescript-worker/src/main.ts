// A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names, until SIGTERM.
import { setTimeout as sleep } from 'node:timers/promises';

import { AgentError, DEFAULT_SERVER, type Turn, Worker } from 'runlane/worker';

const SLOTS = 4;

/** Says the prompt in capitals, a word at a time, then the prompts that joined the turn. */
async function* answer(turn: Turn) {
  if (turn.prompt.startsWith('release ')) {
    yield await release(turn, turn.prompt.slice('release '.length));
    return;
  }
  if (turn.prompt === 'recall') {
    yield await recall(turn);
    return;
  }
  let prompts = [turn.prompt];
  while (prompts.length > 0) {
    for (const word of prompts.join(' ').split(/\s+/).filter(Boolean)) {
      yield `${word.toUpperCase()} `;
      await sleep(20, undefined, { signal: turn.signal });
    }
    prompts = (await turn.takeFolded()).map((folded) => folded.prompt);
  }
}

/** Builds once, also if it is called again, asks people, and deploys. */
async function release(turn: Turn, version: string): Promise<string> {
  const build = await turn.step('build', () => {
    console.log('building', version);
    return `app-${version}`;
  });
  const [answer] = await turn.ask({ text: `May I deploy ${build}?`, toolName: 'deploy' });
  if (answer?.value?.$case !== 'approval' || !answer.value.value.approved) {
    throw new AgentError('nothing was deployed', 'NOT_APPROVED');
  }
  await turn.artifact({
    artifactId: 'notes',
    name: 'notes.txt',
    mimeType: 'text/plain',
    content: { $case: 'text', value: `Release ${version}` },
    last: true,
  });
  await turn.custom('deployed', { build });
  turn.setResult({ build });
  return `Deployed ${build}.`;
}

/** Says what the earlier turns of the session said. */
async function recall(turn: Turn): Promise<string> {
  const parts = (await turn.history()).flatMap((message) => message.parts);
  return parts.map(({ part }) => `${part?.$case === 'text' ? part.value : ''}|`).join('');
}

const agent = process.env['RUNLANE_AGENT'] || 'default';
console.log(`worker for ${agent}: ${SLOTS} slots`);
try {
  const worker = new Worker({
    servers: [process.env['RUNLANE_SERVER'] || DEFAULT_SERVER],
    token: process.env['RUNLANE_TOKEN'] ?? '',
    agents: { [agent]: answer },
    slots: SLOTS,
  });
  await worker.run();
} catch (error) {
  console.error((error as Error).message);
  process.exit(1);
}
