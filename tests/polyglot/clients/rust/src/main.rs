//! A Runlane client in one file: runs prompts, edits and cancels runs, forks sessions, and
//! watches completions and sessions.
//!
//! C1 to C17 are the rules of docs/clients.md; a comment marks the code that implements each one.

use std::collections::{HashSet, VecDeque};
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand};
use tokio::io::AsyncWriteExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{FieldViolation, StatusExt};
use uuid::Uuid;

use v1::SubscribeSessionResponse;
use v1::answer_input_request::Answer;
use v1::run_event::Event;
use v1::run_service_client::RunServiceClient;
use v1::session_service_client::SessionServiceClient;
use v1::subscribe_run_complete_request::Start;
use v1::subscribe_run_complete_response::Event as Ended;
use v1::subscribe_session_response::{Event as Happened, Snapshot};
use v1::{
    AnswerInputRequest, Approval, CancelRequest, CancelResponse, FinishReason, GetRunRequest,
};
use v1::{ForkSessionRequest, UpdateRunRequest};
use v1::{InputKind, InputRequest, RunAcceptedRequest, RunComplete, RunEvent, RunState};
use v1::{SubscribeRunCompleteRequest, SubscribeRunRequest, SubscribeSessionRequest};

/// Generated from `proto/` by build.rs.
#[allow(clippy::all)]
mod v1 {
    tonic::include_proto!("runlane.v1");
}

/// C10: how many completions `watch` remembers. A repeated one soon follows the first.
const REMEMBERED: usize = 1024;

// --- The command line ----------------------------------------------------------------------------

/// Runs prompts on a Runlane server, cancels them, and watches runs end.
#[derive(Parser)]
#[command(name = "runlane-example")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// Address of the server
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT",
        default_value = "127.0.0.1:50051"
    )]
    target: String,
    /// Deadline of a call, including its retries
    #[arg(long, global = true, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    timeout: Duration,
}

#[derive(Subcommand)]
enum Verb {
    /// Accepts a run, streams its text, waits for its end
    Run(RunArguments),
    /// Cancels, and prints the runs that were covered
    Cancel(CancelArguments),
    /// Prints every run that ends, across restarts
    Watch(WatchArguments),
    /// Prints a session and what happens in it
    Session(SessionArguments),
    /// Replaces the prompt of a waiting run, and prints the one before and the new revision
    Edit(EditArguments),
    /// Copies a session up to its last finished turn, and prints the new session and that turn
    Fork(ForkArguments),
}

#[derive(Args)]
struct RunArguments {
    session: String,
    prompt: String,
    /// The idempotency key; without one, a UUIDv7
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    run_id: Option<String>,
    /// Maximum number of attempts, if nodes are lost
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(i32).range(1..))]
    max_attempts: i32,
    /// The answer to the agent's questions; without one, someone else answers
    // C14.
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    answer: Option<String>,
}

#[derive(Args)]
struct CancelArguments {
    session: String,
    /// This run only
    // An empty id would cancel the whole session.
    #[arg(long, value_name = "ID", value_parser = NonEmptyStringValueParser::new())]
    run_id: Option<String>,
}

#[derive(Args)]
struct WatchArguments {
    /// File with the cursor
    #[arg(long, value_name = "FILE")]
    cursor_file: Option<PathBuf>,
    /// Number of completions after which to stop
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// Timeout of a stream without messages
    // C11: a server sends a mark every 15 s.
    #[arg(long, value_name = "SECONDS", default_value = "45", value_parser = seconds)]
    silence: Duration,
}

#[derive(Args)]
struct SessionArguments {
    session: String,
    #[command(flatten)]
    stream: WatchArguments,
}

#[derive(Args)]
struct EditArguments {
    run: String,
    prompt: String,
}

#[derive(Args)]
struct ForkArguments {
    session: String,
    new: Option<String>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    match Duration::try_from_secs_f64(number) {
        // A year is practically unlimited, and does not overflow an Instant.
        Ok(time) if time > Duration::ZERO && number <= 31e6 => Ok(time),
        _ => Err("not a number of seconds above 0".to_owned()),
    }
}

// --- The four commands ---------------------------------------------------------------------------

/// Why a command failed.
enum Problem {
    /// The arguments are invalid.
    Usage(String),
    /// A call failed.
    Call(Failure),
    /// A file or stdout failed.
    Local(io::Error),
}

