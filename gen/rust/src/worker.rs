//! Executes runs of a Runlane server in this process (feature `worker`), and the calls for that: `v1`.

#[cfg(feature = "worker")]
mod attempt;
#[cfg(feature = "worker")]
mod run;
#[cfg(feature = "worker")]
mod slot;
#[cfg(feature = "worker")]
mod turn;

#[cfg(feature = "worker")]
pub use run::{DEFAULT_SERVER, Worker};
#[cfg(feature = "worker")]
pub use turn::{AgentError, AgentResult, Turn};

/// Calls of processes that execute runs: `runlane.worker.v1`.
#[allow(clippy::all, rustdoc::all)]
pub mod v1 {
    include!("generated/runlane.worker.v1.rs");
}
