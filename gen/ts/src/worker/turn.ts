/** The turn of a run, as an agent sees it. */
import type { InputAnswer } from '../gen/runlane/v1/input.js';
import type { Artifact, FinishReason, ToolCall, ToolResult, Usage } from '../gen/runlane/v1/run.js';
import type { Message as TranscriptMessage } from '../gen/runlane/v1/session.js';
import {
  Event,
  Question,
  type WorkResponse_FoldedPrompt,
  type WorkResponse_Turn,
} from '../gen/runlane/worker/v1/worker_service.js';
import { type Attempt, MAX_TEXT } from './attempt.js';

/** What an agent yields or returns: a text, or an event of any kind. */
export type Yielded = string | Event;

/** Answers a turn: returns the answer, or yields it in pieces. An error that it throws fails the run. */
export type Agent = (turn: Turn) => AsyncIterable<Yielded> | Promise<Yielded | void> | Yielded | void;

/** Fails a run with a reason of the agent's own, such as MODEL_UNAVAILABLE. */
export class AgentError extends Error {
  constructor(
    message: string,
    readonly reason: string,
  ) {
    super(message);
  }
}

/** The input of an agent, and what it may do. After a cancel all methods throw. */
export class Turn {
  readonly prompt: string;

  constructor(
    /** All of the turn: session, run, attempt, attachments, labels, deadline. */
    readonly given: WorkResponse_Turn,
    private readonly attempt: Attempt,
  ) {
    this.prompt = given.prompt;
  }

  /** Is aborted when the agent must stop: the run was cancelled, or taken away. */
  get signal(): AbortSignal {
    return this.attempt.signal;
  }

  /** Emits a piece of the answer. It waits while too much of the output is not durable. */
  async say(text: string): Promise<void> {
    for (const value of pieces(text)) await this.emit({ event: { $case: 'textDelta', value } });
  }

  /** Emits a piece of the model's reasoning. */
  async think(text: string): Promise<void> {
    for (const value of pieces(text)) await this.emit({ event: { $case: 'reasoningDelta', value } });
  }

  /** Reports that the agent calls a tool, which it executes itself. */
  async callTool(call: ToolCall): Promise<void> {
    await this.emit({ event: { $case: 'toolCall', value: call } });
  }

  /** Reports what a tool returned. */
  async toolReturned(result: ToolResult): Promise<void> {
    await this.emit({ event: { $case: 'toolResult', value: result } });
  }

  /** Emits an artifact, or a piece of one. */
  async artifact(artifact: Partial<Artifact>): Promise<void> {
    await this.emit(Event.fromPartial({ event: { $case: 'artifact', value: artifact } }));
  }

  /** Emits an event of a type that the agent defines; the value becomes JSON. */
  async custom(type: string, value: unknown): Promise<void> {
    await this.emit({ event: { $case: 'custom', value: { type, json: toJson(value) } } });
  }

  /** Emits an event of any kind. */
  async emit(event: Event): Promise<void> {
    await this.attempt.emit(event);
  }

  /** Sets the structured result of the run; the value becomes JSON. */
  setResult(value: unknown): void {
    this.attempt.finish.resultJson = toJson(value);
  }

  /** Sets facts about the turn. */
  report(facts: { usage?: Usage; model?: string; finishReason?: FinishReason }): void {
    Object.assign(this.attempt.finish, facts);
  }

  /** Takes the prompts that wait to join the turn. Call it between two steps: answer them too (W9). */
  async takeFolded(): Promise<WorkResponse_FoldedPrompt[]> {
    return this.attempt.takeFolded();
  }

  /** The transcript before the turn; a long message comes in several parts with the same id. */
  async history(): Promise<TranscriptMessage[]> {
    return this.attempt.ask<TranscriptMessage[]>('history', { $case: 'getHistory', value: {} });
  }

  /**
   * Does a piece of work once per run, also if an attempt is repeated: returns the result that an earlier
   * attempt has stored, or calls `work` and makes its result durable (W12). A key has 1 to 128 bytes.
   */
  async step<T>(name: string, work: () => T | Promise<T>): Promise<T> {
    const key = wellFormed(name);
    const found = await this.attempt.ask<string | undefined>(`step ${key}`, { $case: 'findStep', value: { key } });
    if (found !== undefined) return JSON.parse(found) as T;
    const result = await work();
    await this.attempt.keep({ event: { $case: 'step', value: { key, result: toJson(result) } } });
    return result;
  }

  /**
   * Asks people; the answers come in the order of the questions. If there is no answer yet it throws: the
   * run leaves this worker, and starts again, with any worker, once all is answered (W13). What the agent
   * does before happens again, so put what must not be repeated into steps. Without a key, the question
   * itself is the key: the same key gets the same answer, and nobody is asked twice.
   */
  async ask(...questions: Partial<Question>[]): Promise<InputAnswer[]> {
    const asked = questions.map((one) => this.attempt.keyed(Question.fromPartial(one)));
    for (const one of asked) one.key = wellFormed(one.key);
    const name = asked.map((one) => one.key).join('\n');
    return this.attempt.ask<InputAnswer[]>(`ask ${name}`, { $case: 'ask', value: { questions: asked, checkpoint: '' } });
  }
}

/** JSON has no undefined; what has no value is null. */
function toJson(value: unknown): string {
  return (JSON.stringify(value) as string | undefined) ?? 'null';
}

/** A text as it is sent: a lone half of a character becomes U+FFFD. The server answers with that. */
function wellFormed(text: string): string {
  return Buffer.from(text).toString();
}

/** A text in pieces that fit into an event. */
function* pieces(text: string): Iterable<string> {
  for (let at = 0; at < text.length; ) {
    let end = Math.min(at + MAX_TEXT, text.length);
    const last = text.charCodeAt(end - 1);
    if (end < text.length && last >= 0xd800 && last < 0xdc00) end--; // half of a character
    yield text.slice(at, end);
    at = end;
  }
}
