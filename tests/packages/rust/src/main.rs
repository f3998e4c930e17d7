//! Runs one prompt to its end and cancels another, with the packed crate.

use std::error::Error;

use runlane::v1::run_event::Event;
use runlane::v1::run_service_client::RunServiceClient;
use runlane::v1::{CancelRequest, RunAcceptedRequest, SubscribeRunRequest};

const SESSION: &str = "rust";

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let words: Vec<String> = std::env::args().collect();
    follow(&words[1], &words[2], false).await?;
    follow(&words[1], &words[3], true).await
}

/// Prints the text of a run and its end. With `cancel`, it cancels the run at its first text.
async fn follow(server: &str, prompt: &str, cancel: bool) -> Result<(), Box<dyn Error>> {
    let mut runs = RunServiceClient::connect(format!("http://{server}")).await?;
    let accept = RunAcceptedRequest {
        session_id: SESSION.into(),
        prompt: prompt.into(),
        allow_missing: true,
        ..Default::default()
    };
    let run = runs.run_accepted(accept).await?.into_inner().run;
    let run_id = run.ok_or("no run")?.run_id;
    let subscribe = SubscribeRunRequest { run_id, ..Default::default() };
    let mut events = runs.subscribe_run(subscribe).await?.into_inner();
    while let Some(message) = events.message().await? {
        match message.event.and_then(|event| event.event) {
            Some(Event::TextDelta(delta)) => {
                println!("{}", delta.text);
                if cancel {
                    let session_id = SESSION.into();
                    runs.cancel(CancelRequest { session_id, ..Default::default() }).await?;
                }
            }
            Some(Event::RunComplete(complete)) => println!("{}", complete.state().as_str_name()),
            _ => {}
        }
    }
    Ok(())
}
