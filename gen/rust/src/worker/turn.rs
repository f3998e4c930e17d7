//! The turn of a run, as an agent sees it.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::future::{Future, pending};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};

use super::v1::work_request::{Ask, FindStep, Finish, GetHistory, Message, TakeFolded};
use super::v1::work_response::{self, FoldedPrompt};
use super::v1::{Event, Question, event};
use crate::v1::{Artifact, InputAnswer, Message as TranscriptMessage, run_event};

/// Bytes in a text, and so fewer characters than the limit.
pub(super) const MAX_TEXT: usize = 1 << 14;

/// What an agent returns. An error fails the run; an `AgentError` does so with a reason of its own.
pub type AgentResult = Result<(), Box<dyn Error + Send + Sync>>;

pub(super) type Agent =
    Arc<dyn Fn(Turn) -> Pin<Box<dyn Future<Output = AgentResult> + Send>> + Send + Sync>;

/// Fails a run with a reason of the agent's own, such as MODEL_UNAVAILABLE.
#[derive(Debug)]
pub struct AgentError {
    pub reason: String,
    pub message: String,
}

impl fmt::Display for AgentError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for AgentError {}

#[derive(Clone)]
pub(super) enum Answer {
    Folded(Vec<FoldedPrompt>),
    History(Vec<TranscriptMessage>),
    Step(Option<String>),
    People(Vec<InputAnswer>),
}

/// What an agent says to its slot.
pub(super) enum Said {
    Event(Event, Option<oneshot::Sender<()>>),
    Ask(String, Message, oneshot::Sender<Answer>),
    Report(Box<dyn FnOnce(&mut Finish) + Send>),
}

/// The input of an agent, and what it may do. When the run is cancelled or taken away, the future of
/// the agent is dropped where it waits. The turn ends with that future, also if a task that the agent
/// has spawned holds a clone: what it says later is dropped, and it waits there for ever. So await or
/// abort such tasks, for example with a `JoinSet`.
#[derive(Clone)]
pub struct Turn {
    given: Arc<work_response::Turn>,
    slot: mpsc::Sender<Said>,
    asked: Arc<Mutex<HashMap<u64, u32>>>,
}

impl Turn {
    pub(super) fn new(given: Arc<work_response::Turn>, slot: mpsc::Sender<Said>) -> Self {
        Self {
            given,
            slot,
            asked: Arc::default(),
        }
    }

    /// The prompt to answer.
    pub fn prompt(&self) -> &str {
        &self.given.prompt
    }

    /// All of the turn: session, run, attempt, attachments, labels, deadline.
    pub fn given(&self) -> &work_response::Turn {
        &self.given
    }

    /// Emits a piece of the answer. It waits while too much of the output is not durable.
    pub async fn say(&self, text: &str) {
        for piece in pieces(text) {
            self.emit(event::Event::TextDelta(piece.to_owned())).await;
        }
    }

    /// Emits a piece of the model's reasoning.
    pub async fn think(&self, text: &str) {
        for piece in pieces(text) {
            let event = event::Event::ReasoningDelta(piece.to_owned());
            self.emit(event).await;
        }
    }

    /// Emits an artifact, or a piece of one.
    pub async fn artifact(&self, artifact: Artifact) {
        self.emit(event::Event::Artifact(artifact)).await;
    }