impl From<Failure> for Problem {
    fn from(failure: Failure) -> Self {
        Self::Call(failure)
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Local(error)
    }
}

const DONE: i32 = 0;
const ENDED_OTHERWISE: i32 = 1;
const REFUSED: i32 = 3;
const NOBODY_ANSWERED: i32 = 4;
const INTERRUPTED: i32 = 130;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let code = match perform(Arguments::parse()).await {
        Ok(code) => code,
        Err(Problem::Usage(message)) => Arguments::command()
            .error(clap::error::ErrorKind::ValueValidation, message)
            .exit(),
        Err(Problem::Call(failure)) => report(&failure),
        Err(Problem::Local(error)) => {
            log(&error.to_string());
            ENDED_OTHERWISE
        }
    };
    // Returning would wait for a pending write to a stdout that is not read.
    process::exit(code);
}

async fn perform(arguments: Arguments) -> Result<i32, Problem> {
    let connection = Connection::new(&arguments.target, arguments.timeout)?;
    let interrupt = Interrupt::listen();
    match arguments.verb {
        // `run` handles an interrupt itself.
        Verb::Run(options) => run(&connection, options, &interrupt).await,
        Verb::Cancel(options) => interrupt.ends(cancel(&connection, options)).await,
        Verb::Edit(options) => interrupt.ends(edit(&connection, options)).await,
        Verb::Fork(options) => interrupt.ends(fork(&connection, options)).await,
        Verb::Watch(options) => {
            interrupt
                .ends(Watcher::new(options)?.watch(&connection))
                .await
        }
        Verb::Session(options) => {
            interrupt
                .ends(SessionReader::new(options)?.read(&connection))
                .await
        }
    }
}

async fn run(
    connection: &Connection,
    options: RunArguments,
    interrupt: &Interrupt,
) -> Result<i32, Problem> {
    // C1: created before the first attempt; every attempt sends the same id.
    let run_id = options.run_id.unwrap_or_else(|| Uuid::now_v7().to_string());
    let request = RunAcceptedRequest {
        session_id: options.session,
        run_id: run_id.clone(),
        prompt: options.prompt,
        max_attempts: options.max_attempts,
        allow_missing: true,
        ..Default::default()
    };
    let ended = async {
        accept(connection, request, interrupt).await?;
        log(&format!("accepted {run_id}"));
        interrupt
            .unless(follow(connection, &run_id, options.answer.as_deref()))
            .await
            .transpose()
    };
    match ended.await {
        Ok(Some(complete)) => tell_end_of_run(&complete).await,
        Err(problem) if !interrupt.is_raised() => Err(problem),
        _ => Ok(cancel_interrupted(connection, run_id).await),
    }
}

/// Accepts the run. An interrupt stops the retries, but not the current call: a run that is
/// accepted after its own cancel would stay active.
async fn accept(
    connection: &Connection,
    request: RunAcceptedRequest,
    interrupt: &Interrupt,
) -> Result<(), Failure> {
    let once = async |request| connection.client().run_accepted(request).await;
    // C3: the id makes a retry safe.
    connection
        .call(request, once, Failure::may_pass, Some(interrupt))
        .await?;
    Ok(())
}

async fn tell_end_of_run(complete: &RunComplete) -> Result<i32, Problem> {
    print("\n").await?;
    log(&format!(
        "{} {}",
        state_name(complete.state).to_lowercase(),
        reason_name(complete)
    ));
    let completed = complete.state() == RunState::Completed;
    Ok(if completed { DONE } else { ENDED_OTHERWISE })
}

/// C7: writes the text of a run as it arrives, each piece once; returns its end.
async fn follow(
    connection: &Connection,
    run_id: &str,
    answer: Option<&str>,
) -> Result<RunComplete, Problem> {
    let mut events = Resumed::new(None);
    let mut last_index = 0;
    loop {
        let request = SubscribeRunRequest {
            run_id: run_id.to_owned(),
            after_index: last_index,
        };
        let open = async |request| connection.client().subscribe_run(request).await;
        match events.next(open(connection.request(request))).await {
            Ok(message) => {
                let Some(event) = message.event.filter(|event| event.index > last_index) else {
                    continue;
                };
                last_index = event.index;
                if let Some(Event::InputRequested(asked)) = &event.event {
                    ask(
                        connection,
                        asked.input_request.clone().unwrap_or_default(),
                        answer,
                    )
                    .await?;
                }
                if let Some(complete) = show(event).await? {
                    return Ok(complete);
                }
            }
            Err(failure) if failure.reason == "CURSOR_COMPACTED" => {
                return removed(connection, run_id, last_index).await;
            }
            Err(failure) => events.pause(reconnecting(failure)?).await,
        }
    }
}

