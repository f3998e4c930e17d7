//! Generates the client from `proto/`. protox compiles it, so protoc is not needed.

use std::error::Error;

const PROTO: &str = "../../../../proto";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={PROTO}");
    let services = [
        "runlane/v1/run_service.proto",
        "runlane/v1/session_service.proto",
    ];
    let files = protox::compile(services, [PROTO])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(files)?;
    Ok(())
}
