//! Quickstart: runs a prompt in a session and prints the answer as it arrives. Ctrl-C cancels the run.

use std::env;
use std::error::Error;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::process::{self, ExitCode};
use std::time::Duration;

use tonic::Request;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Endpoint;

use v1::run_event::Event;
use v1::run_service_client::RunServiceClient;
use v1::{CancelRequest, RunAcceptedRequest, RunComplete, RunState, SubscribeRunRequest};

#[allow(clippy::all)]
mod v1 {
    tonic::include_proto!("runlane.v1");
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match run().await {
        Ok(complete) => report(&complete),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<RunComplete, Box<dyn Error>> {
    let [session_id, prompt] = <[String; 2]>::try_from(env::args().skip(1).collect::<Vec<_>>())
        .map_err(|_| "usage: quickstart SESSION PROMPT")?;
    let server = variable("RUNLANE_SERVER").unwrap_or("127.0.0.1:50051".to_owned());
    let bearer = bearer(&server)?;
    let channel = Endpoint::from_shared(format!("http://{server}"))?.connect_lazy();
    let mut runs = RunServiceClient::with_interceptor(channel, move |mut request: Request<()>| {
        if let Some(value) = bearer.clone() {
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    });

    // Listens before the run is accepted: a Ctrl-C from here on finds a run to cancel.
    let mut interrupt = tokio::spawn(tokio::signal::ctrl_c());
    let accept = RunAcceptedRequest {
        session_id,
        prompt,
        allow_missing: true,
        ..Default::default()
    };
    let accepted = runs.run_accepted(in_time(accept)).await?.into_inner();
    let run_id = accepted.run.unwrap_or_default().run_id;

    let subscribe = SubscribeRunRequest {
        run_id: run_id.clone(),
        after_index: 0,
    };
    let mut events = runs.subscribe_run(subscribe).await?.into_inner();
    let mut cancelled = false;
    loop {
        let message = tokio::select! {
            message = events.message() => message?.ok_or("the stream ended before the run")?,
            _ = &mut interrupt, if !cancelled => {
                tokio::spawn(exit_on_ctrl_c());
                // The stream stays open and delivers the end of the cancelled run.
                let cancel = CancelRequest { run_id: run_id.clone(), ..Default::default() };
                runs.cancel(in_time(cancel)).await?;
                cancelled = true;
                continue;
            }
        };
        match message.event.and_then(|event| event.event) {
            Some(Event::TextDelta(delta)) => {
                print!("{}", delta.text);
                io::stdout().flush()?;
            }
            Some(Event::RunComplete(complete)) => return Ok(complete),
            _ => {}
        }
    }
}

fn report(complete: &RunComplete) -> ExitCode {
    let name = complete.state().as_str_name();
    let state = name.trim_start_matches("RUN_STATE_").to_lowercase();
    println!();
    let error = complete.error.as_ref();
    eprintln!(
        "{state}{}",
        error.map_or(String::new(), |error| format!(": {}", error.message))
    );
    match complete.state() {
        RunState::Completed => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// A second Ctrl-C ends the program.
async fn exit_on_ctrl_c() {
    if tokio::signal::ctrl_c().await.is_ok() {
        process::exit(130);
    }
}

/// A unary request with a deadline.
fn in_time<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(10));
    request
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