/// Prints one event; returns the end of the run if the event is the last.
async fn show(event: RunEvent) -> io::Result<Option<RunComplete>> {
    match event.event {
        Some(Event::RunComplete(complete)) => return Ok(Some(complete)),
        Some(Event::TextDelta(delta)) => print(&delta.text).await?,
        // C8: the node of the previous attempt was lost; the answer starts over.
        Some(Event::Started(started)) if started.attempt > 1 => {
            log(&format!("attempt {}", started.attempt));
        }
        // Not shown, or newer than this program.
        _ => {}
    }
    Ok(None)
}

/// C14: shows a question, and answers it if there is an answer.
async fn ask(
    connection: &Connection,
    asked: InputRequest,
    answer: Option<&str>,
) -> Result<(), Failure> {
    let id = &asked.input_request_id;
    log(&format!("asked {id} {}", asked.text));
    let Some(answer) = answer else {
        return Ok(());
    };
    let request = AnswerInputRequest {
        input_request_id: id.clone(),
        // Every attempt sends the same id, created before the first one.
        answer_id: Uuid::now_v7().to_string(),
        question_digest: asked.question_digest.clone(),
        answer: Some(answer_to(asked.kind(), answer.to_owned())),
    };
    let once = async |request| connection.client().answer_input(request).await;
    match connection
        .call(request, once, Failure::may_pass, None)
        .await
    {
        Ok(receipt) if receipt.accepted_this_answer => log(&format!("answered {id}")),
        Ok(_) => log(&format!("answered before {id}")),
        Err(failure) if failure.reason == "INPUT_CLOSED" => log(&format!("closed {id}")),
        Err(failure) => return Err(failure),
    }
    Ok(())
}

fn answer_to(kind: InputKind, text: String) -> Answer {
    match kind {
        InputKind::Approval => Answer::Approval(Approval {
            approved: text == "yes",
            ..Default::default()
        }),
        InputKind::Choice => Answer::Choice(text),
        InputKind::Form => Answer::FormJson(text),
        _ => Answer::Text(text),
    }
}

/// C12: the end of a run whose events are compacted, because its id was used long ago.
async fn removed(
    connection: &Connection,
    run_id: &str,
    last_index: i64,
) -> Result<RunComplete, Problem> {
    let request = GetRunRequest {
        run_id: run_id.to_owned(),
        ..Default::default()
    };
    let once = async |request| connection.client().get_run(request).await;
    let response = connection
        .call(request, once, Failure::may_pass, None)
        .await?;
    let complete = response
        .run
        .and_then(|run| run.run_complete)
        .ok_or_else(|| Failure::new(Code::DataLoss, format!("run {run_id} has lost its events")))?;
    if last_index == 0 {
        print(&complete.text).await?;
    }
    Ok(complete)
}

async fn cancel_interrupted(connection: &Connection, run_id: String) -> i32 {
    let request = CancelRequest {
        run_id,
        ..Default::default()
    };
    match request_cancel(connection, request).await {
        // Then the run was never accepted: nothing to cancel.
        Err(failure) if failure.reason != "RUN_NOT_FOUND" => {
            report(&failure);
        }
        _ => {}
    }
    INTERRUPTED
}

async fn cancel(connection: &Connection, options: CancelArguments) -> Result<i32, Problem> {
    let request = CancelRequest {
        session_id: options.session,
        run_id: options.run_id.unwrap_or_default(),
        ..Default::default()
    };
    for run in request_cancel(connection, request).await?.cancelled {
        let state = state_name(run.state_when_cancelled);
        print(&format!("{} {state}\n", run.run_id)).await?;
    }
    Ok(DONE)
}

