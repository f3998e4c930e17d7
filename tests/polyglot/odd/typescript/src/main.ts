// Agents that go wrong (test_odd_workers.py).
import { once } from 'node:events';

import { AgentError, type Turn, Worker } from 'runlane/worker';

async function answer(turn: Turn): Promise<string> {
  switch (turn.prompt) {
    case 'wordless':
      throw Object.create(null);
    case 'no text':
      throw new AgentError(undefined as unknown as string, 'NO_MODEL');
    case 'early':
      console.log('let go');
      await once(turn.signal, 'abort');
      break;
    case 'half':
      await turn.step('mail \ud800', () => '\ud800');
      turn.report({ model: 'model \ud800' });
      break;
    case 'nothing':
      await turn.step('mail', () => undefined);
      await turn.custom('sent', undefined);
      turn.setResult(undefined);
  }
  return 'ok';
}

console.log('worker for default: 1 slot');
await new Worker({ servers: [process.env['RUNLANE_SERVER'] ?? ''], agents: { default: answer }, slots: 1 }).run();
