package runlane.example;

import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.StringTokenizer;
import runlane.v1.RunOuterClass.Artifact;
import runlane.worker.AgentException;
import runlane.worker.Turn;
import runlane.worker.Worker;
import runlane.worker.v1.WorkerServiceOuterClass.Question;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.FoldedPrompt;

/**
 * A worker: executes runs of the agent {@code default}, or of the one that RUNLANE_AGENT names, until
 * SIGTERM.
 */
public final class Main {
  private static final int SLOTS = 4;
  private static final Map<String, String> ENV = System.getenv();

  private Main() {}

  /** Says the prompt in capitals, a word at a time, then the prompts that joined the turn. */
  static void answer(Turn turn) throws Exception {
    if (turn.prompt().startsWith("release ")) {
      release(turn, turn.prompt().substring("release ".length()));
      return;
    }
    if (turn.prompt().equals("recall")) {
      recall(turn);
      return;
    }
    var prompts = List.of(turn.prompt());
    while (!prompts.isEmpty()) {
      var words = new StringTokenizer(String.join(" ", prompts));
      while (words.hasMoreTokens()) {
        turn.say(words.nextToken().toUpperCase(Locale.ROOT) + " ");
        Thread.sleep(20);
      }
      prompts = turn.takeFolded().stream().map(FoldedPrompt::getPrompt).toList();
    }
  }

  /** Builds once, also if it is called again, asks people, and deploys. */
  static void release(Turn turn, String version) throws Exception {
    String build =
        turn.step(
            "build",
            () -> {
              System.out.println("building " + version);
              return "\"app-" + version + "\"";
            });
    String name = build.replace("\"", "");
    var question = Question.newBuilder().setText("May I deploy " + name + "?").setToolName("deploy");
    if (!turn.ask(question.build()).get(0).getApproval().getApproved()) {
      throw new AgentException("NOT_APPROVED", "nothing was deployed");
    }
    turn.artifact(
        Artifact.newBuilder()
            .setArtifactId("notes")
            .setName("notes.txt")
            .setMimeType("text/plain")
            .setText("Release " + version)
            .setLast(true)
            .build());
    turn.custom("deployed", "{\"build\":" + build + "}");
    turn.setResult("{\"build\":" + build + "}");
    turn.say("Deployed " + name + ".");
  }

  /** Says what the earlier turns of the session said. */
  static void recall(Turn turn) throws InterruptedException {
    for (var message : turn.history()) {
      for (var part : message.getPartsList()) {
        turn.say(part.getText() + "|");
      }
    }
  }

  public static void main(String[] args) throws InterruptedException {
    String agent = ENV.getOrDefault("RUNLANE_AGENT", "default");
    System.out.printf("worker for %s: %d slots%n", agent, SLOTS);
    new Worker(Map.of(agent, Main::answer))
        .servers(ENV.getOrDefault("RUNLANE_SERVER", Worker.DEFAULT_SERVER))
        .token(ENV.getOrDefault("RUNLANE_TOKEN", ""))
        .slots(SLOTS)
        .runUntilSignal();
  }
}