async fn edit(connection: &Connection, options: EditArguments) -> Result<i32, Problem> {
    let read = GetRunRequest {
        run_id: options.run.clone(),
        with_prompt: true,
    };
    let once = async |request| connection.client().get_run(request).await;
    let found = connection.call(read, once, Failure::may_pass, None).await?;
    let request = UpdateRunRequest {
        run_id: options.run,
        prompt: options.prompt,
        update_mask: Some(prost_types::FieldMask {
            paths: vec!["prompt".to_owned()],
        }),
        // C16: not over the edit of another, and once however often it is sent.
        revision: Some(found.run.unwrap_or_default().revision),
        update_id: Uuid::now_v7().to_string(),
        ..Default::default()
    };
    let once = async |request| connection.client().update_run(request).await;
    let run = connection
        .call(request, once, Failure::may_pass, None)
        .await?
        .run
        .unwrap_or_default();
    let before = found.prompt.unwrap_or_default().text;
    print(&format!("{before}\n{} {}\n", run.run_id, run.revision)).await?;
    Ok(DONE)
}

async fn fork(connection: &Connection, options: ForkArguments) -> Result<i32, Problem> {
    // C17: every attempt sends the same id, created before the first one.
    let request = ForkSessionRequest {
        session_id: options.session,
        new_session_id: options.new.unwrap_or_else(|| Uuid::now_v7().to_string()),
        ..Default::default()
    };
    let once = async |request| connection.sessions().fork_session(request).await;
    let session = connection
        .call(request, once, Failure::may_pass, None)
        .await?
        .session
        .unwrap_or_default();
    let turn = session.origin.unwrap_or_default().turn;
    print(&format!("{} {turn}\n", session.session_id)).await?;
    Ok(DONE)
}

/// C6: a second cancel of a session could cover runs accepted after the first.
async fn request_cancel(
    connection: &Connection,
    request: CancelRequest,
) -> Result<CancelResponse, Failure> {
    let may_repeat = if request.run_id.is_empty() {
        Failure::nothing_done
    } else {
        Failure::may_pass
    };
    let once = async |request| connection.client().cancel(request).await;
    connection.call(request, once, may_repeat, None).await
}

/// Prints every completion.
struct Watcher {
    options: WatchArguments,
    cursor: Option<String>,
    known: Known,
    printed: u64,
}

impl Watcher {
    fn new(options: WatchArguments) -> io::Result<Self> {
        let cursor = options
            .cursor_file
            .as_deref()
            .map(read_cursor)
            .transpose()?
            .flatten();
        Ok(Self {
            options,
            cursor,
            known: Known::default(),
            printed: 0,
        })
    }

    async fn watch(mut self, connection: &Connection) -> Result<i32, Problem> {
        let mut messages = Resumed::new(Some(self.options.silence));
        let mut established = false;
        while self.options.count != Some(self.printed) {
            let start = self.cursor.clone().map(Start::Cursor);
            let request = SubscribeRunCompleteRequest {
                start,
                ..Default::default()
            };
            let open = async |request| connection.client().subscribe_run_complete(request).await;
            match messages.next(open(connection.request(request))).await {
                Ok(message) => {
                    if !established {
                        log("watching");
                    }
                    established = true;
                    self.deal(message.event, message.cursor).await?;
                }
                Err(failure) => messages.pause(self.lost(failure)?).await,
            }
        }
        Ok(DONE)
    }

    /// C9: stores the cursor, of progress marks too, and only after the event is processed.
    async fn deal(&mut self, event: Option<Ended>, cursor: String) -> io::Result<()> {
        if let Some(Ended::RunComplete(complete)) = event {
            if self.known.is_new(&complete) {
                tell_end(&complete).await?;
                self.printed += 1;
            }
        }
        if let Some(file) = &self.options.cursor_file {
            write_cursor(file, &cursor)?;
        }
        self.cursor = Some(cursor);
        Ok(())
    }

    /// C12: resumes from the cursor that the server names.
    fn lost(&mut self, mut failure: Failure) -> Result<Failure, Failure> {
        let cursor = failure.go_on_at.take();
        match (&*failure.reason, cursor) {
            ("CURSOR_COMPACTED", Some(oldest)) => {
                log(&format!("events before {oldest} are gone"));
                self.cursor = Some(oldest);
                Ok(failure)
            }
            (_, cursor) => {
                self.cursor = cursor.or(self.cursor.take());
                reconnecting(failure)
            }
        }
    }
}

