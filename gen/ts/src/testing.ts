/**
 * A Runlane server for a test. The server is the command `runlane-server` on the PATH, or the one that the environment
 * variable RUNLANE_SERVER_COMMAND names.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { createInterface } from 'node:readline';

const START_MS = 30_000;
const STOP_MS = 10_000;
const LISTENING = ' listening on ';
const DEFAULTS = ['--listen', '127.0.0.1:0', '--store', 'memory:', '--harness', '--drain-timeout', '0'];

/** A running server. */
export class RunlaneServer {
  private constructor(
    private readonly process: ChildProcess,
    private readonly lines: string[],
    /** The host and port of the server. */
    readonly address: string,
  ) {}

  /** What the server has logged so far. */
  get log(): string {
    return this.lines.join('');
  }

  /**
   * Starts a server with a store in memory, the scripted agent and the harness, on a free port. The arguments are those
   * of runlane-server, such as '--agent', 'echo'. Fails with the log of the server if it does not start.
   */
  static async start(...args: string[]): Promise<RunlaneServer> {
    const agent = args.some((each) => each.startsWith('--agent')) ? [] : ['--agent', 'scripted'];
    const command = process.env['RUNLANE_SERVER_COMMAND'] || 'runlane-server';
    const server = spawn(command, [...DEFAULTS, ...agent, ...args], {
      env: environment(),
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    const lines: string[] = [];
    server.stderr.on('data', (data: Buffer) => lines.push(data.toString()));
    // A test that dies takes its server along.
    const kill = () => server.kill('SIGKILL');
    process.once('exit', kill);
    server.once('close', () => process.removeListener('exit', kill));
    try {
      return new RunlaneServer(server, lines, await listening(server));
    } catch (error) {
      kill();
      const hint = `install it with: pip install 'runlane[server]', or name it in RUNLANE_SERVER_COMMAND`;
      throw new Error(`${command}: ${String(error)}; ${hint}\n${lines.join('')}`);
    }
  }

  /** Stops the server; waits for the end of its process. */
  async stop(): Promise<void> {
    if (this.process.exitCode !== null || this.process.signalCode !== null) return;
    const closed = once(this.process, 'close');
    const late = setTimeout(() => this.process.kill('SIGKILL'), STOP_MS);
    this.process.kill('SIGTERM');
    await closed;
    clearTimeout(late);
  }
}

/** Waits for the first line of the server, which ends with its address. */
async function listening(server: ChildProcess): Promise<string> {
  const timer = new AbortController();
  try {
    const first = once(createInterface({ input: server.stdout! }), 'line', { signal: timer.signal });
    const gone = once(server, 'exit', { signal: timer.signal }).then(([code]) => {
      throw new Error(`ended with exit code ${code}`);
    });
    const late = setTimeout(() => timer.abort(new Error('did not start in time')), START_MS);
    const [line] = (await Promise.race([first, gone]).finally(() => clearTimeout(late))) as [string];
    const [, address] = line.split(LISTENING);
    if (address === undefined) throw new Error(`printed ${line}`);
    gone.catch(() => undefined);
    return address.trim();
  } finally {
    timer.abort();
  }
}

/** The environment without the settings of another server. */
function environment(): NodeJS.ProcessEnv {
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !name.startsWith('RUNLANE_')));
}
