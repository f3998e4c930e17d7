//! Agents that go wrong (test_odd_workers.py).

use std::error::Error;
use std::time::Duration;

use runlane::worker::{AgentError, AgentResult, Turn, Worker};
use tokio::time::sleep;

async fn answer(turn: Turn) -> AgentResult {
    match turn.prompt() {
        "wordless" => return Err(String::new().into()),
        "no text" => {
            return Err(Box::new(AgentError {
                reason: "NO_MODEL".to_owned(),
                message: String::new(),
            }));
        }
        "early" => {
            drop(turn);
            println!("let go");
            sleep(Duration::MAX).await;
        }
        "clone" => {
            let clone = turn.clone();
            tokio::spawn(async move {
                loop {
                    clone.custom("beat", "{}").await;
                }
            });
            turn.say("ok").await;
        }
        _ => turn.say("ok").await,
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    println!("worker for default: 1 slot");
    Worker::new()
        .servers([std::env::var("RUNLANE_SERVER")?])
        .agent("default", answer)
        .slots(1)
        .run()
        .await
}