/// C15: prints a session as it is, and what happens in it.
struct SessionReader {
    session: String,
    options: WatchArguments,
    cursor: Option<String>,
    /// The parts of the snapshot so far.
    parts: Vec<Snapshot>,
    deleted: bool,
    printed: u64,
}

impl SessionReader {
    fn new(arguments: SessionArguments) -> io::Result<Self> {
        let options = arguments.stream;
        let cursor = options
            .cursor_file
            .as_deref()
            .map(read_cursor)
            .transpose()?
            .flatten();
        Ok(Self {
            session: arguments.session,
            options,
            cursor,
            parts: Vec::new(),
            deleted: false,
            printed: 0,
        })
    }

    async fn read(mut self, connection: &Connection) -> Result<i32, Problem> {
        let mut messages = Resumed::new(Some(self.options.silence));
        let mut established = false;
        while !self.deleted && self.options.count != Some(self.printed) {
            let request = SubscribeSessionRequest {
                session_ids: vec![self.session.clone()],
                cursors: self.cursor.iter().cloned().collect(),
                with_deltas: true,
            };
            let open = async |request| connection.sessions().subscribe_session(request).await;
            match messages.next(open(connection.request(request))).await {
                Ok(message) => {
                    if !established {
                        log("watching");
                    }
                    established = true;
                    self.deal(message).await?;
                }
                Err(failure) => messages.pause(self.lost(failure)?).await,
            }
        }
        Ok(DONE)
    }

    /// Stores the cursor only after the event is processed.
    async fn deal(&mut self, message: SubscribeSessionResponse) -> io::Result<()> {
        match message.event {
            Some(Happened::Snapshot(part)) => {
                let continues = part.continues;
                self.parts.push(part);
                if !continues {
                    self.show_snapshot().await?;
                }
            }
            Some(Happened::RunEvent(of)) => {
                self.show(&of.run_id, of.event.unwrap_or_default()).await?;
            }
            Some(Happened::SessionChanged(now)) if now.session.is_none() => {
                print("deleted\n").await?;
                self.deleted = true;
            }
            // Not shown, or newer than this program.
            _ => {}
        }
        // A mark, or a part of a snapshot, has no cursor.
        if message.cursor.is_empty() && !self.deleted {
            return Ok(());
        }
        if let Some(file) = &self.options.cursor_file {
            write_cursor(file, &message.cursor)?;
        }
        self.cursor = Some(message.cursor);
        Ok(())
    }

    async fn show_snapshot(&mut self) -> io::Result<()> {
        let parts = std::mem::take(&mut self.parts);
        let active = parts.iter().find_map(|part| part.active_run.as_ref());
        let active = active.map_or("-".to_owned(), |run| run.run_id.clone());
        let mut line = format!("snapshot {active}");
        for run in parts.iter().flat_map(|part| &part.queue) {
            line += &format!(" {}", run.run_id);
        }
        print(&format!("{line}\n")).await?;
        for event in parts.into_iter().flat_map(|part| part.output) {
            self.show(&active, event).await?;
        }
        Ok(())
    }

    async fn show(&mut self, run_id: &str, event: RunEvent) -> io::Result<()> {
        match event.event {
            Some(Event::TextDelta(delta)) => {
                print(&format!("{run_id} text {}\n", delta.text)).await
            }
            Some(Event::RunComplete(complete)) => {
                self.printed += 1;
                tell_end(&complete).await
            }
            _ => Ok(()),
        }
    }

    fn lost(&mut self, failure: Failure) -> Result<Failure, Failure> {
        // The parts of a snapshot whose rest was lost are void.
        self.parts.clear();
        match self.cursor.take() {
            Some(cursor) if failure.reason == "CURSOR_COMPACTED" => {
                // A snapshot shows what the lost events have led to.
                log(&format!("events after {cursor} are gone"));
                Ok(failure)
            }
            cursor => {
                self.cursor = cursor;
                reconnecting(failure)
            }
        }
    }
}

async fn tell_end(complete: &RunComplete) -> io::Result<()> {
    let state = state_name(complete.state);
    print(&format!(
        "{} {state} {}\n",
        complete.run_id,
        reason_name(complete)
    ))
    .await
}

/// C10: the completions that were printed.
#[derive(Default)]
struct Known {
    keys: HashSet<String>,
    in_order: VecDeque<String>,
}

