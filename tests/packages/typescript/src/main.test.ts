import assert from 'node:assert/strict';
import { test } from 'node:test';
import { credentials } from '@grpc/grpc-js';
import { RunAcceptedRequest, RunServiceClient, RunState, WaitRunRequest } from 'runlane/v1';
import { RunlaneServer } from 'runlane/testing';

test('a run', async (t) => {
  const server = await RunlaneServer.start();
  t.after(() => server.stop());
  const runs = new RunServiceClient(server.address, credentials.createInsecure());

  const request = RunAcceptedRequest.fromPartial({ sessionId: 's', prompt: 'Hello', allowMissing: true });
  const runId = await new Promise<string>((resolve, reject) => {
    runs.runAccepted(request, (error, response) => (error ? reject(error) : resolve(response.run?.runId ?? '')));
  });
  const state = await new Promise((resolve, reject) => {
    const wait = WaitRunRequest.fromPartial({ runId, timeout: { seconds: 20 } });
    runs.waitRun(wait, (error, response) => (error ? reject(error) : resolve(response.run?.state)));
  });
  assert.equal(state, RunState.RUN_STATE_COMPLETED);
  runs.close();
});

test('a server that cannot start says why', async () => {
  await assert.rejects(RunlaneServer.start('--agent', 'nobody'), /there is no agent 'nobody'/);
});
