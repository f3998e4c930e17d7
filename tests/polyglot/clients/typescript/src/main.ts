/**
 * A Runlane client in one file: runs prompts, edits and cancels runs, forks sessions, and watches
 * completions and sessions.
 *
 * C1 to C17 are the rules of docs/clients.md; a comment marks the code that implements each one.
 */

import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import { isIPv4 } from 'node:net';
import { addAbortSignal } from 'node:stream';
import { setTimeout as sleep } from 'node:timers/promises';
import { parseArgs } from 'node:util';

import * as grpc from '@grpc/grpc-js';
import { v7 as uuidv7 } from 'uuid';

import { BadRequest, ErrorInfo, RetryInfo, Status } from './gen/rpc_status.js';
import { InputKind, type InputRequest } from './gen/runlane/v1/input.js';
import { FinishReason, type RunComplete, type RunEvent, RunState } from './gen/runlane/v1/run.js';
import {
  AnswerInputRequest,
  type AnswerInputResponse,
  CancelRequest,
  type CancelResponse,
  GetRunRequest,
  type GetRunResponse,
  RunAcceptedRequest,
  type RunAcceptedResponse,
  RunServiceClient,
  SubscribeRunCompleteRequest,
  SubscribeRunRequest,
  UpdateRunRequest,
  type UpdateRunResponse,
} from './gen/runlane/v1/run_service.js';
import {
  ForkSessionRequest,
  type ForkSessionResponse,
  SessionServiceClient,
  SubscribeSessionRequest,
  type SubscribeSessionResponse_Snapshot as Snapshot,
} from './gen/runlane/v1/session_service.js';

const USAGE = `usage:
  run SESSION PROMPT [--run-id ID] [--max-attempts N] [--answer TEXT]
  cancel SESSION [--run-id ID]
  watch [--cursor-file FILE] [--count N] [--silence SECONDS (45)]
  session SESSION [--cursor-file FILE] [--count N] [--silence SECONDS (45)]
  edit RUN PROMPT
  fork SESSION [NEW]
options of all: --target HOST:PORT (127.0.0.1:50051), --timeout SECONDS (10)`;

/** C10: how many completions `watch` remembers. A repeated one soon follows the first. */
const REMEMBERED = 1024;

// --- The commands --------------------------------------------------------------------------------

interface RunOptions {
  sessionId: string;
  prompt: string;
  runId: string;
  maxAttempts: number;
  /** C14: the answer to the agent's questions; without one, somebody else answers. */
  answer: string | undefined;
}

async function run(connection: Connection, options: RunOptions): Promise<number> {
  // Once only: a second Ctrl-C ends the program without waiting for anything.
  const interrupt = new AbortController();
  process.once('SIGINT', () => interrupt.abort());
  try {
    await accept(connection, options, interrupt.signal);
    log(`accepted ${options.runId}`);
    const complete = await follow(connection, options, interrupt.signal);
    await print('\n');
    const state = shortName(RunState, complete.state, 'RUN_STATE_').toLowerCase();
    log(`${state} ${shortName(FinishReason, complete.finishReason, 'FINISH_REASON_')}`);
    return complete.state === RunState.RUN_STATE_COMPLETED ? 0 : 1;
  } catch (error) {
    if (!interrupt.signal.aborted) throw error;
    await cancelInterrupted(connection, options.runId);
    return 130;
  }
}

/**
 * Accepts the run. An interrupt stops the retries, but not the current call: a run that is
 * accepted after its own cancel would stay active.
 */
function accept(
  connection: Connection,
  { sessionId, prompt, runId, maxAttempts }: RunOptions,
  interrupted: AbortSignal,
): Promise<RunAcceptedResponse> {
  // C1: every attempt sends the same id, created before the first one.
  const request = RunAcceptedRequest.fromPartial({
    sessionId,
    prompt,
    runId,
    maxAttempts,
    allowMissing: true,
  });
  return repeated<RunAcceptedResponse>(
    connection,
    (options, answer) =>
      connection.client.runAccepted(request, connection.metadata, options, answer),
    { signal: interrupted },
  );
}