impl Known {
    fn is_new(&mut self, complete: &RunComplete) -> bool {
        // An id is free again once its session is deleted; the time distinguishes the two runs.
        let key = format!("{} {:?}", complete.run_id, complete.ended_at);
        if !self.keys.insert(key.clone()) {
            return false;
        }
        self.in_order.push_back(key);
        if self.in_order.len() > REMEMBERED {
            let oldest = self.in_order.pop_front();
            oldest.map(|oldest| self.keys.remove(&oldest));
        }
        true
    }
}

fn read_cursor(file: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|cursor| !cursor.is_empty())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces the file atomically: a crash leaves the old cursor or the new one.
fn write_cursor(file: &Path, cursor: &str) -> io::Result<()> {
    let mut fresh = file.as_os_str().to_owned();
    fresh.push(".new");
    let mut writer = File::create(&fresh)?;
    writer.write_all(cursor.as_bytes())?;
    writer.sync_data()?;
    fs::rename(fresh, file)
}

// --- The connection ------------------------------------------------------------------------------

/// A channel, with deadlines and retries for its calls.
struct Connection {
    client: RunServiceClient<Channel>,
    sessions: SessionServiceClient<Channel>,
    /// Sent with every call.
    token: Option<MetadataValue<Ascii>>,
    /// Deadline of a unary call, including its retries.
    timeout: Duration,
}

impl Connection {
    /// Connects with the first call, and again with each call that finds no connection.
    fn new(target: &str, timeout: Duration) -> Result<Self, Problem> {
        let wrong = |_| Problem::Usage(format!("{target} is no HOST:PORT"));
        let endpoint = Endpoint::from_shared(format!("http://{target}"))
            .map_err(wrong)?
            .connect_timeout(timeout)
            // C11. Without calls too: otherwise the next call would find the dead connection.
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        let channel = endpoint.connect_lazy();
        Ok(Self {
            client: RunServiceClient::new(channel.clone()),
            sessions: SessionServiceClient::new(channel),
            token: token_for(target)?,
            timeout,
        })
    }

    /// A client for one call, on the same channel.
    fn client(&self) -> RunServiceClient<Channel> {
        self.client.clone()
    }

    /// The same for sessions.
    fn sessions(&self) -> SessionServiceClient<Channel> {
        self.sessions.clone()
    }

    fn request<M>(&self, message: M) -> Request<M> {
        let mut request = Request::new(message);
        if let Some(token) = &self.token {
            request
                .metadata_mut()
                .insert("authorization", token.clone());
        }
        request
    }

    /// C2, C3, C4: makes a call, and retries it after failures that `may_repeat` accepts, all
    /// within one deadline. An interrupt ends a backoff.
    async fn call<M: Clone, A>(
        &self,
        message: M,
        once: impl AsyncFn(Request<M>) -> Result<Response<A>, Status>,
        may_repeat: fn(&Failure) -> bool,
        interrupt: Option<&Interrupt>,
    ) -> Result<A, Failure> {
        let deadline = Instant::now() + self.timeout;
        let mut backoff = Backoff::default();
        loop {
            let mut request = self.request(message.clone());
            // The server gets the deadline too, but our own clock decides.
            request.set_timeout(deadline - Instant::now());
            let failure = match timeout_at(deadline, once(request)).await {
                Ok(Ok(response)) => return Ok(response.into_inner()),
                Ok(Err(status)) => Failure::from(status),
                Err(_) => Failure::too_late(),
            };
            let pause = backoff.next(&failure);
            if !may_repeat(&failure) || Instant::now() + pause >= deadline {
                return Err(failure);
            }
            match interrupt {
                Some(interrupt) if interrupt.unless(sleep(pause)).await.is_none() => {
                    return Err(failure);
                }
                Some(_) => {}
                None => sleep(pause).await,
            }
        }
    }
}

