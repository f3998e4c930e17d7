//! One slot of a worker: a call of `Work`, opened again whenever it is lost.

use std::collections::HashMap;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::{self, UnboundedSender};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::attempt::{Attempt, Heard};
use super::turn::Agent;
use super::v1::work_request::{HandBack, Message, Offer};
use super::v1::work_response;
use super::v1::worker_service_client::WorkerServiceClient;
use super::v1::{WorkRequest, WorkResponse};

const MIN_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// How far the worker is in stopping.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
pub(super) enum Stage {
    Serving,
    /// Offers no more; active runs may end.
    Draining,
    HandingBack,
}

/// Executes one run at a time (W1). `clients` lead to nodes of the same store; the first one is used.
pub(super) struct Slot {
    pub(super) clients: Vec<WorkerServiceClient<Channel>>,
    pub(super) bearer: Option<MetadataValue<Ascii>>,
    pub(super) agents: Arc<HashMap<String, Agent>>,
    pub(super) name: String,
    pub(super) stage: watch::Receiver<Stage>,
    pub(super) attempt: Option<Attempt>,
    pub(super) was_served: bool,
}

impl Slot {
    /// Serves until the worker stops. Fails if a new call would fail too.
    pub(super) async fn serve(mut self) -> Result<(), Status> {
        let mut pause = MIN_PAUSE;
        loop {
            self.was_served = false;
            match self.connect().await {
                Ok(()) => return Ok(()),
                Err(status) if is_mistake(&status) => return Err(status), // W11
                Err(_) if self.is_done() => return Ok(()),
                Err(status) => eprintln!("reconnecting: {}", status.message()),
            }
            if self.was_served {
                pause = MIN_PAUSE;
            }
            sleep(pause).await; // W8
            pause = (2 * pause).min(MAX_PAUSE);
            self.clients.rotate_left(1);
        }
    }

    fn is_done(&self) -> bool {
        *self.stage.borrow() > Stage::Serving && self.attempt.is_none()
    }

    /// Serves over one connection until it is lost, or until the slot has stopped.
    async fn connect(&mut self) -> Result<(), Status> {
        let (up, requests) = mpsc::unbounded_channel();
        let mut request = Request::new(UnboundedReceiverStream::new(requests));
        if let Some(bearer) = self.bearer.clone() {
            request.metadata_mut().insert("authorization", bearer);
        }
        let (down, responses) = mpsc::channel(1);
        let reading = tokio::spawn(read(self.clients[0].clone(), request, down));
        let served = self.exchange(&up, responses).await;
        reading.abort();
        served
    }

    async fn exchange(
        &mut self,
        up: &UnboundedSender<WorkRequest>,
        mut responses: mpsc::Receiver<Result<WorkResponse, Status>>,
    ) -> Result<(), Status> {
        let mut is_synced = self.attempt.is_none();
        let mut is_leaving = false;
        let mut stage = self.stage.clone();
        send(up, self.offer());
        loop {
            if let Some(attempt) = self.attempt.as_mut().filter(|_| is_synced && !is_leaving) {
                while let Some(message) = attempt.next() {
                    send(up, message);
                }
            }
            let can_hear = !is_leaving && self.attempt.as_ref().is_some_and(Attempt::has_room);
            let due = if self.attempt.is_none() {
                Stage::Draining
            } else {
                Stage::HandingBack
            };
            tokio::select! {
                heard = listen(&mut self.attempt), if can_hear => {
                    if let Some(attempt) = &mut self.attempt {
                        attempt.hear(heard);
                    }
                }
                () = reached(&mut stage, due), if !is_leaving => { // W10
                    is_leaving = true;
                    if let Some(attempt) = &mut self.attempt {
                        attempt.stop().await;
                    }
                    send(up, Message::HandBack(HandBack {}));
                }
                response = responses.recv() => {
                    let ended = || Status::unavailable("the server ended the call");
                    let response = response.unwrap_or_else(|| Err(ended()))?;
                    self.was_served = true;
                    if !self.take(response, &mut is_synced, is_leaving) {
                        continue;
                    }
                    if let Some(mut attempt) = self.attempt.take() {
                        attempt.stop().await;
                    }
                    is_synced = true;
                    if is_leaving || self.is_done() {
                        return Ok(());
                    }
                    send(up, self.offer());
                }
            }
        }
    }

    /// Takes a message of the server; returns whether the turn is over.
    fn take(&mut self, response: WorkResponse, is_synced: &mut bool, is_leaving: bool) -> bool {
        use work_response::Message::{Acked, Cancel, Fenced, Parked, Turn};
        match (response.message, &mut self.attempt) {
            (Some(Turn(turn)), _) if !is_leaving => {
                if let Some(agent) = self.agents.get(&turn.agent) {
                    self.attempt = Some(Attempt::new(turn, agent));
                }
            }
            (Some(Acked(acked)), attempt) => {
                if let Some(attempt) = attempt {
                    attempt.take_acked(&acked, !*is_synced);
                }
                *is_synced = true;
                return acked.ended;
            }
            (Some(Cancel(_)), Some(attempt)) => attempt.cancel(), // W6
            (Some(Fenced(_) | Parked(_)), _) => return true,      // W7, W13
            (Some(message), Some(attempt)) => attempt.take(message),
            _ => {}
        }
        false
    }

    fn offer(&self) -> Message {
        Message::Offer(Offer {
            agents: self.agents.keys().cloned().collect(),
            worker_id: self.name.clone(),
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

async fn listen(attempt: &mut Option<Attempt>) -> Heard {
    match attempt {
        Some(attempt) => attempt.listen().await,
        None => pending().await,
    }
}

async fn reached(stage: &mut watch::Receiver<Stage>, due: Stage) {
    if stage.wait_for(|stage| *stage >= due).await.is_err() {
        pending::<()>().await;
    }
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
