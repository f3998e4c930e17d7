package runlane.worker;

import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.HexFormat;
import java.util.List;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import runlane.v1.Input.InputAnswer;
import runlane.v1.RunOuterClass.Artifact;
import runlane.v1.RunOuterClass.RunEvent;
import runlane.v1.RunOuterClass.ToolCall;
import runlane.v1.RunOuterClass.ToolResult;
import runlane.v1.SessionOuterClass.Message;
import runlane.worker.v1.WorkerServiceOuterClass.Event;
import runlane.worker.v1.WorkerServiceOuterClass.Question;
import runlane.worker.v1.WorkerServiceOuterClass.WorkRequest;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.FoldedPrompt;

/**
 * The input of an agent, and what it may do. After a cancel all methods throw InterruptedException. They
 * may be called from several threads.
 */
public final class Turn {
  private final WorkResponse.Turn given;
  private final Attempt attempt;

  Turn(WorkResponse.Turn given, Attempt attempt) {
    this.given = given;
    this.attempt = attempt;
  }

  /** The prompt to answer. */
  public String prompt() {
    return given.getPrompt();
  }

  /** All of the turn: session, run, attempt, attachments, labels, deadline. */
  public WorkResponse.Turn given() {
    return given;
  }

  /** Emits a piece of the answer. It waits while too much of the output is not durable. */
  public void say(String text) throws InterruptedException {
    for (String piece : Attempt.pieces(text)) {
      emit(Event.newBuilder().setTextDelta(piece).build());
    }
  }

  /** Emits a piece of the model's reasoning. */
  public void think(String text) throws InterruptedException {
    for (String piece : Attempt.pieces(text)) {
      emit(Event.newBuilder().setReasoningDelta(piece).build());
    }
  }

  /** Reports that the agent calls a tool, which it executes itself. */
  public void callTool(ToolCall call) throws InterruptedException {
    emit(Event.newBuilder().setToolCall(call).build());
  }

  /** Reports what a tool returned. */
  public void toolReturned(ToolResult result) throws InterruptedException {
    emit(Event.newBuilder().setToolResult(result).build());
  }

  /** Emits an artifact, or a piece of one. */
  public void artifact(Artifact artifact) throws InterruptedException {
    emit(Event.newBuilder().setArtifact(artifact).build());
  }

  /** Emits an event of a type that the agent defines, with a JSON value. */
  public void custom(String type, String json) throws InterruptedException {
    var custom = RunEvent.Custom.newBuilder().setType(type).setJson(json);
    emit(Event.newBuilder().setCustom(custom).build());
  }

  /** Emits an event of any kind. */
  public void emit(Event event) throws InterruptedException {
    attempt.emit(event);
  }

  /** Sets the structured result of the run, a JSON value. */
  public void setResult(String json) {
    attempt.report(end -> end.setResultJson(json));
  }

  /** Sets facts about the turn: usage, model, finish reason. */
  public void report(java.util.function.Consumer<WorkRequest.Finish.Builder> facts) {
    attempt.report(facts);
  }

  /** Takes the prompts that wait to join the turn. Call it between two steps: answer them too (W9). */
  public List<FoldedPrompt> takeFolded() throws InterruptedException {
    return attempt.takeFolded();
  }

  /** The transcript before the turn; a long message comes in several parts with the same id. */
  @SuppressWarnings("unchecked")
  public List<Message> history() throws InterruptedException {
    var get = WorkRequest.GetHistory.getDefaultInstance();
    return (List<Message>) attempt.ask("history", WorkRequest.newBuilder().setGetHistory(get));
  }

  /**
   * Does a piece of work once per run, also if an attempt is repeated: returns the result that an earlier
   * attempt has stored, or calls {@code work} and makes its result, a JSON value, durable (W12). A key has
   * 1 to 128 bytes.
   */
  public String step(String name, Callable<String> work) throws Exception {
    String key = sent(name);
    var find = WorkRequest.FindStep.newBuilder().setKey(key);
    var found =
        (WorkResponse.Step) attempt.ask("step " + key, WorkRequest.newBuilder().setFindStep(find));
    if (found.hasResult()) {
      return found.getResult();
    }
    String result = work.call();
    var step = RunEvent.Step.newBuilder().setKey(key).setResult(result);
    attempt.keep(Event.newBuilder().setStep(step).build());
    return result;
  }

  /**
   * Asks people; the answers come in the order of the questions. If there is no answer yet it throws
   * InterruptedException: the run leaves this worker, and starts again, with any worker, once all is
   * answered (W13). What the agent does before happens again, so put what must not be repeated into steps.
   * Without a key, the question itself is the key: the same key gets the same answer, and nobody is asked
   * twice.
   */
  @SuppressWarnings("unchecked")
  public List<InputAnswer> ask(Question... questions) throws InterruptedException {
    var asked = new ArrayList<Question>();
    for (Question question : questions) {
      asked.add(keyed(question));
    }
    String name = asked.stream().map(Question::getKey).collect(Collectors.joining("\n"));
    var ask = WorkRequest.Ask.newBuilder().addAllQuestions(asked);
    return (List<InputAnswer>) attempt.ask("ask " + name, WorkRequest.newBuilder().setAsk(ask));
  }

  /** A text as it is sent: a lone half of a character becomes "?". The server answers with that. */
  private static String sent(String text) {
    return new String(text.getBytes(StandardCharsets.UTF_8), StandardCharsets.UTF_8);
  }

  /** The same key in each attempt that asks the same; equal questions are counted. */
  private Question keyed(Question question) {
    if (!question.getKey().isEmpty()) {
      return question.toBuilder().setKey(sent(question.getKey())).build();
    }
    var shown = new ArrayList<>(question.getChoicesList());
    shown.addAll(
        List.of(
            question.getText(),
            question.getToolName(),
            question.getArgumentsJson(),
            question.getSchemaJson()));
    try {
      byte[] content = String.join("\0", shown).getBytes(StandardCharsets.UTF_8);
      byte[] digest = MessageDigest.getInstance("SHA-256").digest(content);
      String hash = HexFormat.of().formatHex(digest, 0, 12);
      return question.toBuilder().setKey(hash + "-" + attempt.countAsked(hash)).build();
    } catch (NoSuchAlgorithmException e) {
      throw new IllegalStateException(e); // every Java has it
    }
  }
}
