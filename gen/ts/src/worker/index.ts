/**
 * Executes runs of a Runlane server in this process. It does what the page docs/workers.md asks of a
 * worker; the numbers W1 to W14 stand in the comments.
 *
 *     await new Worker({ agents: { default: (turn) => turn.prompt.toUpperCase() }, slots: 8 }).run();
 */
import { hostname } from 'node:os';

import { type ChannelCredentials, credentials, Metadata } from '@grpc/grpc-js';

import { WorkerServiceClient } from '../gen/runlane/worker/v1/worker_service.js';
import type { Agent } from './attempt.js';
import { Slot } from './slot.js';

export { type Agent, AgentError, Turn, type Yielded } from './attempt.js';
export { Artifact, FinishReason, ToolCall, ToolResult, Usage } from '../gen/runlane/v1/run.js';
export { InputAnswer } from '../gen/runlane/v1/input.js';
export { Event, Question } from '../gen/runlane/worker/v1/worker_service.js';

export const DEFAULT_SERVER = '127.0.0.1:50051';

const MAX_MESSAGE = (4 << 20) + (64 << 10);
const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$/;
const HAND_BACK_TIMEOUT = 5000;

export interface WorkerOptions {
  /** The agents by name; `default` is the agent of a server with one. */
  agents: Record<string, Agent>;
  /** The addresses of one or more nodes of the same store. */
  servers?: string[];
  /** The number of runs that are executed at a time; the default is 1. */
  slots?: number;
  /** The bearer token, which needs the role work. It is sent to another machine only over TLS. */
  token?: string;
  /** Credentials for TLS; the default is plaintext. */
  credentials?: ChannelCredentials;
  /** How long active runs may continue after `stop` before they are given back, in milliseconds. */
  drain?: number;
  /** The name of the worker in the logs of the server. */
  name?: string;
}

/** Executes runs of the agents that a server declares as `worker`. */
export class Worker {
  private slots: Slot[] = [];
  private onStop: () => void = () => undefined;
  private readonly stopping = new Promise<void>((resolve) => (this.onStop = resolve));

  constructor(private readonly options: WorkerOptions) {}

  /** Makes `run` return, after the active runs or `drain`. */
  stop(): void {
    this.onStop();
  }

  /** Executes runs until SIGTERM, SIGINT or `stop`. Throws a ServiceError if the server refuses the worker. */
  async run(): Promise<void> {
    const { agents, slots = 1, drain = 0, token = '' } = this.options;
    const clients = this.connect(this.options.servers ?? [DEFAULT_SERVER], token);
    const metadata = new Metadata();
    if (token) metadata.set('authorization', `Bearer ${token}`);
    const name = this.options.name ?? `${hostname()}:${process.pid}`;
    this.slots = Array.from({ length: slots }, (_, n) => {
      const first = n % clients.length;
      return new Slot([...clients.slice(first), ...clients.slice(0, first)], agents, name, metadata);
    });
    const onSignal = () => this.stop();
    for (const signal of ['SIGINT', 'SIGTERM'] as const) process.once(signal, onSignal);
    const served = Promise.all(this.slots.map((slot) => slot.serve()));
    try {
      await Promise.race([served, this.stopping]);
      this.slots.forEach((slot) => slot.stop());
      await atMost(drain, served);
      this.slots.forEach((slot) => slot.handBack());
      await atMost(HAND_BACK_TIMEOUT, served);
    } finally {
      this.slots.forEach((slot) => slot.close());
      for (const signal of ['SIGINT', 'SIGTERM'] as const) process.off(signal, onSignal);
      clients.forEach((client) => client.close());
      served.catch(() => undefined);
    }
  }

  private connect(servers: string[], token: string): WorkerServiceClient[] {
    for (const server of servers) {
      if (token && !this.options.credentials && !LOOPBACK.test(server)) {
        throw new Error(`token: is not sent to ${server}: the connection is not encrypted; set credentials`);
      }
    }
    const secure = this.options.credentials ?? credentials.createInsecure();
    return servers.map(
      (server) =>
        new WorkerServiceClient(server, secure, {
          'grpc.max_receive_message_length': MAX_MESSAGE, // W1
          'grpc.keepalive_time_ms': 10_000,
          'grpc.keepalive_timeout_ms': 5_000,
          // By default, grpc waits up to two minutes between attempts to connect: longer than the worker
          // lease (W8).
          'grpc.initial_reconnect_backoff_ms': 100,
          'grpc.max_reconnect_backoff_ms': 2_000,
        }),
    );
  }
}

async function atMost(milliseconds: number, done: Promise<unknown>): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<void>((resolve) => (timer = setTimeout(resolve, milliseconds)));
  await Promise.race([done, late]).finally(() => clearTimeout(timer));
}
