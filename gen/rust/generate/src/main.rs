//! Generates `gen/rust/src/generated` from `proto/`: `generate PROTO OUT`. protox compiles the files,
//! so protoc is not needed.

use std::error::Error;

const FILES: [&str; 5] = [
    "runlane/v1/error_reason.proto",
    "runlane/v1/run_service.proto",
    "runlane/v1/session_service.proto",
    "runlane/worker/v1/worker_service.proto",
    "runlane/harness/v1/harness_service.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut words = std::env::args().skip(1);
    let (Some(proto), Some(out)) = (words.next(), words.next()) else {
        return Err("usage: generate PROTO OUT".into());
    };
    std::fs::create_dir_all(&out)?;
    let files = protox::compile(FILES, [proto])?;
    tonic_prost_build::configure()
        .build_server(false)
        .out_dir(out)
        .compile_fds(files)?;
    Ok(())
}