/// C13: anyone who sees the token can use it.
fn token_for(target: &str) -> Result<Option<MetadataValue<Ascii>>, Problem> {
    let token = match std::env::var("RUNLANE_TOKEN") {
        Ok(token) if !token.is_empty() => token,
        _ => return Ok(None),
    };
    if !is_local(target) {
        return Err(Problem::Usage(format!(
            "the token would go to {target} unencrypted"
        )));
    }
    let mut value = MetadataValue::try_from(format!("Bearer {token}"))
        .map_err(|_| Problem::Usage("RUNLANE_TOKEN cannot be sent".to_owned()))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// Whether a target is certainly on this machine. Other names may resolve to any machine.
fn is_local(target: &str) -> bool {
    let host = target.rsplit_once(':').map_or(target, |(host, _)| host);
    let address = host
        .trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>();
    host.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// A server stream, read over as many calls as necessary.
struct Resumed<T> {
    call: Option<Streaming<T>>,
    /// Number of messages of the current call.
    count: u64,
    /// Timeout of a call without messages.
    silence: Option<Duration>,
    backoff: Backoff,
}

impl<T> Resumed<T> {
    fn new(silence: Option<Duration>) -> Self {
        Self {
            call: None,
            count: 0,
            silence,
            backoff: Backoff::default(),
        }
    }

    /// Returns the next message, or why the call was lost; the next step then starts another.
    ///
    /// `open` starts a call after the messages received so far. It is not used while a call is open.
    async fn next(
        &mut self,
        open: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    ) -> Result<T, Failure> {
        let silence = self.silence;
        let message = self.read(open);
        let result = match silence {
            Some(silence) => timeout(silence, message).await.unwrap_or_else(|_| {
                Err(Failure::new(Code::Unavailable, "no message for too long"))
            }),
            None => message.await,
        };
        if result.is_err() {
            // C11: cancels the silent call.
            self.call = None;
            self.count = 0;
        }
        result
    }

    async fn read(
        &mut self,
        open: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    ) -> Result<T, Failure> {
        let call = match &mut self.call {
            Some(call) => call,
            None => self.call.insert(open.await?.into_inner()),
        };
        let message = call.message().await?;
        self.count += 1;
        // No busy loop if the server breaks every call after its first message.
        if self.count > 1 {
            self.backoff = Backoff::default();
        }
        message.ok_or_else(|| Failure::new(Code::Unavailable, "the server ended the stream"))
    }

    /// Waits before the next call.
    async fn pause(&mut self, failure: Failure) {
        sleep(self.backoff.next(&failure)).await;
    }
}

/// Reports a transient failure; returns any other as an error.
fn reconnecting(failure: Failure) -> Result<Failure, Failure> {
    if !failure.may_pass() {
        return Err(failure);
    }
    log(&format!("reconnecting {}", failure.word()));
    Ok(failure)
}

/// C3: exponential backoff from 0.1 s to 2 s, with jitter.
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Self(Duration::from_millis(100))
    }
}

impl Backoff {
    /// C4: never less than the server asks for.
    fn next(&mut self, failure: &Failure) -> Duration {
        let pause = self.0.mul_f64(0.5 + fastrand::f64() / 2.0);
        self.0 = (self.0 * 2).min(Duration::from_secs(2));
        pause.max(failure.retry_after.unwrap_or_default())
    }
}

// --- Errors --------------------------------------------------------------------------------------

/// C5: a failed call, with the error details from the server.
struct Failure {
    status: Code,
    message: String,
    /// The reason of the `ErrorInfo`; empty if the error is not from a Runlane server.
    reason: String,
    /// The cursor in its metadata, if it has one (C12).
    go_on_at: Option<String>,
    /// From `RetryInfo`.
    retry_after: Option<Duration>,
    /// From `BadRequest`.
    fields: Vec<FieldViolation>,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        if let Some(failure) = Self::of_connection(&status) {
            return failure;
        }
        let details = status.get_error_details();
        let mut failure = Self::new(status.code(), status.message());
        // Other domains define other reasons.
        if let Some(info) = details.error_info().filter(|info| info.domain == "runlane") {
            failure.reason.clone_from(&info.reason);
            let key = match &*info.reason {
                "CURSOR_COMPACTED" => "oldest_cursor",
                _ => "cursor",
            };
            failure.go_on_at = info.metadata.get(key).cloned();
        }
        failure.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        if let Some(request) = details.bad_request() {
            failure.fields.clone_from(&request.field_violations);
        }
        failure
    }
}

