package runlane.worker;

/** Answers turns. */
@FunctionalInterface
public interface Agent {
  /**
   * Answers a turn, in a thread of its own. The thread is interrupted when the run is cancelled or taken
   * away; the agent then returns or throws. Otherwise an exception fails the run.
   */
  void answer(Turn turn) throws Exception;
}