/** C7: writes the text of a run as it arrives, each piece once; returns its end. */
async function follow(
  connection: Connection,
  { runId, answer }: RunOptions,
  interrupted: AbortSignal,
): Promise<RunComplete> {
  let lastIndex = 0;
  const open = () =>
    connection.client.subscribeRun(
      SubscribeRunRequest.fromPartial({ runId, afterIndex: lastIndex }),
      connection.metadata,
    );
  try {
    for await (const { event } of resumed(open, reconnecting, { signal: interrupted })) {
      if (event === undefined || event.index <= lastIndex) continue;
      lastIndex = event.index;
      if (event.event?.$case === 'runComplete') return event.event.value;
      await show(event);
      if (event.event?.$case === 'inputRequested' && event.event.value.inputRequest) {
        await ask(connection, event.event.value.inputRequest, answer, interrupted);
      }
    }
  } catch (error) {
    if (!(error instanceof Failure && error.reason === 'CURSOR_COMPACTED')) throw error;
  }
  const complete = await removed(connection, runId);
  if (lastIndex === 0) await print(complete.text);
  return complete;
}

async function show({ event }: RunEvent): Promise<void> {
  if (event?.$case === 'textDelta') {
    await print(event.value.text);
  } else if (event?.$case === 'started' && event.value.attempt > 1) {
    // C8: the node of the first attempt was lost; the answer starts over.
    log(`attempt ${event.value.attempt}`);
  }
}

/** C14: shows a question, and answers it if there is an answer. */
async function ask(
  connection: Connection,
  asked: InputRequest,
  answer: string | undefined,
  interrupted: AbortSignal,
): Promise<void> {
  const { inputRequestId, questionDigest } = asked;
  log(`asked ${inputRequestId} ${asked.text}`);
  if (answer === undefined) return;
  const request = AnswerInputRequest.fromPartial({
    inputRequestId,
    // Every attempt sends the same id, created before the first one.
    answerId: uuidv7(),
    questionDigest,
    answer: answerTo(asked.kind, answer),
  });
  try {
    const { acceptedThisAnswer } = await repeated<AnswerInputResponse>(
      connection,
      (options, done) => connection.client.answerInput(request, connection.metadata, options, done),
      { signal: interrupted },
    );
    log(`${acceptedThisAnswer ? 'answered' : 'answered before'} ${inputRequestId}`);
  } catch (error) {
    if (!(error instanceof Failure && error.reason === 'INPUT_CLOSED')) throw error;
    log(`closed ${inputRequestId}`);
  }
}

function answerTo(kind: InputKind, value: string): AnswerInputRequest['answer'] {
  switch (kind) {
    case InputKind.INPUT_KIND_APPROVAL:
      return {
        $case: 'approval',
        value: { approved: value === 'yes', argumentsJson: '', reason: '' },
      };
    case InputKind.INPUT_KIND_CHOICE:
      return { $case: 'choice', value };
    case InputKind.INPUT_KIND_FORM:
      return { $case: 'formJson', value };
    default:
      return { $case: 'text', value };
  }
}

/** C12: the end of a run whose events are compacted, because its id was used long ago. */
async function removed(connection: Connection, runId: string): Promise<RunComplete> {
  const { run } = await repeated<GetRunResponse>(connection, (options, answer) =>
    connection.client.getRun(
      GetRunRequest.fromPartial({ runId }),
      connection.metadata,
      options,
      answer,
    ),
  );
  const complete = run?.runComplete;
  if (complete === undefined) throw new Failure('DATA_LOSS', `run ${runId} has lost its events`);
  return complete;
}

async function cancelInterrupted(connection: Connection, runId: string): Promise<void> {
  try {
    await requestCancel(connection, { runId });
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    // Then the run was never accepted: nothing to cancel.
    if (error.reason !== 'RUN_NOT_FOUND') report(error);
  }
}

interface CancelOptions {
  sessionId?: string | undefined;
  runId?: string | undefined;
}

