// Runs one prompt to its end and cancels another, with the packed npm package.
import { credentials, type requestCallback } from '@grpc/grpc-js';
import {
  CancelRequest,
  type CancelResponse,
  RunAcceptedRequest,
  type RunAcceptedResponse,
  RunServiceClient,
  RunState,
  SubscribeRunRequest,
  type SubscribeRunResponse,
} from 'runlane/v1';
import { HarnessServiceClient } from 'runlane/harness/v1';

const [server = '', first = '', second = ''] = process.argv.slice(2);
const runs = new RunServiceClient(server, credentials.createInsecure());

/** Prints the text of a run and its end. With `cancel`, it cancels the run at its first text. */
async function follow(prompt: string, cancel: boolean): Promise<void> {
  const sessionId = 'typescript';
  const request = RunAcceptedRequest.fromPartial({ sessionId, prompt, allowMissing: true });
  const { run } = await called<RunAcceptedResponse>((done) => runs.runAccepted(request, done));
  const events: AsyncIterable<SubscribeRunResponse> = runs.subscribeRun(
    SubscribeRunRequest.fromPartial({ runId: run?.runId }),
  );
  for await (const { event } of events) {
    if (event?.event?.$case === 'textDelta') {
      console.log(event.event.value.text);
      const session = CancelRequest.fromPartial({ sessionId });
      if (cancel) await called<CancelResponse>((done) => runs.cancel(session, done));
    }
    if (event?.event?.$case === 'runComplete') console.log(RunState[event.event.value.state]);
  }
}

function called<Response>(start: (done: requestCallback<Response>) => unknown): Promise<Response> {
  return new Promise((resolve, reject) => {
    start((error, response) => (error ? reject(error) : resolve(response as Response)));
  });
}

if (typeof HarnessServiceClient !== 'function') throw new Error('no client of the harness');
await follow(first, false);
await follow(second, true);
