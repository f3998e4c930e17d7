/** A turn in hand: what is to be sent for it. */
import { createHash } from 'node:crypto';

import type { Message as TranscriptMessage } from '../gen/runlane/v1/session.js';
import {
  Event,
  type Question,
  WorkRequest,
  WorkRequest_Finish,
  type WorkResponse,
  type WorkResponse_Acked,
  type WorkResponse_FoldedPrompt,
  type WorkResponse_Turn,
} from '../gen/runlane/worker/v1/worker_service.js';
import { type Agent, AgentError, Turn, type Yielded } from './turn.js';

export const MAX_TEXT = 4096; // characters in an event
const MAX_EVENTS = 1000; // in an emit
const MAX_EMIT_BYTES = 1 << 20; // unless a single event is larger
const MAX_ERROR = 2048; // characters

export type Message = WorkRequest['message'];

interface Request {
  message: Message;
  isSent: boolean;
  answered: Promise<unknown>;
  resolve: (answer: unknown) => void;
  reject: (error: unknown) => void;
}

/** The attempt outlives the connection. */
export class Attempt {
  readonly finish = WorkRequest_Finish.fromPartial({});
  /** Done when the agent has returned. */
  readonly returned: Promise<void>;
  isOver = false; // the server has confirmed the end, or has taken the attempt away
  isSynced = true; // whether the server knows the attempt on this connection
  private readonly controller = new AbortController();
  private isBegun = false;
  isReturned = false;
  private waiting: Event[] = []; // not acknowledged (W4)
  private acked = 0;
  private sent = 0; // on this connection
  private everSent = 0; // the last event that must stay as it is (W3)
  private urgent = 0;
  private readonly requests = new Map<string, Request>();
  private readonly asked = new Map<string, number>();
  private foldNumber = 0;
  private folded: WorkResponse_FoldedPrompt[] = [];
  private readonly foldedRunIds: string[] = [];
  private history: TranscriptMessage[] = [];
  private onAckedOnce: (() => void)[] = [];
  private end: Message;
  private isEndSent = false;

  constructor(
    private readonly turn: WorkResponse_Turn,
    agent: Agent,
    private readonly wake: () => void,
  ) {
    this.returned = this.execute(agent);
  }

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  private get last(): number {
    return this.acked + this.waiting.length;
  }

  // --- The agent

  private async execute(agent: Agent): Promise<void> {
    let end: Message;
    try {
      await this.play(new Turn(this.turn, this), agent);
      end = this.finished();
    } catch (error) {
      end = this.signal.aborted ? this.finished() : this.failed(error); // W6
    }
    this.end ??= end;
    this.isReturned = true;
    this.wake();
  }

  private async play(turn: Turn, agent: Agent): Promise<void> {
    await Promise.resolve(); // not before the constructor has returned
    const said = agent(turn);
    if (typeof said === 'object' && Symbol.asyncIterator in said) {
      for await (const one of said) await this.say(turn, one);
    } else {
      await this.say(turn, await said);
    }
  }

  private async say(turn: Turn, said: Yielded | void): Promise<void> {
    if (typeof said === 'string') await turn.say(said);
    else if (said) await turn.emit(said);
  }

  private finished(): Message {
    return { $case: 'finish', value: { ...this.finish, number: this.last } };
  }

  private failed(failure: unknown): Message {
    const { usage, model } = this.finish;
    const reason = failure instanceof AgentError ? failure.reason : '';
    const message = describe(failure).slice(0, MAX_ERROR);
    return { $case: 'fail', value: { number: this.last, reason, message, usage, model } };
  }

  async emit(event: Event): Promise<void> {
    while (this.waiting.length >= Math.max(1, this.turn.window) && !this.signal.aborted) await this.nextAcked(); // W4
    this.signal.throwIfAborted();
    const before = this.waiting.at(-1);
    if (!(before && this.last > this.everSent && join(before, event))) this.waiting.push(event);
    this.wake();
  }

  /** Emits an event, and waits until it is durable. */
  async keep(event: Event): Promise<void> {
    await this.emit(event);
    const number = this.last;
    this.urgent += 1;
    this.wake();
    while (this.acked < number && !this.signal.aborted) await this.nextAcked();
    this.urgent -= 1;
    this.signal.throwIfAborted();
  }

  private nextAcked(): Promise<void> {
    return new Promise((resolve) => this.onAckedOnce.push(resolve));
  }

  /** Sends a message and waits for its answer. A request that is open is not sent twice. */
  async ask<T>(name: string, message: Message): Promise<T> {
    this.signal.throwIfAborted();
    let request = this.requests.get(name);
    if (!request) {
      let resolve: Request['resolve'] = () => undefined;
      let reject: Request['reject'] = () => undefined;
      const answered = new Promise<unknown>((yes, no) => ([resolve, reject] = [yes, no]));
      request = { message, isSent: false, answered, resolve, reject };
      this.requests.set(name, request);
      this.wake();
    }
    return (await request.answered) as T;
  }

