// A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names, until SIGTERM.
// The page docs/workers.md lists its duties; their numbers stand in the comments.
import { setTimeout as sleep } from 'node:timers/promises';

import {
  type ClientDuplexStream,
  credentials,
  Metadata,
  type ServiceError,
  status,
} from '@grpc/grpc-js';

import {
  type Event,
  WorkerServiceClient,
  WorkRequest,
  type WorkResponse,
  type WorkResponse_Folded,
  type WorkResponse_Turn,
} from './gen/runlane/worker/v1/worker_service.js';

const SLOTS = 4;
const MAX_MESSAGE = (4 << 20) + (64 << 10); // bytes
const MAX_TEXT = 4096; // characters in an event
const MAX_EVENTS = 100; // in an emit, which so stays below 2 MiB
const MISTAKES = [
  status.INVALID_ARGUMENT,
  status.NOT_FOUND,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
];

const LOOPBACK = /^(localhost|127\.\d+\.\d+\.\d+|\[::1\]):\d+$/;

/** The agent: says the prompt in capitals, a word at a time, then the prompts that joined the turn. */
async function answer(attempt: Attempt): Promise<void> {
  let prompts = [attempt.turn.prompt];
  while (prompts.length > 0) {
    for (const word of prompts.join(' ').split(/\s+/).filter(Boolean)) {
      await attempt.say(`${word.toUpperCase()} `);
      await sleep(20, undefined, { signal: attempt.stopped });
    }
    prompts = await attempt.takeFolded(); // W9
  }
}

type Message = WorkRequest['message'];

/** A turn in hand. It outlives the connection. */
class Attempt {
  readonly returned: Promise<void>;
  private readonly controller = new AbortController();
  private waiting: Event[] = []; // not acknowledged (W4)
  private acked = 0;
  private sent = 0; // on this connection
  private everSent = 0; // the last event that must stay as it is (W3)
  private end: Message;
  private isEndSent = false;
  private folded: string[] = [];
  private readonly foldedRunIds: string[] = [];
  private foldNumber = 0;
  private isFoldAsked = false;
  private onFolded: (() => void) | undefined;
  private onRoom: (() => void) | undefined;

  constructor(
    readonly turn: WorkResponse_Turn,
    private readonly wake: () => void,
  ) {
    this.returned = this.execute();
  }

  get stopped(): AbortSignal {
    return this.controller.signal;
  }

  private get last(): number {
    return this.acked + this.waiting.length;
  }

  private async execute(): Promise<void> {
    let failure = '';
    try {
      await answer(this);
    } catch (error) {
      if (!this.stopped.aborted) failure = String(error);
    }
    this.end = failure // W5
      ? { $case: 'fail', value: { ...NOTHING, number: this.last, reason: '', message: failure } }
      : { $case: 'finish', value: { ...NOTHING, number: this.last, finishReason: 0 } };
    this.wake();
  }

  stop(): void {
    this.controller.abort();
    this.onRoom?.();
    this.onFolded?.();
  }

  async say(text: string): Promise<void> {
    const characters = [...text];
    for (let at = 0; at < characters.length; at += MAX_TEXT) {
      while (this.waiting.length >= this.turn.window && !this.stopped.aborted) {
        await new Promise<void>((resolve) => (this.onRoom = resolve)); // W4
      }
      this.stopped.throwIfAborted();
      this.add(characters.slice(at, at + MAX_TEXT).join(''));
      this.wake();
    }
  }

  private add(text: string): void {
    const event = this.waiting.at(-1)?.event;
    const isNew = this.last > this.everSent;
    if (isNew && event?.$case === 'textDelta' && event.value.length + text.length <= MAX_TEXT) {
      event.value += text; // W3
    } else {
      this.waiting.push({ event: { $case: 'textDelta', value: text } });
    }
  }

  async takeFolded(): Promise<string[]> {
    this.stopped.throwIfAborted();
    const answered = new Promise<void>((resolve) => (this.onFolded = resolve));
    this.foldNumber += 1;
    this.isFoldAsked = false;
    this.wake();
    await answered;
    this.onFolded = undefined;
    this.stopped.throwIfAborted();
    return this.folded.splice(0);
  }

  takeAcked(number: number): void {
    this.waiting.splice(0, number - this.acked);
    this.acked = Math.max(number, this.acked);
    this.onRoom?.();
  }

  /** Continues on a new connection after the last durable event (W8). */
  continue(): void {
    this.sent = this.acked;
    this.isEndSent = this.isFoldAsked = false;
  }

  takePrompts({ number, prompts }: WorkResponse_Folded): void {
    for (const { runId, prompt } of prompts) {
      this.foldedRunIds.push(runId);
      this.folded.push(prompt);
    }
    if (number === this.foldNumber) this.onFolded?.();
  }

  /** What to send now, if anything: one emit at a time (W2, W3), then a question or the end. */
  next(): Message {
    const isUrgent = this.end !== undefined || this.onFolded !== undefined;
    if (this.last > this.sent && (isUrgent || this.sent === this.acked)) {
      const first = this.sent - this.acked;
      const events = this.waiting.slice(first, first + MAX_EVENTS);
      const number = this.sent + 1;
      this.sent += events.length;
      this.everSent = Math.max(this.everSent, this.sent);
      return { $case: 'emit', value: { number, events } };
    }
    if (this.onFolded && !this.isFoldAsked) {
      this.isFoldAsked = true;
      return { $case: 'takeFolded', value: { number: this.foldNumber } };
    }
    if (!this.end || this.isEndSent) return undefined;
    this.isEndSent = true;
    return this.end;
  }