async function cancel(connection: Connection, options: CancelOptions): Promise<number> {
  exitWhenInterrupted();
  const { cancelled } = await requestCancel(connection, options);
  for (const { runId, stateWhenCancelled } of cancelled) {
    await print(`${runId} ${shortName(RunState, stateWhenCancelled, 'RUN_STATE_')}\n`);
  }
  return 0;
}

/** Replaces the prompt of a waiting run; prints the one before and the new revision. */
async function edit(connection: Connection, runId: string, prompt: string): Promise<number> {
  exitWhenInterrupted();
  const read = GetRunRequest.fromPartial({ runId, withPrompt: true });
  const found = await repeated<GetRunResponse>(connection, (options, answer) =>
    connection.client.getRun(read, connection.metadata, options, answer),
  );
  const request = UpdateRunRequest.fromPartial({
    runId,
    prompt,
    updateMask: ['prompt'],
    // C16: not over the edit of another, and once however often it is sent.
    revision: found.run?.revision ?? 0,
    updateId: uuidv7(),
  });
  const { run } = await repeated<UpdateRunResponse>(connection, (options, answer) =>
    connection.client.updateRun(request, connection.metadata, options, answer),
  );
  await print(`${found.prompt?.text}\n${run?.runId} ${run?.revision}\n`);
  return 0;
}

/** Copies a session up to its last finished turn; prints the new session and that turn. */
async function fork(
  connection: Connection,
  sessionId: string,
  newSessionId: string,
): Promise<number> {
  exitWhenInterrupted();
  // C17: every attempt sends the same id, created before the first one.
  const request = ForkSessionRequest.fromPartial({ sessionId, newSessionId });
  const { session } = await repeated<ForkSessionResponse>(connection, (options, answer) =>
    connection.sessions.forkSession(request, connection.metadata, options, answer),
  );
  await print(`${session?.sessionId} ${session?.origin?.turn}\n`);
  return 0;
}

function requestCancel(connection: Connection, options: CancelOptions): Promise<CancelResponse> {
  const request = CancelRequest.fromPartial(options);
  return repeated<CancelResponse>(
    connection,
    (callOptions, answer) =>
      connection.client.cancel(request, connection.metadata, callOptions, answer),
    // C6: a second cancel of a session could cover runs accepted after the first.
    { mayRepeat: (failure) => (options.runId ? failure.mayPass : failure.nothingDone) },
  );
}

interface WatchOptions {
  cursorFile?: string | undefined;
  /** Number of completions after which to stop. */
  count: number;
  /** C11: timeout of a stream without messages; a server sends a mark every 15 s. */
  silenceMs: number;
}

async function watch(connection: Connection, options: WatchOptions): Promise<number> {
  exitWhenInterrupted();
  const { cursorFile, count, silenceMs } = options;
  let cursor = readCursor(cursorFile);
  const open = () =>
    connection.client.subscribeRunComplete(
      SubscribeRunCompleteRequest.fromPartial({
        start: cursor ? { $case: 'cursor', value: cursor } : undefined,
      }),
      connection.metadata,
    );
  const lost = (failure: Failure): void => {
    cursor = whereToGoOn(failure) ?? cursor;
  };
  const known = new Set<string>();
  let established = false;
  let printed = 0;
  for await (const message of resumed(open, lost, { silenceMs })) {
    if (!established) log('watching');
    established = true;
    if (message.event?.$case === 'runComplete' && isNew(message.event.value, known)) {
      await print(endLine(message.event.value));
      printed += 1;
    }
    // C9: of progress marks too, and only after the event is processed.
    cursor = message.cursor;
    writeCursor(cursorFile, cursor);
    if (printed === count) break;
  }
  return 0;
}