    /// Emits an event of a type that the agent defines, with a JSON value.
    pub async fn custom(&self, r#type: &str, json: &str) {
        let (r#type, json) = (r#type.to_owned(), json.to_owned());
        self.emit(event::Event::Custom(run_event::Custom { r#type, json }))
            .await;
    }

    /// Emits an event of any kind: a tool call, its result, and all of the above.
    pub async fn emit(&self, event: event::Event) {
        self.tell(Said::Event(Event { event: Some(event) }, None))
            .await;
    }

    /// Sets the structured result of the run, a JSON value.
    pub async fn set_result(&self, json: &str) {
        let result_json = json.to_owned();
        self.report(|end| end.result_json = result_json).await;
    }

    /// Sets facts about the turn: usage, model, finish reason.
    pub async fn report(&self, facts: impl FnOnce(&mut Finish) + Send + 'static) {
        self.tell(Said::Report(Box::new(facts))).await;
    }

    /// Takes the prompts that wait to join the turn. Call it between two steps: answer them too (W9).
    pub async fn take_folded(&self) -> Vec<FoldedPrompt> {
        match self
            .ask_slot("folded", Message::TakeFolded(TakeFolded::default()))
            .await
        {
            Answer::Folded(prompts) => prompts,
            _ => Vec::new(),
        }
    }

    /// The transcript before the turn; a long message comes in several parts with the same id.
    pub async fn history(&self) -> Vec<TranscriptMessage> {
        match self
            .ask_slot("history", Message::GetHistory(GetHistory {}))
            .await
        {
            Answer::History(messages) => messages,
            _ => Vec::new(),
        }
    }

    /// Does a piece of work once per run, also if an attempt is repeated: returns the result that an
    /// earlier attempt has stored, or does the work and makes its result, a JSON value, durable (W12).
    /// A key has 1 to 128 bytes.
    pub async fn step<E>(
        &self,
        key: &str,
        work: impl Future<Output = Result<String, E>>,
    ) -> Result<String, E> {
        let key = key.to_owned();
        let find = Message::FindStep(FindStep { key: key.clone() });
        if let Answer::Step(Some(found)) = self.ask_slot(&format!("step {key}"), find).await {
            return Ok(found);
        }
        let result = work.await?;
        let step = run_event::Step {
            key,
            result: result.clone(),
        };
        let event = Event {
            event: Some(event::Event::Step(step)),
        };
        let (stored, is_stored) = oneshot::channel();
        self.tell(Said::Event(event, Some(stored))).await;
        or_dropped(is_stored).await;
        Ok(result)
    }

    /// Asks people; the answers come in the order of the questions. Without an answer the agent ends
    /// here: the run leaves this worker, and starts again, with any worker, once all is answered (W13).
    /// What the agent does before happens again, so put what must not be repeated into steps. Without
    /// a key, the question itself is the key: the same key gets the same answer, and nobody is asked
    /// twice.
    pub async fn ask(&self, questions: impl IntoIterator<Item = Question>) -> Vec<InputAnswer> {
        let questions: Vec<_> = questions.into_iter().map(|one| self.keyed(one)).collect();
        let keys: Vec<_> = questions.iter().map(|one| one.key.as_str()).collect();
        let name = format!("ask {}", keys.join("\n"));
        match self
            .ask_slot(
                &name,
                Message::Ask(Ask {
                    questions,
                    ..Ask::default()
                }),
            )
            .await
        {
            Answer::People(answers) => answers,
            _ => Vec::new(),
        }
    }

    /// The same key in each attempt that asks the same; equal questions are counted.
    fn keyed(&self, mut question: Question) -> Question {
        if question.key.is_empty() {
            let mut hasher = DefaultHasher::new(); // the same in each process
            (
                &question.text,
                &question.tool_name,
                &question.arguments_json,
            )
                .hash(&mut hasher);
            (&question.schema_json, &question.choices).hash(&mut hasher);
            let hash = hasher.finish();
            let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
            let number = asked.entry(hash).or_default();
            *number += 1;
            question.key = format!("{hash:016x}-{number}");
        }
        question
    }

    async fn ask_slot(&self, name: &str, message: Message) -> Answer {
        let (answer, answered) = oneshot::channel();
        self.tell(Said::Ask(name.to_owned(), message, answer)).await;
        or_dropped(answered).await
    }

    async fn tell(&self, said: Said) {
        if self.slot.send(said).await.is_err() {
            pending::<()>().await; // the turn is over, and the agent about to be dropped
        }
    }
}

async fn or_dropped<T>(answered: oneshot::Receiver<T>) -> T {
    match answered.await {
        Ok(answer) => answer,
        Err(_) => pending().await,
    }
}

fn pieces(mut text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    while !text.is_empty() {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        pieces.push(&text[..end]);
        text = &text[end..];
    }
    pieces
}