  get resume() {
    const { runId, tenant, attempt, fence } = this.turn;
    return { runId, tenant, attempt, fence, acknowledged: this.acked, foldedRunIds: this.foldedRunIds };
  }
}

const NOTHING = { usage: undefined, model: '', resultJson: '' };

/** Executes one run at a time (W1). */
class Slot {
  private attempt: Attempt | undefined;
  private call: ClientDuplexStream<WorkRequest, WorkResponse> | undefined;
  private isSynced = false; // whether the server knows the attempt on this connection
  private isStopping = false;
  private hasEnded = false;

  constructor(
    private readonly client: WorkerServiceClient,
    private readonly agent: string,
  ) {}

  async serve(): Promise<void> {
    let pause = 100;
    while (!this.hasEnded) {
      const began = Date.now();
      try {
        await this.connect();
      } catch (error) {
        if (MISTAKES.includes((error as ServiceError).code)) throw error; // W11
        console.error(`reconnecting: ${(error as Error).message}`);
      }
      if (this.hasEnded || (this.isStopping && !this.attempt)) return;
      if (Date.now() - began > 60_000) pause = 100;
      await sleep(pause); // W8
      pause = Math.min(2 * pause, 2000);
    }
  }

  async stop(): Promise<void> {
    this.isStopping = true;
    this.attempt?.stop();
    await this.attempt?.returned;
    this.send({ $case: 'handBack', value: {} }); // W10
  }

  /** Serves over one connection. */
  private async connect(): Promise<void> {
    const metadata = new Metadata();
    const token = process.env['RUNLANE_TOKEN'];
    if (token) metadata.set('authorization', `Bearer ${token}`);
    const call = this.client.work(metadata);
    this.call = call;
    this.isSynced = this.attempt === undefined;
    try {
      this.offer();
      if (this.isStopping) void this.stop();
      for await (const { message } of call as AsyncIterable<WorkResponse>) {
        await this.take(message);
        if (this.hasEnded) return;
      }
    } finally {
      this.call = undefined;
      call.on('error', () => undefined); // a status that arrives after the end
      call.cancel();
    }
  }

  private async take(message: WorkResponse['message']): Promise<void> {
    let isOver = false;
    switch (message?.$case) {
      case 'turn':
        if (this.isStopping) break;
        this.send({ $case: 'begun', value: {} }); // W2
        this.attempt = new Attempt(message.value, () => this.flush());
        break;
      case 'acked':
        this.attempt?.takeAcked(message.value.number);
        if (!this.isSynced) this.attempt?.continue();
        this.isSynced = true;
        isOver = message.value.ended;
        break;
      case 'folded':
        this.attempt?.takePrompts(message.value);
        break;
      case 'cancel': // W6
        this.attempt?.stop();
        break;
      case 'fenced': // W7
        isOver = true;
    }
    if (!isOver) return this.flush();
    const attempt = this.attempt;
    this.attempt = undefined;
    this.isSynced = true;
    attempt?.stop();
    await attempt?.returned;
    this.hasEnded = this.isStopping;
    if (!this.hasEnded) this.offer();
  }

  private offer(): void {
    const resume = this.attempt?.resume;
    const workerId = `typescript-${process.pid}`;
    this.send({ $case: 'offer', value: { agents: [this.agent], workerId, protocolVersion: 1, resume } });
  }

  private flush(): void {
    if (!this.call || !this.attempt || !this.isSynced || this.isStopping) return;
    for (let message = this.attempt.next(); message; message = this.attempt.next()) {
      this.send(message);
    }
  }

  private send(message: Message): void {
    this.call?.write({ message });
  }
}

const server = process.env['RUNLANE_SERVER'] || '127.0.0.1:50051';
const agent = process.env['RUNLANE_AGENT'] || 'default';
if (process.env['RUNLANE_TOKEN'] && !LOOPBACK.test(server)) {
  console.error(`RUNLANE_TOKEN is not sent to ${server}: the connection is not encrypted`);
  process.exit(1);
}
const client = new WorkerServiceClient(server, credentials.createInsecure(), {
  'grpc.max_receive_message_length': MAX_MESSAGE,
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 5_000,
  // By default, grpc waits up to two minutes between attempts to connect: longer than the worker lease.
  'grpc.initial_reconnect_backoff_ms': 100,
  'grpc.max_reconnect_backoff_ms': 2_000,
});
const slots = Array.from({ length: SLOTS }, () => new Slot(client, agent));
for (const signal of ['SIGINT', 'SIGTERM'] as const) {
  process.once(signal, () => slots.forEach((slot) => void slot.stop()));
}
console.log(`worker for ${agent}: ${SLOTS} slots`);
try {
  await Promise.all(slots.map((slot) => slot.serve()));
} catch (error) {
  console.error((error as Error).message);
  process.exit(1);
}
client.close();