impl Failure {
    fn new(status: Code, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            reason: String::new(),
            go_on_at: None,
            retry_after: None,
            fields: Vec::new(),
        }
    }

    fn too_late() -> Self {
        Self::new(Code::DeadlineExceeded, "the server did not answer in time")
    }

    /// An error found by tonic and not sent by a server. tonic reports a broken connection as
    /// UNKNOWN, CANCELLED or UNAVAILABLE, and an exceeded deadline as CANCELLED.
    fn of_connection(status: &Status) -> Option<Self> {
        let mut cause = status.source()?;
        loop {
            if cause.is::<tonic::TimeoutExpired>() {
                return Some(Self::too_late());
            }
            match cause.source() {
                Some(deeper) => cause = deeper,
                // The last cause is the most specific, such as `Connection refused`.
                None => return Some(Self::new(Code::Unavailable, cause.to_string())),
            }
        }
    }

    /// The reason, or the gRPC status if there is none.
    fn word(&self) -> String {
        if self.reason.is_empty() {
            status_name(self.status)
        } else {
            self.reason.clone()
        }
    }

    /// C3, C4, C5: whether a retry may succeed. The call may have taken effect already.
    fn may_pass(&self) -> bool {
        match self.status {
            Code::Unavailable => true,
            Code::ResourceExhausted => self.retry_after.is_some(),
            // A broken connection behind a proxy.
            Code::Aborted | Code::Cancelled | Code::Internal | Code::Unknown => {
                self.reason.is_empty()
            }
            _ => false,
        }
    }

    /// C6: whether the call certainly had no effect, and a retry may succeed.
    fn nothing_done(&self) -> bool {
        let no_room = self.status == Code::ResourceExhausted && self.may_pass();
        self.reason == "DRAINING" || no_room
    }
}

/// Prints a failure on stderr; returns the exit code.
fn report(failure: &Failure) -> i32 {
    if matches!(failure.status, Code::Unavailable | Code::DeadlineExceeded) {
        log(&format!(
            "{}: {}",
            status_name(failure.status),
            failure.message
        ));
        return NOBODY_ANSWERED;
    }
    log(&format!("{}: {}", failure.word(), failure.message));
    for FieldViolation {
        field, description, ..
    } in &failure.fields
    {
        log(&format!("  {field}: {description}"));
    }
    REFUSED
}

// --- The process ---------------------------------------------------------------------------------

/// Ctrl-C. The command handles the first one; the second ends the process at once.
struct Interrupt(watch::Receiver<bool>);

impl Interrupt {
    fn listen() -> Self {
        let (raise, raised) = watch::channel(false);
        tokio::spawn(async move {
            wait_for_ctrl_c().await;
            raise.send_replace(true);
            wait_for_ctrl_c().await;
            process::exit(INTERRUPTED);
        });
        Self(raised)
    }

    fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns the result of `work`, or None if the interrupt comes first and cancels it.
    async fn unless<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut raised = self.0.clone();
        tokio::select! {
            biased;
            _ = raised.wait_for(|raised| *raised) => None,
            result = work => Some(result),
        }
    }

    /// Returns the exit code of a command that an interrupt simply ends.
    async fn ends(&self, work: impl Future<Output = Result<i32, Problem>>) -> Result<i32, Problem> {
        self.unless(work).await.unwrap_or(Ok(INTERRUPTED))
    }
}

async fn wait_for_ctrl_c() {
    if tokio::signal::ctrl_c().await.is_err() {
        // No handler is installed, so Ctrl-C ends the process by default.
        std::future::pending::<()>().await;
    }
}

/// Writes to stdout, and waits until the text is written: unwritten events are not processed (C9).
async fn print(text: &str) -> io::Result<()> {
    let mut stdout = tokio::io::stdout();
    stdout.write_all(text.as_bytes()).await?;
    stdout.flush().await
}

fn log(line: &str) {
    // eprintln would panic if stderr is closed.
    let _ = writeln!(io::stderr(), "{line}");
}

/// The name of a state without its prefix; the number if it is newer than this program.
fn state_name(value: i32) -> String {
    let name = RunState::try_from(value).map(|state| state.as_str_name());
    name.map_or(value.to_string(), |name| name.replace("RUN_STATE_", ""))
}

fn reason_name(complete: &RunComplete) -> String {
    let value = complete.finish_reason;
    let name = FinishReason::try_from(value).map(|reason| reason.as_str_name());
    name.map_or(value.to_string(), |name| name.replace("FINISH_REASON_", ""))
}

/// `DEADLINE_EXCEEDED` for `Code::DeadlineExceeded`.
fn status_name(status: Code) -> String {
    let mut name = String::new();
    for letter in format!("{status:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}
