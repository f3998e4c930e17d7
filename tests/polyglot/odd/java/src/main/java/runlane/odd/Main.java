package runlane.odd;

import java.util.Map;
import runlane.worker.AgentException;
import runlane.worker.Turn;
import runlane.worker.Worker;

/** Agents that go wrong (test_odd_workers.py). */
public final class Main {
  private static final class Wordless extends RuntimeException {
    private static final long serialVersionUID = 1L;

    @Override
    public String toString() {
      throw new IllegalStateException("it has none");
    }
  }

  private Main() {}

  private static void answer(Turn turn) throws Exception {
    switch (turn.prompt()) {
      case "wordless" -> throw new Wordless();
      case "no text" -> throw new AgentException("NO_MODEL", null);
      case "early" -> {
        System.out.println("let go");
        Thread.sleep(Long.MAX_VALUE);
      }
      case "half" -> {
        turn.step("mail \ud800", () -> "\"half\"");
        turn.say("ok");
      }
      default -> turn.say("ok");
    }
  }

  /** Executes runs. */
  public static void main(String[] args) throws Exception {
    System.out.println("worker for default: 1 slot");
    new Worker(Map.of("default", Main::answer)).servers(System.getenv("RUNLANE_SERVER")).slots(1).runUntilSignal();
  }
}
