package runlane.example;

import java.util.ArrayList;
import java.util.List;
import runlane.worker.v1.WorkerServiceOuterClass.Event;
import runlane.worker.v1.WorkerServiceOuterClass.WorkRequest;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.Folded;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.FoldedPrompt;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse.Turn;

/** A turn in hand. It outlives the connection. The lock of its slot guards it. */
final class Attempt {
  /** Characters in an event. */
  private static final int MAX_TEXT = 4096;

  /** Events in an emit, which so stays below 2 MiB. */
  private static final int MAX_EVENTS = 100;

  private final Turn turn;
  private final Slot slot;
  private final Thread agent = new Thread(this::execute);

  /** Texts that are not acknowledged (W4). */
  private final List<String> waiting = new ArrayList<>();

  private long acked;

  /** On this connection. */
  private long sent;

  /** The last event that must stay as it is, because it was sent (W3). */
  private long everSent;

  private WorkRequest.Builder end;
  private boolean isEndSent;
  private long foldNumber;
  private boolean isFoldAsked;
  private boolean isFoldSent;
  private final List<String> folded = new ArrayList<>();
  private final List<String> foldedRunIds = new ArrayList<>();

  Attempt(Turn turn, Slot slot) {
    this.turn = turn;
    this.slot = slot;
    agent.setDaemon(true);
    agent.start();
  }

  // --- The agent, in a thread of its own

  private void execute() {
    String failure = "";
    try {
      Worker.answer(this);
    } catch (InterruptedException e) {
      // Stopped: a turn that was cancelled finishes.
    } catch (RuntimeException e) {
      failure = e.toString();
    }
    synchronized (slot) {
      isFoldAsked = false;
      end = WorkRequest.newBuilder(); // W5
      if (failure.isEmpty()) {
        end.setFinish(WorkRequest.Finish.newBuilder().setNumber(last()));
      } else {
        end.setFail(WorkRequest.Fail.newBuilder().setNumber(last()).setMessage(failure));
      }
    }
    slot.flush();
  }

  String prompt() {
    return turn.getPrompt();
  }

  void say(String text) throws InterruptedException {
    for (int start = 0; start < text.length(); ) {
      int stop = Math.min(start + MAX_TEXT, text.length());
      if (Character.isHighSurrogate(text.charAt(stop - 1))) {
        stop--;
      }
      synchronized (slot) {
        while (waiting.size() >= turn.getWindow()) {
          slot.wait(); // W4
        }
        add(text.substring(start, stop));
        slot.flush();
      }
      start = stop;
    }
  }

  /** Returns the prompts that wait to join the turn. */
  List<String> takeFolded() throws InterruptedException {
    synchronized (slot) {
      foldNumber++;
      isFoldAsked = true;
      isFoldSent = false;
      slot.flush();
      while (isFoldAsked) {
        slot.wait();
      }
      var taken = List.copyOf(folded);
      folded.clear();
      return taken;
    }
  }

  // --- The connection

  /** Stops the agent. */
  void stop() {
    agent.interrupt();
  }

  void join() throws InterruptedException {
    agent.join();
  }

  private long last() {
    return acked + waiting.size();
  }

  /** Adds a text, or joins it with the last one that was not sent (W3). */
  private void add(String text) {
    int before = waiting.size() - 1;
    boolean isNew = last() > everSent;
    if (isNew && before >= 0 && waiting.get(before).length() + text.length() <= MAX_TEXT) {
      waiting.set(before, waiting.get(before) + text);
    } else {
      waiting.add(text);
    }
  }

  void takeAcked(long number) {
    if (number > acked) {
      waiting.subList(0, (int) (number - acked)).clear();
      acked = number;
    }
    slot.notifyAll();
  }

  /** Continues on a new connection after the last durable event (W8). */
  void resync() {
    sent = acked;
    isEndSent = false;
    isFoldSent = false;
  }

  void takePrompts(Folded answer) {
    for (FoldedPrompt one : answer.getPromptsList()) {
      folded.add(one.getPrompt());
      foldedRunIds.add(one.getRunId());
    }
    if (answer.getNumber() == foldNumber) {
      isFoldAsked = false;
      slot.notifyAll();
    }
  }

  /** What to send now, or null: one emit at a time (W2, W3), then a question or the end. */
  WorkRequest.Builder next() {
    boolean isUrgent = end != null || isFoldAsked;
    if (last() > sent && (isUrgent || sent == acked)) {
      int first = (int) (sent - acked);
      var emit = WorkRequest.Emit.newBuilder().setNumber(sent + 1);
      for (String text : waiting.subList(first, Math.min(first + MAX_EVENTS, waiting.size()))) {
        emit.addEvents(Event.newBuilder().setTextDelta(text));
      }
      sent += emit.getEventsCount();
      everSent = Math.max(everSent, sent);
      return WorkRequest.newBuilder().setEmit(emit);
    }
    if (isFoldAsked && !isFoldSent) {
      isFoldSent = true;
      var question = WorkRequest.TakeFolded.newBuilder().setNumber(foldNumber);
      return WorkRequest.newBuilder().setTakeFolded(question);
    }
    if (end == null || isEndSent) {
      return null;
    }
    isEndSent = true;
    return end;
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