  async takeFolded(): Promise<WorkResponse_FoldedPrompt[]> {
    this.foldNumber += 1;
    await this.ask('folded', { $case: 'takeFolded', value: { number: this.foldNumber } });
    return this.folded.splice(0);
  }

  /** The same key in each attempt that asks the same; equal questions are counted. */
  keyed(question: Question): Question {
    if (question.key) return question;
    const shown = JSON.stringify({ ...question, timeout: undefined, defaultJson: undefined });
    const digest = createHash('sha256').update(shown).digest('hex').slice(0, 24);
    const number = (this.asked.get(digest) ?? 0) + 1;
    this.asked.set(digest, number);
    return { ...question, key: `${digest}-${number}` };
  }

  // --- The connection

  /** Stops the agent (W6). */
  stop(): void {
    this.controller.abort();
    this.requests.forEach((one) => one.reject(this.signal.reason));
    this.requests.clear();
    this.resume();
  }

  /** Stops the agent, and gives the turn back once it has returned (W10). */
  handBack(): void {
    if (this.end) return;
    this.end = { $case: 'handBack', value: {} };
    this.waiting.length = Math.max(0, this.sent - this.acked);
    this.stop();
  }

  private resume(): void {
    this.onAckedOnce.splice(0).forEach((resolve) => resolve());
  }

  take(message: WorkResponse['message']): void {
    switch (message?.$case) {
      case 'acked':
        return this.takeAcked(message.value);
      case 'folded':
        this.folded.push(...message.value.prompts);
        this.foldedRunIds.push(...message.value.prompts.map((one) => one.runId));
        if (message.value.number > 0) this.answer('folded', undefined);
        return;
      case 'history':
        this.history.push(...message.value.messages);
        if (message.value.last) this.answer('history', this.history.splice(0));
        return;
      case 'step':
        return this.answer(`step ${message.value.key}`, message.value.result);
      case 'answers': {
        const answers = message.value.answers;
        return this.answer(`ask ${answers.map((one) => one.key).join('\n')}`, answers.map((one) => one.answer));
      }
      case 'cancel':
        return this.stop();
      case 'fenced': // W7
      case 'parked': // W13
        this.isOver = true;
        return this.stop();
    }
  }

  private answer(name: string, value: unknown): void {
    this.requests.get(name)?.resolve(value);
    this.requests.delete(name);
  }

  private takeAcked({ number, ended }: WorkResponse_Acked): void {
    this.waiting.splice(0, Math.max(0, number - this.acked));
    this.acked = Math.max(number, this.acked);
    this.isOver ||= ended;
    if (!this.isSynced) {
      // W8: continue after the last durable event.
      this.isSynced = this.isBegun = true;
      this.sent = this.acked;
      this.isEndSent = false;
      this.history = [];
      this.requests.forEach((one) => (one.isSent = false));
    }
    this.resume();
  }

  /** What to send now, if anything. One emit at a time: what comes meanwhile is joined (W3). */
  next(): Message {
    if (!this.isSynced || this.isOver) return undefined;
    if (!this.isBegun) {
      this.isBegun = true;
      return { $case: 'begun', value: {} }; // W2
    }
    const request = [...this.requests.values()].find((one) => !one.isSent);
    const isUrgent = this.end !== undefined || this.urgent > 0 || request !== undefined;
    if (this.last > this.sent && (isUrgent || this.sent === this.acked)) return this.nextEmit();
    if (request) {
      request.isSent = true;
      return request.message;
    }
    if (!this.end || !this.isReturned || this.isEndSent) return undefined;
    this.isEndSent = true;
    return this.end; // W5
  }

  private nextEmit(): Message {
    const events: Event[] = [];
    let size = 0;
    for (const event of this.waiting.slice(this.sent - this.acked)) {
      size += Event.encode(event).finish().length;
      if (events.length > 0 && (size > MAX_EMIT_BYTES || events.length === MAX_EVENTS)) break;
      events.push(event);
    }
    const number = this.sent + 1;
    this.sent += events.length;
    this.everSent = Math.max(this.everSent, this.sent);
    return { $case: 'emit', value: { number, events } };
  }

  get resumption() {
    const { runId, tenant, attempt, fence } = this.turn;
    return { runId, tenant, attempt, fence, acknowledged: this.acked, foldedRunIds: this.foldedRunIds };
  }
}

/** A text for any value that an agent throws, also for one without a text. */
function describe(failure: unknown): string {
  try {
    return String(failure instanceof AgentError ? failure.message : failure);
  } catch {
    return 'the agent threw a value without a text';
  }
}

/** Joins a text with the event before it; returns whether that is possible. */
function join({ event: first }: Event, { event: second }: Event): boolean {
  for (const kind of ['textDelta', 'reasoningDelta'] as const) {
    if (first?.$case === kind && second?.$case === kind && first.value.length + second.value.length <= MAX_TEXT) {
      first.value += second.value;
      return true;
    }
  }
  return false;
}
