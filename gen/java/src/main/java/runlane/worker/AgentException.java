package runlane.worker;

/** Fails a run with a reason of the agent's own, such as MODEL_UNAVAILABLE. */
public class AgentException extends Exception {
  private static final long serialVersionUID = 1L;

  private final String reason;

  /** Fails a run with a reason and a message for people. */
  public AgentException(String reason, String message) {
    super(message);
    this.reason = reason;
  }

  /** The stable code. */
  public String reason() {
    return reason;
  }
}
