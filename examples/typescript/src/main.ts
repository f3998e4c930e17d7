// Quickstart: runs a prompt in a session and prints the answer as it arrives. Ctrl-C cancels the run.
import { type CallOptions, credentials, Metadata, type requestCallback } from '@grpc/grpc-js';

import { type RunComplete, RunState } from './gen/runlane/v1/run.js';
import {
  CancelRequest,
  type CancelResponse,
  RunAcceptedRequest,
  type RunAcceptedResponse,
  RunServiceClient,
  SubscribeRunRequest,
  type SubscribeRunResponse,
} from './gen/runlane/v1/run_service.js';

const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$/;

async function run(sessionId: string, prompt: string): Promise<RunComplete> {
  const server = process.env['RUNLANE_SERVER'] || '127.0.0.1:50051';
  const token = process.env['RUNLANE_TOKEN'];
  const metadata = new Metadata();
  if (token) {
    if (!LOOPBACK.test(server)) {
      throw new Error(`RUNLANE_TOKEN is not sent to ${server}: the connection is not encrypted`);
    }
    metadata.set('authorization', `Bearer ${token}`);
  }
  const runs = new RunServiceClient(server, credentials.createInsecure());

  const request = RunAcceptedRequest.fromPartial({ sessionId, prompt, allowMissing: true });
  const accepted = inTime<RunAcceptedResponse>((options, done) =>
    runs.runAccepted(request, metadata, options, done),
  );
  const cancel = async () => {
    const request = CancelRequest.fromPartial({ runId: (await accepted).run?.runId });
    await inTime<CancelResponse>((options, done) => runs.cancel(request, metadata, options, done));
  };
  // The stream stays open after Ctrl-C, so that it delivers the end of the cancelled run. Only once:
  // a second Ctrl-C ends the program.
  process.once('SIGINT', () => cancel().catch(fail));

  const runId = (await accepted).run?.runId;
  const events: AsyncIterable<SubscribeRunResponse> = runs.subscribeRun(
    SubscribeRunRequest.fromPartial({ runId }),
    metadata,
  );
  for await (const { event } of events) {
    if (event?.event?.$case === 'textDelta') process.stdout.write(event.event.value.text);
    if (event?.event?.$case === 'runComplete') return event.event.value;
  }
  throw new Error('the stream ended before the run');
}

/** A unary call as a promise, with a deadline. */
function inTime<Response>(
  start: (options: CallOptions, done: requestCallback<Response>) => unknown,
): Promise<Response> {
  return new Promise((resolve, reject) => {
    start({ deadline: Date.now() + 10_000 }, (error, response) => {
      if (error) reject(error);
      else resolve(response as Response);
    });
  });
}

function fail(error: unknown): void {
  console.error(error instanceof Error ? error.message : error);
  process.exitCode = 1;
}

const [sessionId, prompt] = process.argv.slice(2);
try {
  if (!sessionId || !prompt) throw new Error('usage: node dist/main.js SESSION PROMPT');
  const { state, error } = await run(sessionId, prompt);
  const end = RunState[state].replace('RUN_STATE_', '').toLowerCase();
  process.stdout.write('\n');
  console.error(error ? `${end}: ${error.message}` : end);
  process.exitCode = state === RunState.RUN_STATE_COMPLETED ? 0 : 1;
} catch (error) {
  fail(error);
}