/** C15: prints a session as it is, and what happens in it. */
async function session(
  connection: Connection,
  sessionId: string,
  { cursorFile, count, silenceMs }: WatchOptions,
): Promise<number> {
  exitWhenInterrupted();
  let cursor = readCursor(cursorFile);
  let parts: Snapshot[] = [];
  const open = () => {
    // The parts of a snapshot whose rest was lost are void.
    parts = [];
    return connection.sessions.subscribeSession(
      SubscribeSessionRequest.fromPartial({
        sessionIds: [sessionId],
        cursors: cursor ? [cursor] : [],
        withDeltas: true,
      }),
      connection.metadata,
    );
  };
  const lost = (failure: Failure): void => {
    if (failure.reason === 'CURSOR_COMPACTED' && cursor) {
      // A snapshot shows what the lost events have led to.
      log(`events after ${cursor} are gone`);
      cursor = undefined;
    } else {
      reconnecting(failure);
    }
  };
  let established = false;
  let printed = 0;
  for await (const { event, cursor: at } of resumed(open, lost, { silenceMs })) {
    if (!established) log('watching');
    established = true;
    let deleted = false;
    switch (event?.$case) {
      case 'snapshot':
        parts.push(event.value);
        if (!event.value.continues) await printSnapshot(parts);
        break;
      case 'runEvent':
        await printEvent(event.value.runId, event.value.event);
        if (event.value.event?.event?.$case === 'runComplete') printed += 1;
        break;
      case 'sessionChanged':
        deleted = event.value.session === undefined;
        if (deleted) await print('deleted\n');
        break;
    }
    // A mark, or a part of a snapshot, has no cursor.
    if (at === '' && !deleted) continue;
    // Only after the event is processed.
    cursor = at;
    writeCursor(cursorFile, cursor);
    if (deleted || printed === count) break;
  }
  return 0;
}

/** Prints the active run, the waiting runs, and the output of the active run so far. */
async function printSnapshot(parts: Snapshot[]): Promise<void> {
  const active = parts[0]?.activeRun?.runId ?? '-';
  const waiting = parts.flatMap(({ queue }) => queue.map(({ runId }) => runId));
  await print(`${['snapshot', active, ...waiting].join(' ')}\n`);
  for (const event of parts.flatMap(({ output }) => output)) await printEvent(active, event);
}

async function printEvent(runId: string, event: RunEvent | undefined): Promise<void> {
  if (event?.event?.$case === 'textDelta') await print(`${runId} text ${event.event.value.text}\n`);
  if (event?.event?.$case === 'runComplete') await print(endLine(event.event.value));
}

/** C12: the cursor that the server names to resume from, if any. */
function whereToGoOn(failure: Failure): string | undefined {
  const oldest = failure.metadata['oldest_cursor'];
  if (failure.reason === 'CURSOR_COMPACTED' && oldest) {
    log(`events before ${oldest} are gone`);
    return oldest;
  }
  reconnecting(failure);
  return (failure.reason === 'DRAINING' && failure.metadata['cursor']) || undefined;
}

/** C10: whether this completion is new. */
function isNew({ runId, endedAt }: RunComplete, known: Set<string>): boolean {
  // An id is free again once its session is deleted; the time distinguishes the two runs.
  const key = `${runId} ${endedAt?.toISOString()}`;
  if (known.has(key)) return false;
  known.add(key);
  if (known.size > REMEMBERED) {
    // A set keeps insertion order: the first entry is the oldest.
    const [oldest = ''] = known;
    known.delete(oldest);
  }
  return true;
}

function endLine({ runId, state, finishReason }: RunComplete): string {
  const stateName = shortName(RunState, state, 'RUN_STATE_');
  return `${runId} ${stateName} ${shortName(FinishReason, finishReason, 'FINISH_REASON_')}\n`;
}

function readCursor(file: string | undefined): string | undefined {
  if (file === undefined) return undefined;
  try {
    return readFileSync(file, 'utf8').trim();
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') return undefined;
    throw error;
  }
}

/** Replaces the file atomically: a crash leaves the old cursor or the new one. */
function writeCursor(file: string | undefined, cursor: string): void {
  if (file === undefined) return;
  writeFileSync(`${file}.new`, cursor, { flush: true });
  renameSync(`${file}.new`, file);
}

