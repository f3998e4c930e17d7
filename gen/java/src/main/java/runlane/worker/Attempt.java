package runlane.worker;

import java.util.ArrayList;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.function.Consumer;
import java.util.stream.Collectors;
import runlane.v1.Input.InputAnswer;
import runlane.v1.SessionOuterClass.Message;
import runlane.worker.v1.WorkerServiceOuterClass.Event;
import runlane.worker.v1.WorkerServiceOuterClass.WorkRequest;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.Answer;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.Folded;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.FoldedPrompt;

/** A turn in hand. It outlives the connection. The lock of its slot guards it. */
final class Attempt {
  /** Characters in an event. */
  private static final int MAX_TEXT = 4096;

  private static final int MAX_EVENTS = 1000;

  /** Bytes in an emit, unless a single event is larger. */
  private static final int MAX_EMIT_BYTES = 1 << 20;

  private static final int MAX_ERROR = 2048;

  private static final class Request {
    final WorkRequest.Builder message;
    boolean isSent;
    boolean isDone;
    Object answer;

    Request(WorkRequest.Builder message) {
      this.message = message;
    }
  }

  private final WorkResponse.Turn turn;
  private final Slot slot;
  private final Thread thread;

  private boolean isStopped;

  /** Whether the server has confirmed the end, or has taken the attempt away. */
  private boolean isOver;

  private boolean isReturned;

  /** Whether the server knows the attempt on this connection. */
  private boolean isSynced = true;

  private boolean isBegun;

  /** Not acknowledged (W4). */
  private final List<Event> waiting = new ArrayList<>();

  private long acked;

  /** On this connection. */
  private long sent;

  /** The last event that must stay as it is (W3). */
  private long everSent;

  private int urgent;
  private final Map<String, Request> requests = new LinkedHashMap<>();
  private final Map<String, Integer> asked = new HashMap<>();
  private long foldNumber;
  private final List<FoldedPrompt> folded = new ArrayList<>();
  private final List<String> foldedRunIds = new ArrayList<>();
  private final List<Message> history = new ArrayList<>();
  private final WorkRequest.Finish.Builder finish = WorkRequest.Finish.newBuilder();
  private WorkRequest.Builder end;
  private boolean isEndSent;

  Attempt(WorkResponse.Turn turn, Agent agent, Slot slot) {
    this.turn = turn;
    this.slot = slot;
    thread = new Thread(() -> execute(agent), "run " + turn.getRunId());
    thread.setDaemon(true);
    thread.start();
  }

  // --- The agent, in a thread of its own

  private void execute(Agent agent) {
    Throwable failure = null;
    try {
      agent.answer(new Turn(turn, this));
    } catch (Throwable e) { // it fails the run, not the worker
      failure = e;
    }
    synchronized (slot) {
      if (end == null) {
        end = failure == null || isStopped ? finished() : failed(failure); // W6
      }
      isReturned = true;
      slot.changed();
    }
  }

  private WorkRequest.Builder finished() {
    return WorkRequest.newBuilder().setFinish(finish.setNumber(last()));
  }

  private WorkRequest.Builder failed(Throwable failure) {
    var fail = WorkRequest.Fail.newBuilder().setNumber(last()).setModel(finish.getModel());
    if (finish.hasUsage()) {
      fail.setUsage(finish.getUsage());
    }
    if (failure instanceof AgentException own && own.reason() != null) {
      fail.setReason(own.reason());
    }
    String message = describe(failure);
    fail.setMessage(message.substring(0, Math.min(message.length(), MAX_ERROR)));
    return WorkRequest.newBuilder().setFail(fail);
  }

  /** A text for any failure: messages may be missing, and the code that makes them may fail. */
  private static String describe(Throwable failure) {
    String message = null;
    try {
      if (failure instanceof AgentException own) {
        message = own.getMessage() != null ? own.getMessage() : own.reason();
      }
      if (message == null) {
        message = failure.toString();
      }
    } catch (Throwable e) { // it must not keep the turn from its end
      message = null;
    }
    return message != null ? message : failure.getClass().getName();
  }

