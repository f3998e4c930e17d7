/** One slot of a worker: a call of `Work`, opened again whenever it is lost. */
import { setTimeout as sleep } from 'node:timers/promises';

import { type ClientDuplexStream, type Metadata, type ServiceError, status } from '@grpc/grpc-js';

import type { WorkerServiceClient, WorkRequest, WorkResponse } from '../gen/runlane/worker/v1/worker_service.js';
import { Attempt, type Message } from './attempt.js';
import type { Agent } from './turn.js';

const MISTAKES = [
  status.INVALID_ARGUMENT,
  status.NOT_FOUND,
  status.PERMISSION_DENIED,
  status.UNAUTHENTICATED,
  status.UNIMPLEMENTED,
];
const MAX_PAUSE = 2000;

/** Executes one run at a time (W1). `clients` lead to nodes of the same store. */
export class Slot {
  private attempt: Attempt | undefined;
  private call: ClientDuplexStream<WorkRequest, WorkResponse> | undefined;
  private hasOffered = false;
  private hasTakenBack = false; // the offer
  private isStopping = false;
  private isClosed = false;
  private wasServed = false;

  constructor(
    private readonly clients: WorkerServiceClient[],
    private readonly agents: Record<string, Agent>,
    private readonly workerId: string,
    private readonly metadata: Metadata,
  ) {}

  /** Serves until `stop`. Throws a ServiceError if a new call would fail too. */
  async serve(): Promise<void> {
    let pause = 100;
    for (;;) {
      this.wasServed = false;
      try {
        await this.connect();
      } catch (error) {
        if (MISTAKES.includes((error as ServiceError).code)) throw error; // W11
        if (!this.isDone) console.error(`reconnecting: ${(error as Error).message}`);
      }
      if (this.isDone) return;
      if (this.wasServed) pause = 100;
      await sleep(pause); // W8
      pause = Math.min(2 * pause, MAX_PAUSE);
      this.clients.push(...this.clients.splice(0, 1));
    }
  }

  /** Offers no more; `serve` returns once the attempt has ended. */
  stop(): void {
    this.isStopping = true;
    this.flush();
  }

  /** Gives the turn back (W10). */
  handBack(): void {
    this.attempt?.handBack();
  }

  /** Gives up what is left. */
  close(): void {
    this.isStopping = this.isClosed = true;
    this.attempt?.stop();
    this.call?.cancel();
  }

  private get isDone(): boolean {
    return this.isClosed || (this.isStopping && !this.attempt);
  }

  /** Serves over one connection. */
  private async connect(): Promise<void> {
    this.hasOffered = this.hasTakenBack = false;
    if (this.attempt) this.attempt.isSynced = false;
    const call = this.clients[0]!.work(this.metadata);
    this.call = call;
    try {
      this.flush();
      for await (const { message } of call as AsyncIterable<WorkResponse>) {
        this.wasServed = true;
        this.take(message);
        if (this.attempt?.isOver) await this.attempt.returned;
        this.flush();
      }
    } finally {
      this.call = undefined;
      call.on('error', () => undefined); // a status that arrives after the end
      call.cancel();
    }
  }

  private take(message: WorkResponse['message']): void {
    if (this.hasTakenBack) {
      // A turn that came at the same time goes back.
      if (message?.$case === 'acked' && message.value.ended) this.hasOffered = false;
    } else if (message?.$case === 'turn') {
      this.attempt = new Attempt(message.value, this.agents[message.value.agent]!, () => this.flush());
    } else {
      this.attempt?.take(message);
    }
  }

  /** Sends what is due. */
  private flush(): void {
    for (let message = this.next(); message && this.call; message = this.next()) {
      this.call.write({ message });
    }
    if (this.call && this.isDone && !this.hasOffered) this.call.end();
  }

  private next(): Message {
    if (!this.call) return undefined;
    if (this.attempt?.isOver) {
      if (!this.attempt.isReturned) return undefined;
      this.attempt = undefined;
      this.hasOffered = false;
    }
    if (!this.hasOffered) {
      if (this.isDone) return undefined;
      this.hasOffered = true;
      const resume = this.attempt?.resumption;
      return {
        $case: 'offer',
        value: { agents: Object.keys(this.agents), workerId: this.workerId, protocolVersion: 1, resume },
      };
    }
    if (this.attempt) return this.attempt.next();
    if (!this.isStopping || this.hasTakenBack) return undefined;
    this.hasTakenBack = true;
    return { $case: 'handBack', value: {} };
  }
}