// --- The connection ------------------------------------------------------------------------------

interface Connection {
  client: RunServiceClient;
  sessions: SessionServiceClient;
  /** Sent with every call. */
  metadata: grpc.Metadata;
  /** Deadline of a call, including its retries. */
  timeoutMs: number;
}

function connect(target: string, timeoutMs: number): Connection {
  const metadata = new grpc.Metadata();
  const token = process.env['RUNLANE_TOKEN'];
  if (token) {
    // C13: anyone who sees the token can use it.
    if (!isLocal(target)) throw new UsageError(`the token would go to ${target} unencrypted`);
    metadata.set('authorization', `Bearer ${token}`);
  }
  const credentials = grpc.credentials.createInsecure();
  const options = {
    // C11. Without calls too: a server that accepts a connection and stays silent would block
    // the calls that wait for it.
    'grpc.keepalive_time_ms': 20_000,
    'grpc.keepalive_timeout_ms': 10_000,
    'grpc.keepalive_permit_without_calls': 1,
    // The channel's default backoff grows to two minutes: a restarted server would seem down.
    'grpc.initial_reconnect_backoff_ms': 100,
    'grpc.max_reconnect_backoff_ms': 1_000,
    // C6: gRPC itself must not retry; `repeated` decides which calls may be retried.
    'grpc.service_config_disable_resolution': 1,
    // C13: a proxy from the environment may be on another machine.
    'grpc.enable_http_proxy': isLocal(target) ? 0 : 1,
  };
  const client = new RunServiceClient(target, credentials, options);
  // Over the same connection.
  const channelOverride = client.getChannel();
  const sessions = new SessionServiceClient(target, credentials, { channelOverride });
  return { client, sessions, metadata, timeoutMs };
}

/** Whether a target is certainly on this machine. Other names may resolve to any machine. */
function isLocal(target: string): boolean {
  const host = target.replace(/:\d+$/, '').toLowerCase();
  return host === 'localhost' || host === '[::1]' || (isIPv4(host) && host.startsWith('127.'));
}

/** Starts a unary call of the generated client. */
type Start<T> = (
  options: grpc.CallOptions,
  answer: (error: grpc.ServiceError | null, response: T) => void,
) => void;

interface Repetition {
  /** Which failures may be retried. */
  mayRepeat?: (failure: Failure) => boolean;
  /** Ends a backoff with an AbortError; the current call is awaited. */
  signal?: AbortSignal;
}

/** C2, C3, C4: makes a call, and retries it after transient errors, within one deadline. */
async function repeated<T>(
  { timeoutMs }: Connection,
  start: Start<T>,
  { mayRepeat = (failure) => failure.mayPass, signal }: Repetition = {},
): Promise<T> {
  const deadline = Date.now() + timeoutMs;
  const backoff = new Backoff();
  for (;;) {
    try {
      return await once(start, deadline);
    } catch (error) {
      const failure = Failure.of(error);
      const pauseMs = backoff.next(failure);
      if (!mayRepeat(failure) || Date.now() + pauseMs >= deadline) throw failure;
      await sleep(pauseMs, undefined, { signal });
    }
  }
}

function once<T>(start: Start<T>, deadline: number): Promise<T> {
  return new Promise((resolve, reject) => {
    start({ deadline }, (error, response) => (error ? reject(error) : resolve(response)));
  });
}

interface Reading {
  /** Timeout of a call without messages. */
  silenceMs?: number;
  /** Stops reading with an AbortError. */
  signal?: AbortSignal;
}

/**
 * Yields the messages of a stream over as many calls as necessary. `open` starts a call after the
 * messages received so far; `lost` is called for each lost call, and throws if the stream must not
 * be reopened.
 */
