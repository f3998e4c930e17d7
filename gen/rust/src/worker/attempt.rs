//! A turn in hand: what is to be sent for it.

use std::collections::VecDeque;
use std::error::Error;
use std::sync::Arc;

use prost::Message as _;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinError, JoinHandle};

use super::turn::{Agent, AgentError, AgentResult, Answer, MAX_TEXT, Said, Turn};
use super::v1::work_request::{Begun, Emit, Fail, Finish, Message, Resume};
use super::v1::work_response::{self, Acked, FoldedPrompt};
use super::v1::{Event, event};
use crate::v1::Message as TranscriptMessage;

const MAX_EVENTS: usize = 1000;
/// Bytes in an emit, unless a single event is larger.
const MAX_EMIT_BYTES: usize = 1 << 20;
/// Characters in the message of an error.
const MAX_ERROR: usize = 2048;

struct Asked {
    name: String,
    message: Message,
    is_sent: bool,
    waiting: Vec<oneshot::Sender<Answer>>,
}

/// What an attempt hears of its agent.
pub(super) enum Heard {
    Said(Said),
    Returned(Result<AgentResult, JoinError>),
}

/// The attempt outlives the connection.
pub(super) struct Attempt {
    turn: Arc<work_response::Turn>,
    agent: JoinHandle<AgentResult>,
    is_returned: bool,
    output: mpsc::Receiver<Said>,
    /// Not acknowledged (W4).
    waiting: VecDeque<Event>,
    acked: i64,
    /// On this connection.
    sent: i64,
    /// The last event that must stay as it is, because it was sent (W3).
    ever_sent: i64,
    /// Who waits until a number is durable.
    durable: Vec<(i64, oneshot::Sender<()>)>,
    is_begun: bool,
    requests: Vec<Asked>,
    fold_number: i64,
    folded: Vec<FoldedPrompt>,
    folded_run_ids: Vec<String>,
    history: Vec<TranscriptMessage>,
    finish: Finish,
    end: Option<Message>,
    is_end_sent: bool,
}

impl Attempt {
    pub(super) fn new(turn: work_response::Turn, agent: &Agent) -> Self {
        let (slot, output) = mpsc::channel(1);
        let turn = Arc::new(turn);
        let given = Turn::new(turn.clone(), slot);
        Self {
            agent: tokio::spawn(agent(given)),
            is_returned: false,
            turn,
            output,
            waiting: VecDeque::new(),
            acked: 0,
            sent: 0,
            ever_sent: 0,
            durable: Vec::new(),
            is_begun: false,
            requests: Vec::new(),
            fold_number: 0,
            folded: Vec::new(),
            folded_run_ids: Vec::new(),
            history: Vec::new(),
            finish: Finish::default(),
            end: None,
            is_end_sent: false,
        }
    }

    fn last(&self) -> i64 {
        self.acked + self.waiting.len() as i64
    }

    /// Whether there is room for what the agent says next (W4).
    pub(super) fn has_room(&self) -> bool {
        !self.is_returned && self.waiting.len() < self.turn.window.max(1) as usize
    }

    /// What the agent says next, or its end, which comes after all that it said. The end is that of its
    /// future: others may hold its `Turn` for longer, and it may drop its own earlier.
    pub(super) async fn listen(&mut self) -> Heard {
        tokio::select! {
            Some(said) = self.output.recv() => Heard::Said(said),
            returned = &mut self.agent => Heard::Returned(returned),
        }
    }

    /// Takes what the agent says.
    pub(super) fn hear(&mut self, heard: Heard) {
        match heard {
            Heard::Said(Said::Event(event, stored)) => {
                self.add(event);
                if let Some(stored) = stored {
                    self.durable.push((self.last(), stored));
                }
            }
            Heard::Said(Said::Ask(name, message, answer)) => self.ask(name, message, answer),
            Heard::Said(Said::Report(facts)) => facts(&mut self.finish),
            Heard::Returned(returned) => self.end_with(returned),
        }
    }

    fn end_with(&mut self, returned: Result<AgentResult, JoinError>) {
        self.is_returned = true;
        self.output.close();
        // What it said just before its end. A task that holds a clone of its turn says no more.
        while let Ok(said) = self.output.try_recv() {
            self.hear(Heard::Said(said));
        }
        self.requests.clear();
        self.end = Some(match returned {
            Ok(Err(error)) => self.failed(&*error),
            Err(error) if error.is_panic() => self.failed(&error),
            _ => Message::Finish(Finish {
                number: self.last(),
                ..self.finish.clone()
            }), // W6
        });
    }

