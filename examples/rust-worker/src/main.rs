//! A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names, until SIGTERM.
//! The page docs/workers.md lists its duties; their numbers stand in the comments.

use std::collections::VecDeque;
use std::env;
use std::error::Error;
use std::net::SocketAddr;
use std::process::{self, ExitCode};
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::{oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use runlane::worker::v1::work_request::{
    Begun, Emit, Fail, Finish, HandBack, Message, Offer, Resume, TakeFolded,
};
use runlane::worker::v1::work_response::{self, Folded, Turn};
use runlane::worker::v1::worker_service_client::WorkerServiceClient;
use runlane::worker::v1::{Event, WorkRequest, WorkResponse, event};

#[allow(clippy::all, dead_code)]
mod runlane {
    pub mod v1 {
        tonic::include_proto!("runlane.v1");
    }
    pub mod worker {
        pub mod v1 {
            tonic::include_proto!("runlane.worker.v1");
        }
    }
}

const SLOTS: usize = 4;
const MAX_MESSAGE: usize = (4 << 20) + (64 << 10);
/// Bytes in an event, and so fewer characters than the limit.
const MAX_TEXT: usize = 1 << 14;
/// Events in an emit, which so stays below 2 MiB.
const MAX_EVENTS: usize = 100;

/// The agent: says the prompt in capitals, a word at a time, then the prompts that joined the turn.
async fn answer(prompt: String, slot: Voice) {
    let mut prompts = vec![prompt];
    while !prompts.is_empty() {
        for word in prompts.join(" ").split_whitespace() {
            slot.say(&format!("{} ", word.to_uppercase())).await;
            sleep(Duration::from_millis(20)).await;
        }
        prompts = slot.take_folded().await; // W9
    }
}

enum Said {
    Text(String),
    TakeFolded(oneshot::Sender<Vec<String>>),
}

/// How an agent speaks to its slot. After the end of the turn nobody listens.
struct Voice(mpsc::Sender<Said>);

impl Voice {
    async fn say(&self, mut text: &str) {
        while !text.is_empty() {
            let mut end = text.len().min(MAX_TEXT);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            let _ = self.0.send(Said::Text(text[..end].to_owned())).await;
            text = &text[end..];
        }
    }

    async fn take_folded(&self) -> Vec<String> {
        let (answer, answered) = oneshot::channel();
        let _ = self.0.send(Said::TakeFolded(answer)).await;
        answered.await.unwrap_or_default()
    }
}

/// A turn in hand. It outlives the connection.
struct Attempt {
    turn: Turn,
    agent: JoinHandle<()>,
    output: mpsc::Receiver<Said>,
    /// Not acknowledged (W4).
    waiting: VecDeque<Event>,
    acked: i64,
    /// On this connection.
    sent: i64,
    /// The last event that must stay as it is, because it was sent (W3).
    ever_sent: i64,
    begun_sent: bool,
    end: Option<Message>,
    end_sent: bool,
    question: Option<oneshot::Sender<Vec<String>>>,
    question_sent: bool,
    fold_number: i64,
    folded: Vec<String>,
    folded_run_ids: Vec<String>,
}

impl Attempt {
    fn new(turn: Turn) -> Self {
        let (voice, output) = mpsc::channel(1);
        Self {
            agent: tokio::spawn(answer(turn.prompt.clone(), Voice(voice))),
            turn,
            output,
            waiting: VecDeque::new(),
            acked: 0,
            sent: 0,
            ever_sent: 0,
            begun_sent: false,
            end: None,
            end_sent: false,
            question: None,
            question_sent: false,
            fold_number: 0,
            folded: Vec::new(),
            folded_run_ids: Vec::new(),
        }
    }

    fn last(&self) -> i64 {
        self.acked + self.waiting.len() as i64
    }

    /// Whether there is room for what the agent says next (W4).
    fn has_room(&self) -> bool {
        self.end.is_none() && self.waiting.len() < self.turn.window as usize
    }

    async fn hear(&mut self, said: Option<Said>) {
        match said {
            Some(Said::Text(text)) => self.add(text),
            Some(Said::TakeFolded(answer)) => {
                self.question = Some(answer);
                self.question_sent = false;
                self.fold_number += 1;
            }
            None => {
                let number = self.last();
                let panicked = (&mut self.agent).await.is_err_and(|error| error.is_panic());
                self.question = None;
                self.end = Some(if panicked {
                    let message = "the agent panicked".to_owned();
                    Message::Fail(Fail {
                        number,
                        message,
                        ..Default::default()
                    })
                } else {
                    Message::Finish(Finish {
                        number,
                        ..Default::default()
                    })
                });
            }
        }
    }

    /// Adds a text, or joins it with the last one that was not sent (W3).
    fn add(&mut self, text: String) {
        let is_new = self.last() > self.ever_sent;
        let last = self.waiting.back_mut().filter(|_| is_new);
        if let Some(event::Event::TextDelta(last)) = last.and_then(|last| last.event.as_mut()) {
            if last.len() + text.len() <= MAX_TEXT {
                return last.push_str(&text);
            }
        }
        let event = Some(event::Event::TextDelta(text));
        self.waiting.push_back(Event { event });
    }

    fn take_acked(&mut self, number: i64) {
        let durable = (number - self.acked).max(0) as usize;
        self.waiting.drain(..durable.min(self.waiting.len()));
        self.acked = self.acked.max(number);
    }

    /// Continues on a new connection after the last durable event (W8).
    fn resync(&mut self) {
        self.sent = self.acked;
        (self.end_sent, self.question_sent) = (false, false);
    }

    fn take_prompts(&mut self, folded: Folded) {
        for one in folded.prompts {
            self.folded.push(one.prompt);
            self.folded_run_ids.push(one.run_id);
        }
        if folded.number == self.fold_number {
            if let Some(answer) = self.question.take() {
                let _ = answer.send(std::mem::take(&mut self.folded));
            }
        }
    }

    /// What to send now, if anything: one emit at a time (W2, W3), then a question or the end (W5).
    fn next(&mut self) -> Option<Message> {
        if !self.begun_sent {
            self.begun_sent = true;
            return Some(Message::Begun(Begun {})); // W2
        }
        let is_urgent = self.end.is_some() || self.question.is_some();
        if self.last() > self.sent && (is_urgent || self.sent == self.acked) {
            let first = (self.sent - self.acked) as usize;
            let events: Vec<_> = self
                .waiting
                .iter()
                .skip(first)
                .take(MAX_EVENTS)
                .cloned()
                .collect();
            let number = self.sent + 1;
            self.sent += events.len() as i64;
            self.ever_sent = self.ever_sent.max(self.sent);
            return Some(Message::Emit(Emit { number, events }));
        }
        if self.question.is_some() && !self.question_sent {
            self.question_sent = true;
            return Some(Message::TakeFolded(TakeFolded {
                number: self.fold_number,
            }));
        }
        let is_due = self.end.is_some() && !self.end_sent;
        self.end_sent |= is_due;
        self.end.clone().filter(|_| is_due)
    }

    /// Stops the agent, and waits until it has returned.
    async fn stop(&mut self) {
        self.agent.abort();
        while self.output.recv().await.is_some() {}
    }

    fn resume(&self) -> Resume {
        Resume {
            run_id: self.turn.run_id.clone(),
            tenant: self.turn.tenant.clone(),
            attempt: self.turn.attempt,
            fence: self.turn.fence.clone(),
            acknowledged: self.acked,
            folded_run_ids: self.folded_run_ids.clone(),
        }
    }
}

type Responses = mpsc::Receiver<Result<WorkResponse, Status>>;

/// Executes one run at a time (W1).
struct Slot {
    client: WorkerServiceClient<Channel>,
    bearer: Option<MetadataValue<Ascii>>,
    agent: String,
    stopping: watch::Receiver<bool>,
    attempt: Option<Attempt>,
}

impl Slot {
    async fn serve(mut self) -> Result<(), Status> {
        let mut pause = Duration::from_millis(100);
        loop {
            let began = Instant::now();
            match self.connect().await {
                Ok(()) => return Ok(()),
                Err(status) if is_mistake(&status) => return Err(status), // W11
                Err(status) => eprintln!("reconnecting: {}", status.message()),
            }
            if *self.stopping.borrow() && self.attempt.is_none() {
                return Ok(());
            }
            if began.elapsed() > Duration::from_secs(60) {
                pause = Duration::from_millis(100);
            }
            sleep(pause).await; // W8
            pause = (2 * pause).min(Duration::from_secs(2));
        }
    }

    /// Serves over one connection until it is lost, or until the slot has stopped.
    async fn connect(&mut self) -> Result<(), Status> {
        let (up, requests) = mpsc::unbounded_channel();
        let mut request = Request::new(UnboundedReceiverStream::new(requests));
        if let Some(bearer) = self.bearer.clone() {
            request.metadata_mut().insert("authorization", bearer);
        }
        let (down, responses) = mpsc::channel(1);
        let reading = tokio::spawn(read(self.client.clone(), request, down));
        let served = self.exchange(&up, responses).await;
        reading.abort();
        served
    }

    async fn exchange(
        &mut self,
        up: &UnboundedSender<WorkRequest>,
        mut responses: Responses,
    ) -> Result<(), Status> {
        let mut is_synced = self.attempt.is_none();
        let mut is_leaving = false;
        send(up, self.offer());
        loop {
            if let Some(attempt) = self.attempt.as_mut().filter(|_| is_synced && !is_leaving) {
                while let Some(message) = attempt.next() {
                    send(up, message);
                }
            }
            let can_hear = !is_leaving && self.attempt.as_ref().is_some_and(Attempt::has_room);
            tokio::select! {
                said = listen(&mut self.attempt), if can_hear => {
                    if let Some(attempt) = &mut self.attempt {
                        attempt.hear(said).await;
                    }
                }
                () = raised(&mut self.stopping), if !is_leaving => { // W10
                    is_leaving = true;
                    if let Some(attempt) = &mut self.attempt {
                        attempt.stop().await;
                    }
                    send(up, Message::HandBack(HandBack {}));
                }
                response = responses.recv() => {
                    let ended = || Status::unavailable("the server ended the call");
                    let response = response.unwrap_or_else(|| Err(ended()))?;
                    if !self.take(response, &mut is_synced, is_leaving) {
                        continue;
                    }
                    if let Some(mut attempt) = self.attempt.take() {
                        attempt.stop().await;
                    }
                    is_synced = true;
                    if is_leaving {
                        return Ok(());
                    }
                    send(up, self.offer());
                }
            }
        }
    }

    /// Takes a message of the server; returns whether the turn is over.
    fn take(&mut self, response: WorkResponse, is_synced: &mut bool, is_leaving: bool) -> bool {
        use work_response::Message::{Acked, Cancel, Fenced, Folded, Turn};
        match (response.message, &mut self.attempt) {
            (Some(Turn(turn)), _) if !is_leaving => self.attempt = Some(Attempt::new(turn)),
            (Some(Acked(acked)), attempt) => {
                if let Some(attempt) = attempt {
                    attempt.take_acked(acked.number);
                    if !*is_synced {
                        attempt.resync();
                    }
                }
                *is_synced = true;
                return acked.ended;
            }
            (Some(Folded(folded)), Some(attempt)) => attempt.take_prompts(folded),
            (Some(Cancel(_)), Some(attempt)) => attempt.agent.abort(), // W6
            (Some(Fenced(_)), _) => return true,                       // W7
            _ => {}
        }
        false
    }

    fn offer(&self) -> Message {
        Message::Offer(Offer {
            agents: vec![self.agent.clone()],
            worker_id: format!("rust-{}", process::id()),
            protocol_version: 1,
            resume: self.attempt.as_ref().map(Attempt::resume),
        })
    }
}

/// Reads the responses of a call, whose headers may arrive with the first one.
async fn read(
    mut client: WorkerServiceClient<Channel>,
    request: Request<UnboundedReceiverStream<WorkRequest>>,
    down: mpsc::Sender<Result<WorkResponse, Status>>,
) {
    let mut responses = match client.work(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return drop(down.send(Err(status)).await),
    };
    while let Some(response) = responses.message().await.transpose() {
        let is_end = response.is_err();
        if down.send(response).await.is_err() || is_end {
            return;
        }
    }
}

async fn listen(attempt: &mut Option<Attempt>) -> Option<Said> {
    attempt.as_mut()?.output.recv().await
}

async fn raised(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|is_stopping| *is_stopping).await;
}