async function* resumed<T>(
  open: () => grpc.ClientReadableStream<T>,
  lost: (failure: Failure) => void,
  reading: Reading,
): AsyncGenerator<T, void, undefined> {
  const backoff = new Backoff();
  for (;;) {
    let count = 0;
    let failure: Failure;
    try {
      for await (const message of messages(open(), reading)) {
        yield message;
        // No busy loop if the server breaks every call after its first message.
        if (++count > 1) backoff.reset();
      }
      failure = new Failure('UNAVAILABLE', 'the server ended the stream');
    } catch (error) {
      failure = Failure.of(error);
    }
    lost(failure);
    await sleep(backoff.next(failure), undefined, { signal: reading.signal });
  }
}

/** The messages of one call. */
async function* messages<T>(
  call: grpc.ClientReadableStream<T>,
  { silenceMs, signal }: Reading,
): AsyncGenerator<T, void, undefined> {
  // A call that is cancelled below still emits its status, without a listener by then.
  call.on('error', () => undefined);
  if (signal) addAbortSignal(signal, call);
  const silent = new Failure('UNAVAILABLE', 'no message for too long');
  const timer = silenceMs ? setTimeout(() => call.destroy(silent), silenceMs) : undefined;
  try {
    for await (const message of call) {
      timer?.refresh();
      yield message as T;
    }
  } finally {
    clearTimeout(timer);
    call.cancel();
  }
}

/** Reports a transient failure; throws any other. */
function reconnecting(failure: Failure): void {
  if (!failure.mayPass) throw failure;
  log(`reconnecting ${failure.word}`);
}

/** C3: exponential backoff from 0.1 s to 2 s, with jitter. */
class Backoff {
  private pauseMs = 100;

  /** C4: never less than the server asks for. */
  next(failure: Failure): number {
    const pauseMs = this.pauseMs * (0.5 + Math.random() / 2);
    this.pauseMs = Math.min(this.pauseMs * 2, 2_000);
    return Math.max(pauseMs, failure.retryAfterMs ?? 0);
  }

  reset(): void {
    this.pauseMs = 100;
  }
}

// --- Errors --------------------------------------------------------------------------------------

/** Codes of a broken connection, if the error is not from a Runlane server. */
const BROKEN = new Set(['UNAVAILABLE', 'ABORTED', 'CANCELLED', 'INTERNAL', 'UNKNOWN']);

/** C5: a failed call, with the error details from the server. */
class Failure extends Error {
  /** The reason of the `ErrorInfo`; empty if the error is not from a Runlane server. */
  reason = '';
  /** The metadata of the `ErrorInfo`. */
  metadata: Record<string, string> = {};
  /** From `RetryInfo`. */
  retryAfterMs: number | undefined;
  /** From `BadRequest`. */
  fields: BadRequest['fieldViolations'] = [];

  constructor(
    /** The name of the gRPC status. */
    readonly status: string,
    message: string,
  ) {
    super(message);
  }

  /** Converts an error of gRPC to a Failure; rethrows any other. */
  static of(error: unknown): Failure {
    if (error instanceof Failure) return error;
    if (!isServiceError(error)) throw error;
    const failure = new Failure(grpc.status[error.code] ?? 'UNKNOWN', error.details);
    for (const value of error.metadata.get('grpc-status-details-bin')) {
      if (typeof value !== 'string') failure.read(value);
    }
    return failure;
  }

  /** The reason, or the gRPC status if there is none. */
  get word(): string {
    return this.reason || this.status;
  }

  /** C3, C4, C5: whether a retry may succeed. The call may have taken effect already. */
  get mayPass(): boolean {
    if (this.status === 'RESOURCE_EXHAUSTED') return this.retryAfterMs !== undefined;
    return this.reason ? this.status === 'UNAVAILABLE' : BROKEN.has(this.status);
  }

  /** C6: whether the call certainly had no effect, and a retry may succeed. */
  get nothingDone(): boolean {
    return this.reason === 'DRAINING' || (this.status === 'RESOURCE_EXHAUSTED' && this.mayPass);
  }