  static List<String> pieces(String text) {
    var pieces = new ArrayList<String>();
    for (int start = 0; start < text.length(); ) {
      int stop = Math.min(start + MAX_TEXT, text.length());
      if (stop < text.length() && Character.isHighSurrogate(text.charAt(stop - 1))) {
        stop--;
      }
      pieces.add(text.substring(start, stop));
      start = stop;
    }
    return pieces;
  }

  void report(Consumer<WorkRequest.Finish.Builder> facts) {
    synchronized (slot) {
      facts.accept(finish);
    }
  }

  int countAsked(String hash) {
    synchronized (slot) {
      return asked.merge(hash, 1, Integer::sum);
    }
  }

  /** Adds an event, or joins a text with the last one that was not sent (W3); returns its number. */
  long emit(Event event) throws InterruptedException {
    synchronized (slot) {
      while (waiting.size() >= Math.max(1, turn.getWindow()) && !isStopped) {
        slot.wait(); // W4
      }
      checkStopped();
      int before = waiting.size() - 1;
      Event joined = before >= 0 && last() > everSent ? join(waiting.get(before), event) : null;
      if (joined == null) {
        waiting.add(event);
      } else {
        waiting.set(before, joined);
      }
      slot.changed();
      return last();
    }
  }

  private static Event join(Event first, Event second) {
    if (first.hasTextDelta() && second.hasTextDelta()) {
      String text = first.getTextDelta() + second.getTextDelta();
      return text.length() > MAX_TEXT ? null : Event.newBuilder().setTextDelta(text).build();
    }
    if (first.hasReasoningDelta() && second.hasReasoningDelta()) {
      String text = first.getReasoningDelta() + second.getReasoningDelta();
      return text.length() > MAX_TEXT ? null : Event.newBuilder().setReasoningDelta(text).build();
    }
    return null;
  }

  /** Emits an event, and waits until it is durable. */
  void keep(Event event) throws InterruptedException {
    synchronized (slot) {
      long number = emit(event);
      urgent++;
      slot.changed();
      try {
        while (acked < number && !isStopped) {
          slot.wait();
        }
      } finally {
        urgent--;
      }
      if (acked < number) {
        checkStopped();
      }
    }
  }

  /** Sends a message and waits for its answer. A request that is open is not sent twice. */
  Object ask(String name, WorkRequest.Builder message) throws InterruptedException {
    synchronized (slot) {
      Request request = requests.computeIfAbsent(name, key -> new Request(message));
      slot.changed();
      while (!request.isDone && !isStopped) {
        slot.wait();
      }
      if (!request.isDone) {
        checkStopped();
      }
      return request.answer;
    }
  }

  List<FoldedPrompt> takeFolded() throws InterruptedException {
    synchronized (slot) {
      foldNumber++;
      var take = WorkRequest.TakeFolded.newBuilder().setNumber(foldNumber);
      ask("folded", WorkRequest.newBuilder().setTakeFolded(take));
      var taken = List.copyOf(folded);
      folded.clear();
      return taken;
    }
  }

  private void checkStopped() throws InterruptedException {
    if (isStopped) {
      throw new InterruptedException("the turn was stopped");
    }
  }

  // --- The connection; the slot holds its lock

  boolean isOver() {
    return isOver;
  }

  boolean hasEnded() {
    return isOver && isReturned;
  }

  private long last() {
    return acked + waiting.size();
  }

  /** Stops the agent (W6). */
  void stop() {
    isStopped = true;
    requests.clear();
    if (!isReturned) {
      thread.interrupt();
    }
  }