    fn failed(&self, error: &(dyn Error + 'static)) -> Message {
        let own = error.downcast_ref::<AgentError>();
        Message::Fail(Fail {
            number: self.last(),
            reason: own.map(|own| own.reason.clone()).unwrap_or_default(),
            message: error.to_string().chars().take(MAX_ERROR).collect(),
            usage: self.finish.usage,
            model: self.finish.model.clone(),
        })
    }

    /// Adds an event, or joins a text with the last one that was not sent (W3).
    fn add(&mut self, event: Event) {
        let is_new = self.last() > self.ever_sent;
        let before = self.waiting.back_mut().filter(|_| is_new);
        if !before.is_some_and(|before| join(before, &event)) {
            self.waiting.push_back(event);
        }
    }

    /// A request that is open is not sent twice.
    fn ask(&mut self, name: String, mut message: Message, answer: oneshot::Sender<Answer>) {
        if let Some(open) = self.requests.iter_mut().find(|one| one.name == name) {
            return open.waiting.push(answer);
        }
        if let Message::TakeFolded(take) = &mut message {
            self.fold_number += 1;
            take.number = self.fold_number;
        }
        let waiting = vec![answer];
        self.requests.push(Asked {
            name,
            message,
            is_sent: false,
            waiting,
        });
    }

    fn answer(&mut self, name: &str, answer: Answer) {
        if let Some(at) = self.requests.iter().position(|one| one.name == name) {
            let mut answer = answer;
            for waiting in self.requests.remove(at).waiting {
                let _ = waiting.send(answer.clone());
                if let Answer::Folded(prompts) = &mut answer {
                    prompts.clear(); // each prompt has one taker
                }
            }
        }
    }

    pub(super) fn take_acked(&mut self, acked: &Acked, is_new_connection: bool) {
        let durable = (acked.number - self.acked).max(0) as usize;
        self.waiting.drain(..durable.min(self.waiting.len()));
        self.acked = self.acked.max(acked.number);
        let (stored, waiting) = std::mem::take(&mut self.durable)
            .into_iter()
            .partition(|(number, _)| *number <= acked.number);
        self.durable = waiting;
        let stored: Vec<(i64, oneshot::Sender<()>)> = stored;
        for (_, stored) in stored {
            let _ = stored.send(());
        }
        if is_new_connection {
            // W8: continue after the last durable event.
            self.sent = self.acked;
            self.is_end_sent = false;
            self.is_begun = true;
            self.history.clear();
            self.requests.iter_mut().for_each(|one| one.is_sent = false);
        }
    }

    /// Takes the answer to a request.
    pub(super) fn take(&mut self, message: work_response::Message) {
        use work_response::Message::{Answers, Folded, History, Step};
        match message {
            Folded(folded) => {
                for one in folded.prompts {
                    self.folded_run_ids.push(one.run_id.clone());
                    self.folded.push(one);
                }
                if folded.number > 0 {
                    let prompts = std::mem::take(&mut self.folded);
                    self.answer("folded", Answer::Folded(prompts));
                }
            }
            History(part) => {
                self.history.extend(part.messages);
                if part.last {
                    let messages = std::mem::take(&mut self.history);
                    self.answer("history", Answer::History(messages));
                }
            }
            Step(step) => self.answer(&format!("step {}", step.key), Answer::Step(step.result)),
            Answers(given) => {
                let keys: Vec<_> = given.answers.iter().map(|one| one.key.clone()).collect();
                let answers = given.answers.into_iter().filter_map(|one| one.answer);
                let answers = Answer::People(answers.collect());
                self.answer(&format!("ask {}", keys.join("\n")), answers);
            }
            _ => {}
        }
    }

    /// What to send now, if anything. One emit at a time: what comes meanwhile is joined (W3).
    pub(super) fn next(&mut self) -> Option<Message> {
        if !self.is_begun {
            self.is_begun = true;
            return Some(Message::Begun(Begun {})); // W2
        }
        let asks = self.requests.iter().any(|one| !one.is_sent);
        let is_urgent = self.end.is_some() || asks || !self.durable.is_empty();
        if self.last() > self.sent && (is_urgent || self.sent == self.acked) {
            return Some(self.next_emit());
        }
        if let Some(request) = self.requests.iter_mut().find(|one| !one.is_sent) {
            request.is_sent = true;
            return Some(request.message.clone());
        }
        let is_due = self.end.is_some() && !self.is_end_sent;
        self.is_end_sent |= is_due;
        self.end.clone().filter(|_| is_due) // W5
    }

    fn next_emit(&mut self) -> Message {
        let (mut events, mut size) = (Vec::new(), 0);
        for event in self.waiting.iter().skip((self.sent - self.acked) as usize) {
            size += event.encoded_len();
            if !events.is_empty() && (size > MAX_EMIT_BYTES || events.len() == MAX_EVENTS) {
                break;
            }
            events.push(event.clone());
        }
        let number = self.sent + 1;
        self.sent += events.len() as i64;
        self.ever_sent = self.ever_sent.max(self.sent);
        Message::Emit(Emit { number, events })
    }

    /// Stops the agent; its end is heard later.
    pub(super) fn cancel(&self) {
        self.agent.abort();
    }

    /// Stops the agent, and waits until it has returned.
    pub(super) async fn stop(&mut self) {
        self.cancel();
        self.output.close();
        if !self.is_returned {
            self.is_returned = true;
            let _ = (&mut self.agent).await;
        }
    }

    pub(super) fn resume(&self) -> Resume {
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

/// Joins a text with the event before it; returns whether that is possible.
fn join(before: &mut Event, event: &Event) -> bool {
    use event::Event::{ReasoningDelta, TextDelta};
    match (&mut before.event, &event.event) {
        (Some(TextDelta(first)), Some(TextDelta(second)))
        | (Some(ReasoningDelta(first)), Some(ReasoningDelta(second)))
            if first.len() + second.len() <= MAX_TEXT =>
        {
            first.push_str(second);
            true
        }
        _ => false,
    }
}