  private read(bytes: Uint8Array): void {
    for (const { typeUrl, value } of Status.decode(bytes).details) {
      switch (typeUrl.slice(typeUrl.lastIndexOf('/') + 1)) {
        case 'google.rpc.ErrorInfo':
          this.readInfo(ErrorInfo.decode(value));
          break;
        case 'google.rpc.RetryInfo':
          this.retryAfterMs = delayMs(RetryInfo.decode(value));
          break;
        case 'google.rpc.BadRequest':
          this.fields = BadRequest.decode(value).fieldViolations;
          break;
      }
    }
  }

  private readInfo({ domain, reason, metadata }: ErrorInfo): void {
    // Other domains define other reasons.
    if (domain !== 'runlane') return;
    this.reason = reason;
    this.metadata = metadata;
  }
}

function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && 'code' in error && 'details' in error && 'metadata' in error;
}

function delayMs({ retryDelay }: RetryInfo): number {
  return (retryDelay?.seconds ?? 0) * 1e3 + (retryDelay?.nanos ?? 0) / 1e6;
}

/** Prints a failure on stderr; returns the exit code. */
function report(failure: Failure): number {
  if (failure.status === 'UNAVAILABLE' || failure.status === 'DEADLINE_EXCEEDED') {
    log(`${failure.status}: ${failure.message}`);
    return 4;
  }
  log(`${failure.word}: ${failure.message}`);
  for (const { field, description } of failure.fields) log(`  ${field}: ${description}`);
  return 3;
}

// --- The command line ----------------------------------------------------------------------------

class UsageError extends Error {}

const OPTIONS = {
  target: { type: 'string' },
  timeout: { type: 'string' },
  'run-id': { type: 'string' },
  'max-attempts': { type: 'string' },
  'cursor-file': { type: 'string' },
  count: { type: 'string' },
  silence: { type: 'string' },
  answer: { type: 'string' },
} as const;

type Values = { [name in keyof typeof OPTIONS]?: string | undefined };

/** Executes a command over a connection; returns the exit code. */
type Verb = (connection: Connection) => Promise<number>;

interface Command {
  target: string;
  timeoutMs: number;
  verb: Verb;
}

function parseCommand(args: string[]): Command {
  const { values, positionals } = parseArgs({ args, options: OPTIONS, allowPositionals: true });
  const [name, ...words] = positionals;
  return {
    target: notEmpty(values, 'target') ?? '127.0.0.1:50051',
    timeoutMs: milliseconds(values, 'timeout') ?? 10_000,
    verb: parseVerb(name, words, values),
  };
}

function parseVerb(name: string | undefined, words: string[], values: Values): Verb {
  switch (name) {
    case 'run':
      return parseRun(words, values);
    case 'cancel':
      return parseCancel(words, values);
    case 'watch':
      return parseWatch(words, values);
    case 'session':
      return parseSession(words, values);
    case 'edit':
      return parseEdit(words, values);
    case 'fork':
      return parseFork(words, values);
    default:
      throw new UsageError(name === undefined ? 'a verb is missing' : `unknown verb: ${name}`);
  }
}

function parseRun(words: string[], values: Values): Verb {
  allow(values, ['run-id', 'max-attempts', 'answer']);
  const [sessionId = '', prompt = ''] = expect(words, ['SESSION', 'PROMPT']);
  const options = {
    sessionId,
    prompt,
    // C1: our own UUIDv7.
    runId: notEmpty(values, 'run-id') ?? uuidv7(),
    maxAttempts: wholeNumber(values, 'max-attempts') ?? 0,
    answer: notEmpty(values, 'answer'),
  };
  return (connection) => run(connection, options);
}

function parseCancel(words: string[], values: Values): Verb {
  allow(values, ['run-id']);
  const [sessionId] = expect(words, ['SESSION']);
  // An empty id would cancel the whole session.
  const runId = notEmpty(values, 'run-id');
  return (connection) => cancel(connection, { sessionId, runId });
}

function parseWatch(words: string[], values: Values): Verb {
  expect(words, []);
  const options = watchOptions(values);
  return (connection) => watch(connection, options);
}

