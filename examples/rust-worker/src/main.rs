//! A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names, until SIGTERM.

use std::env;
use std::process::ExitCode;
use std::time::Duration;

use runlane::v1::{Artifact, artifact, input_answer::Value, part};
use runlane::worker::v1::Question;
use runlane::worker::{AgentError, AgentResult, DEFAULT_SERVER, Turn, Worker};

const SLOTS: usize = 4;

/// Says the prompt in capitals, a word at a time, then the prompts that joined the turn.
async fn answer(turn: Turn) -> AgentResult {
    if let Some(version) = turn.prompt().strip_prefix("release ") {
        return release(&turn, version).await;
    }
    if turn.prompt() == "recall" {
        return recall(&turn).await;
    }
    let mut prompts = vec![turn.prompt().to_owned()];
    while !prompts.is_empty() {
        for word in prompts.join(" ").split_whitespace() {
            turn.say(&format!("{} ", word.to_uppercase())).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let folded = turn.take_folded().await;
        prompts = folded.into_iter().map(|one| one.prompt).collect();
    }
    Ok(())
}

/// Builds once, also if it is called again, asks people, and deploys.
async fn release(turn: &Turn, version: &str) -> AgentResult {
    let build = turn.step("build", async {
        println!("building {version}");
        Ok::<_, std::fmt::Error>(format!("\"app-{version}\""))
    });
    let build = build.await?;
    let name = build.trim_matches('"');
    let question = Question {
        text: format!("May I deploy {name}?"),
        tool_name: "deploy".to_owned(),
        ..Question::default()
    };
    let answers = turn.ask([question]).await;
    if !matches!(&answers[0].value, Some(Value::Approval(approval)) if approval.approved) {
        return Err(Box::new(AgentError {
            reason: "NOT_APPROVED".to_owned(),
            message: "nothing was deployed".to_owned(),
        }));
    }
    let notes = Artifact {
        artifact_id: "notes".to_owned(),
        name: "notes.txt".to_owned(),
        mime_type: "text/plain".to_owned(),
        content: Some(artifact::Content::Text(format!("Release {version}"))),
        last: true,
        ..Artifact::default()
    };
    turn.artifact(notes).await;
    turn.custom("deployed", &format!("{{\"build\":{build}}}"))
        .await;
    turn.set_result(&format!("{{\"build\":{build}}}")).await;
    turn.say(&format!("Deployed {name}.")).await;
    Ok(())
}

/// Says what the earlier turns of the session said.
async fn recall(turn: &Turn) -> AgentResult {
    for part in turn
        .history()
        .await
        .iter()
        .flat_map(|message| &message.parts)
    {
        if let Some(part::Part::Text(text)) = &part.part {
            turn.say(&format!("{text}|")).await;
        }
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let agent = variable("RUNLANE_AGENT", "default");
    println!("worker for {agent}: {SLOTS} slots");
    let worker = Worker::new()
        .servers([variable("RUNLANE_SERVER", DEFAULT_SERVER)])
        .token(&variable("RUNLANE_TOKEN", ""))
        .agent(&agent, answer)
        .slots(SLOTS);
    match worker.run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn variable(name: &str, default: &str) -> String {
    let value = env::var(name).ok().filter(|value| !value.is_empty());
    value.unwrap_or(default.to_owned())
}