fn send(up: &UnboundedSender<WorkRequest>, message: Message) {
    // If the call has ended, its status comes next.
    let _ = up.send(WorkRequest {
        message: Some(message),
    });
}

fn is_mistake(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::InvalidArgument
            | Code::NotFound
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented
    )
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let server = variable("RUNLANE_SERVER").unwrap_or("127.0.0.1:50051".to_owned());
    let agent = variable("RUNLANE_AGENT").unwrap_or("default".to_owned());
    let bearer = bearer(&server)?;
    let channel = Endpoint::from_shared(format!("http://{server}"))?
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(10))
        .keep_alive_timeout(Duration::from_secs(5))
        .connect_lazy();
    let client = WorkerServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE);
    let (stop, stopping) = watch::channel(false);
    let mut slots = JoinSet::new();
    for _ in 0..SLOTS {
        let slot = Slot {
            client: client.clone(),
            bearer: bearer.clone(),
            agent: agent.clone(),
            stopping: stopping.clone(),
            attempt: None,
        };
        slots.spawn(slot.serve());
    }
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
        }
        let _ = stop.send(true);
        std::future::pending::<()>().await; // keeps the channel open
    });
    println!("worker for {agent}: {SLOTS} slots");
    while let Some(served) = slots.join_next().await {
        served??;
    }
    Ok(())
}

fn bearer(server: &str) -> Result<Option<MetadataValue<Ascii>>, Box<dyn Error>> {
    let Some(token) = variable("RUNLANE_TOKEN") else {
        return Ok(None);
    };
    let address = server
        .replace("localhost:", "127.0.0.1:")
        .parse::<SocketAddr>();
    if address.is_ok_and(|address| address.ip().is_loopback()) {
        return Ok(Some(format!("Bearer {token}").parse()?));
    }
    Err(format!("RUNLANE_TOKEN is not sent to {server}: the connection is not encrypted").into())
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}