function parseSession(words: string[], values: Values): Verb {
  const [sessionId = ''] = expect(words, ['SESSION']);
  const options = watchOptions(values);
  return (connection) => session(connection, sessionId, options);
}

function parseEdit(words: string[], values: Values): Verb {
  allow(values, []);
  const [runId = '', prompt = ''] = expect(words, ['RUN', 'PROMPT']);
  return (connection) => edit(connection, runId, prompt);
}

function parseFork(words: string[], values: Values): Verb {
  allow(values, []);
  // C17: our own UUIDv7.
  const [sessionId = '', newSessionId = ''] =
    words.length === 1 ? [...words, uuidv7()] : expect(words, ['SESSION', '[NEW]']);
  return (connection) => fork(connection, sessionId, newSessionId);
}

function watchOptions(values: Values): WatchOptions {
  allow(values, ['cursor-file', 'count', 'silence']);
  return {
    cursorFile: notEmpty(values, 'cursor-file'),
    count: wholeNumber(values, 'count') ?? Infinity,
    silenceMs: milliseconds(values, 'silence') ?? 45_000,
  };
}

function allow(values: Values, names: (keyof Values)[]): void {
  const allowed = new Set<string>(['target', 'timeout', ...names]);
  for (const name of Object.keys(values)) {
    if (!allowed.has(name)) throw new UsageError(`--${name} is an option of another verb`);
  }
}

function expect(words: string[], names: string[]): string[] {
  if (words.length !== names.length) {
    throw new UsageError(`expected: ${names.join(' ') || 'options only'}`);
  }
  return words;
}

function notEmpty(values: Values, name: keyof Values): string | undefined {
  if (values[name] === '') throw new UsageError(`--${name} is empty`);
  return values[name];
}

/** A positive integer that fits into an int32. */
function wholeNumber(values: Values, name: keyof Values): number | undefined {
  const value = values[name];
  if (value === undefined) return undefined;
  const number = Number(value);
  if (!/^\d+$/.test(value) || number < 1 || number > 0x7fff_ffff) {
    throw new UsageError(`--${name}: ${value} is no number from 1`);
  }
  return number;
}

/** Parses a positive number of seconds, up to the maximum of a timer. */
function milliseconds(values: Values, name: keyof Values): number | undefined {
  const value = values[name];
  if (value === undefined) return undefined;
  const number = Number(value) * 1e3;
  if (!(number > 0 && number <= 0x7fff_ffff)) throw new UsageError(`--${name}: ${value}`);
  return number;
}

// --- The process ---------------------------------------------------------------------------------

/** Writes to stdout, and waits for the write: an unwritten event is not processed (C9). */
function print(text: string): Promise<void> {
  return new Promise((resolve, reject) => {
    process.stdout.write(text, (error) => (error ? reject(error) : resolve()));
  });
}

/** By default Node dies from the signal, and only a shell turns that into an exit code. */
function exitWhenInterrupted(): void {
  process.once('SIGINT', () => process.exit(130));
}

function log(line: string): void {
  process.stderr.write(`${line}\n`);
}

/** The name of an enum's value without its prefix; the number if it is newer than this. */
function shortName(names: Record<number, string>, value: number, prefix: string): string {
  return (names[value] ?? `${value}`).replace(prefix, '');
}

function isUsageError(error: unknown): boolean {
  if (error instanceof UsageError) return true;
  return error instanceof TypeError && 'code' in error && `${error.code}`.startsWith('ERR_PARSE');
}

async function main(): Promise<number> {
  let connection: Connection | undefined;
  try {
    const { target, timeoutMs, verb } = parseCommand(process.argv.slice(2));
    connection = connect(target, timeoutMs);
    return await verb(connection);
  } catch (error) {
    if (error instanceof Failure) return report(error);
    log(error instanceof Error ? error.message : `${error}`);
    if (!isUsageError(error)) return 1;
    log(USAGE);
    return 2;
  } finally {
    connection?.client.close();
  }
}

// `print` reports the same error to its caller.
process.stdout.on('error', () => undefined);
process.exitCode = await main();
