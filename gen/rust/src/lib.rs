//! gRPC clients of Runlane, generated with prost and tonic.

/// The service: `runlane.v1`.
#[allow(clippy::all, rustdoc::all)]
pub mod v1 {
    include!("generated/runlane.v1.rs");
}

/// Calls for tests: `runlane.harness.v1`, which only `runlane-server --harness` serves.
pub mod harness {
    #[allow(clippy::all, rustdoc::all)]
    pub mod v1 {
        include!("generated/runlane.harness.v1.rs");
    }
}

pub mod worker;
