//! The worker: its settings, and its slots.

use std::collections::HashMap;
use std::error::Error;
use std::future::Future;
use std::net::SocketAddr;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;

use super::attempt::{Agent, AgentResult, Turn};
use super::slot::{Slot, Stage};
use super::v1::worker_service_client::WorkerServiceClient;

/// Where a server listens by default.
pub const DEFAULT_SERVER: &str = "127.0.0.1:50051";

const MAX_MESSAGE: usize = (4 << 20) + (64 << 10);
const HAND_BACK_TIMEOUT: Duration = Duration::from_secs(5);

/// Executes runs of the agents that a server declares as `worker`. It does what the page
/// docs/workers.md asks of a worker; the numbers W1 to W14 stand in the comments.
///
/// ```no_run
/// use runlane::worker::{AgentResult, Turn, Worker};
///
/// async fn answer(turn: Turn) -> AgentResult {
///     turn.say(&turn.prompt().to_uppercase()).await;
///     Ok(())
/// }
///
/// # async fn run() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
/// Worker::new().agent("default", answer).slots(8).run().await
/// # }
/// ```
pub struct Worker {
    servers: Vec<String>,
    agents: HashMap<String, Agent>,
    slots: usize,
    token: String,
    drain: Duration,
    name: String,
}

impl Default for Worker {
    fn default() -> Self {
        Self {
            servers: vec![DEFAULT_SERVER.to_owned()],
            agents: HashMap::new(),
            slots: 1,
            token: String::new(),
            drain: Duration::ZERO,
            name: format!("rust:{}", process::id()),
        }
    }
}

impl Worker {
    /// A worker with one slot and without agents.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an agent; `default` is the agent of a server with one.
    pub fn agent<F, R>(mut self, name: &str, agent: F) -> Self
    where
        F: Fn(Turn) -> R + Send + Sync + 'static,
        R: Future<Output = AgentResult> + Send + 'static,
    {
        self.agents
            .insert(name.to_owned(), Arc::new(move |turn| Box::pin(agent(turn))));
        self
    }

    /// Sets the addresses of one or more nodes of the same store: `host:port`, or an `https://` URL with
    /// the feature `tls-native-roots` of tonic.
    pub fn servers<S: Into<String>>(mut self, addresses: impl IntoIterator<Item = S>) -> Self {
        self.servers = addresses.into_iter().map(Into::into).collect();
        self
    }

    /// Sets the number of runs that are executed at a time.
    pub fn slots(mut self, count: usize) -> Self {
        self.slots = count;
        self
    }

    /// Sets the token, which needs the role work. It is sent to another machine only over TLS.
    pub fn token(mut self, secret: &str) -> Self {
        self.token = secret.to_owned();
        self
    }

    /// Sets how long active runs may continue after a signal before they are given back.
    pub fn drain(mut self, time: Duration) -> Self {
        self.drain = time;
        self
    }

    /// Sets the name of the worker in the logs of the server.
    pub fn name(mut self, shown: &str) -> Self {
        self.name = shown.to_owned();
        self
    }

    /// Executes runs until SIGTERM or Ctrl-C. Fails if the server refuses the worker, for example
    /// because it does not declare an agent.
    pub async fn run(self) -> Result<(), Box<dyn Error + Send + Sync>> {
        let bearer = self.bearer()?;
        let mut clients = Vec::new();
        for server in &self.servers {
            let channel = Endpoint::from_shared(url(server))?
                .connect_timeout(Duration::from_secs(5))
                .http2_keep_alive_interval(Duration::from_secs(10))
                .keep_alive_timeout(Duration::from_secs(5))
                .connect_lazy();
            clients.push(WorkerServiceClient::new(channel).max_decoding_message_size(MAX_MESSAGE)); // W1
        }
        let (stop, stage) = watch::channel(Stage::Serving);
        let agents = Arc::new(self.agents);
        let mut slots = JoinSet::new();
        for n in 0..self.slots {
            let mut nodes = clients.clone();
            nodes.rotate_left(n % clients.len());
            let slot = Slot {
                clients: nodes,
                bearer: bearer.clone(),
                agents: agents.clone(),
                name: self.name.clone(),
                stage: stage.clone(),
                attempt: None,
                was_served: false,
            };
            slots.spawn(slot.serve());
        }
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = tokio::signal::ctrl_c() => {}
            served = ended(&mut slots) => return served,
        }
        let _ = stop.send(Stage::Draining);
        tokio::select! {
            served = ended(&mut slots) => return served,
            () = sleep(self.drain) => {}
        }
        let _ = stop.send(Stage::HandingBack);
        timeout(HAND_BACK_TIMEOUT, ended(&mut slots))
            .await
            .unwrap_or(Ok(()))
    }

    fn bearer(&self) -> Result<Option<MetadataValue<Ascii>>, Box<dyn Error + Send + Sync>> {
        if self.token.is_empty() {
            return Ok(None);
        }
        if let Some(server) = self.servers.iter().find(|server| !is_private(server)) {
            let why = "the connection is not encrypted";
            return Err(format!("token: is not sent to {server}: {why}").into());
        }
        Ok(Some(format!("Bearer {}", self.token).parse()?))
    }
}

async fn ended(
    slots: &mut JoinSet<Result<(), tonic::Status>>,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    while let Some(served) = slots.join_next().await {
        served?.map_err(|status| status.message().to_owned())?;
    }
    Ok(())
}

fn url(server: &str) -> String {
    if server.contains("://") {
        server.to_owned()
    } else {
        format!("http://{server}")
    }
}

/// Whether nobody else can read what is sent there.
fn is_private(server: &str) -> bool {
    let address = server
        .trim_start_matches("http://")
        .replace("localhost:", "127.0.0.1:");
    let is_loopback = address
        .parse::<SocketAddr>()
        .is_ok_and(|address| address.ip().is_loopback());
    server.starts_with("https://") || is_loopback
}