  /** Stops the agent, and gives the turn back once it has returned (W10). */
  void handBack() {
    if (end == null) {
      end = WorkRequest.newBuilder().setHandBack(WorkRequest.HandBack.getDefaultInstance());
      waiting.subList((int) Math.max(0, sent - acked), waiting.size()).clear();
      stop();
    }
  }

  void disconnect() {
    isSynced = false;
  }

  void take(WorkResponse response) {
    switch (response.getMessageCase()) {
      case ACKED -> takeAcked(response.getAcked());
      case FOLDED -> takePrompts(response.getFolded());
      case HISTORY -> {
        history.addAll(response.getHistory().getMessagesList());
        if (response.getHistory().getLast()) {
          answer("history", List.copyOf(history));
          history.clear();
        }
      }
      case STEP -> answer("step " + response.getStep().getKey(), response.getStep());
      case ANSWERS -> {
        var answers = response.getAnswers().getAnswersList();
        String name = answers.stream().map(Answer::getKey).collect(Collectors.joining("\n"));
        List<InputAnswer> given = answers.stream().map(Answer::getAnswer).toList();
        answer("ask " + name, given);
      }
      case CANCEL -> stop();
      case FENCED, PARKED -> { // W7, W13
        isOver = true;
        stop();
      }
      default -> {}
    }
  }

  private void takePrompts(Folded sent) {
    for (FoldedPrompt one : sent.getPromptsList()) {
      folded.add(one);
      foldedRunIds.add(one.getRunId());
    }
    if (sent.getNumber() > 0) {
      answer("folded", null);
    }
  }

  private void answer(String name, Object answer) {
    Request request = requests.remove(name);
    if (request != null) {
      request.answer = answer;
      request.isDone = true;
    }
  }

  private void takeAcked(WorkResponse.Acked message) {
    if (message.getNumber() > acked) {
      waiting.subList(0, (int) Math.min(message.getNumber() - acked, waiting.size())).clear();
      acked = message.getNumber();
    }
    isOver |= message.getEnded();
    if (!isSynced) { // W8: continue after the last durable event
      isSynced = true;
      isBegun = true;
      sent = acked;
      isEndSent = false;
      history.clear();
      requests.values().forEach(request -> request.isSent = false);
    }
  }

  /** What to send now, or null. One emit at a time: what comes meanwhile is joined (W3). */
  WorkRequest.Builder next() {
    if (!isSynced || isOver) {
      return null;
    }
    if (!isBegun) {
      isBegun = true;
      return WorkRequest.newBuilder().setBegun(WorkRequest.Begun.getDefaultInstance()); // W2
    }
    var request = requests.values().stream().filter(one -> !one.isSent).findFirst();
    boolean isUrgent = end != null || urgent > 0 || request.isPresent();
    if (last() > sent && (isUrgent || sent == acked)) {
      return nextEmit();
    }
    if (request.isPresent()) {
      request.get().isSent = true;
      return request.get().message;
    }
    if (end == null || !isReturned || isEndSent) {
      return null;
    }
    isEndSent = true;
    return end; // W5
  }

  private WorkRequest.Builder nextEmit() {
    var emit = WorkRequest.Emit.newBuilder().setNumber(sent + 1);
    int size = 0;
    for (Event event : waiting.subList((int) (sent - acked), waiting.size())) {
      size += event.getSerializedSize();
      int count = emit.getEventsCount();
      if (count > 0 && (size > MAX_EMIT_BYTES || count == MAX_EVENTS)) {
        break;
      }
      emit.addEvents(event);
    }
    sent += emit.getEventsCount();
    everSent = Math.max(everSent, sent);
    return WorkRequest.newBuilder().setEmit(emit);
  }

  WorkRequest.Resume resume() {
    return WorkRequest.Resume.newBuilder()
        .setRunId(turn.getRunId())
        .setTenant(turn.getTenant())
        .setAttempt(turn.getAttempt())
        .setFence(turn.getFence())
        .setAcknowledged(acked)
        .addAllFoldedRunIds(foldedRunIds)
        .build();
  }
}
