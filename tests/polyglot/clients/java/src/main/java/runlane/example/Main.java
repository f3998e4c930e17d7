package runlane.example;

import static java.nio.charset.StandardCharsets.UTF_8;
import static java.nio.file.StandardCopyOption.ATOMIC_MOVE;
import static java.nio.file.StandardCopyOption.REPLACE_EXISTING;
import static java.nio.file.StandardOpenOption.CREATE;
import static java.nio.file.StandardOpenOption.DSYNC;
import static java.nio.file.StandardOpenOption.TRUNCATE_EXISTING;
import static java.nio.file.StandardOpenOption.WRITE;
import static java.util.concurrent.TimeUnit.MILLISECONDS;
import static java.util.concurrent.TimeUnit.NANOSECONDS;
import static java.util.concurrent.TimeUnit.SECONDS;

import com.google.protobuf.Any;
import com.google.protobuf.FieldMask;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Timestamp;
import com.google.rpc.BadRequest;
import com.google.rpc.BadRequest.FieldViolation;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Context;
import io.grpc.Deadline;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.MetadataUtils;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.IOException;
import java.io.PrintStream;
import java.io.UncheckedIOException;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.security.SecureRandom;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Iterator;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.Optional;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ScheduledFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.function.Consumer;
import java.util.function.Function;
import java.util.function.Predicate;
import java.util.function.Supplier;
import runlane.v1.Input.Approval;
import runlane.v1.Input.InputRequest;
import runlane.v1.RunOuterClass.CancelledRun;
import runlane.v1.RunOuterClass.Run;
import runlane.v1.RunOuterClass.RunComplete;
import runlane.v1.RunOuterClass.RunEvent;
import runlane.v1.RunOuterClass.RunState;
import runlane.v1.RunServiceGrpc;
import runlane.v1.RunServiceGrpc.RunServiceBlockingStub;
import runlane.v1.RunServiceOuterClass.AnswerInputRequest;
import runlane.v1.RunServiceOuterClass.AnswerInputResponse;
import runlane.v1.RunServiceOuterClass.CancelRequest;
import runlane.v1.RunServiceOuterClass.CancelResponse;
import runlane.v1.RunServiceOuterClass.GetRunRequest;
import runlane.v1.RunServiceOuterClass.GetRunResponse;
import runlane.v1.RunServiceOuterClass.RunAcceptedRequest;
import runlane.v1.RunServiceOuterClass.SubscribeRunCompleteRequest;
import runlane.v1.RunServiceOuterClass.SubscribeRunCompleteResponse;
import runlane.v1.RunServiceOuterClass.SubscribeRunRequest;
import runlane.v1.RunServiceOuterClass.SubscribeRunResponse;
import runlane.v1.RunServiceOuterClass.UpdateRunRequest;
import runlane.v1.SessionOuterClass.Session;
import runlane.v1.SessionServiceGrpc;
import runlane.v1.SessionServiceOuterClass.ForkSessionRequest;
import runlane.v1.SessionServiceOuterClass.SubscribeSessionRequest;
import runlane.v1.SessionServiceOuterClass.SubscribeSessionResponse;
import runlane.v1.SessionServiceOuterClass.SubscribeSessionResponse.Snapshot;

/**
 * A Runlane client in one file: runs prompts, edits and cancels runs, forks sessions, and watches
 * completions and sessions.
 *
 * <p>C1 to C17 are the rules of docs/clients.md; a comment marks the code that implements each one.
 */
public final class Main {
  private static final String USAGE =
      """
      usage:
        run SESSION PROMPT [--run-id ID] [--max-attempts N] [--answer TEXT]
        cancel SESSION [--run-id ID]
        watch [--cursor-file FILE] [--count N] [--silence SECONDS (45)]
        session SESSION [--cursor-file FILE] [--count N] [--silence SECONDS (45)]
        edit RUN PROMPT
        fork SESSION [NEW]
      options of all: --target HOST:PORT (127.0.0.1:50051), --timeout SECONDS (10)\
      """;

  /** UTF-8 in every locale, unlike System.out. */
  private static final PrintStream OUT =
      new PrintStream(new FileOutputStream(FileDescriptor.out), false, UTF_8);

  private static final PrintStream ERR =
      new PrintStream(new FileOutputStream(FileDescriptor.err), false, UTF_8);

  private Main() {}

  public static void main(String[] args) {
    // Threads of the channel may still run, so returning would not end the process.
    System.exit(perform(args));
  }

  /** Returns the exit code. After Ctrl-C the JVM sets it to 130. */
  private static int perform(String[] args) {
    try {
      Arguments arguments = Arguments.parse(args);
      try (Connection connection = new Connection(arguments.target(), arguments.timeout())) {
        return switch (arguments.verb()) {
          case "run" -> new Runner(connection, arguments).run();
          case "cancel" -> cancel(connection, arguments);
          case "session" -> new SessionReader(connection, arguments).read();
          case "edit" -> edit(connection, arguments);
          case "fork" -> fork(connection, arguments);
          default -> new Watcher(connection, arguments).watch();
        };
      }
    } catch (UsageException e) {
      log(e.getMessage());
      log(USAGE);
      return 2;
    } catch (Failure e) {
      return report(e);
    } catch (UncheckedIOException e) {
      log(e.getCause().toString());
      return 1;
    }
  }

  private static int cancel(Connection connection, Arguments arguments) {
    CancelRequest request =
        CancelRequest.newBuilder()
            .setSessionId(arguments.words().get(0))
            .setRunId(arguments.runId().orElse(""))
            .build();
    for (CancelledRun run : connection.cancel(request).getCancelledList()) {
      print(run.getRunId() + " " + shortName(run.getStateWhenCancelled(), "RUN_STATE_") + "\n");
    }
    return 0;
  }

  /** Replaces the prompt of a waiting run; prints the one before and the new revision. */
  private static int edit(Connection connection, Arguments arguments) {
    String runId = arguments.words().get(0);
    GetRunRequest which = GetRunRequest.newBuilder().setRunId(runId).setWithPrompt(true).build();
    GetRunResponse found = connection.call(stub -> stub.getRun(which), Failure::mayPass);
    UpdateRunRequest request =
        UpdateRunRequest.newBuilder()
            .setRunId(runId)
            .setPrompt(arguments.words().get(1))
            .setUpdateMask(FieldMask.newBuilder().addPaths("prompt"))
            // C16: not over the edit of another, and once however often it is sent.
            .setRevision(found.getRun().getRevision())
            .setUpdateId(newId())
            .build();
    Run run = connection.call(stub -> stub.updateRun(request), Failure::mayPass).getRun();
    print(found.getPrompt().getText() + "\n" + run.getRunId() + " " + run.getRevision() + "\n");
    return 0;
  }

  /** Copies a session up to its last finished turn; prints the new session and that turn. */
  private static int fork(Connection connection, Arguments arguments) {
    List<String> words = arguments.words();
    // C17: every attempt sends the same id, created before the first one.
    ForkSessionRequest request =
        ForkSessionRequest.newBuilder()
            .setSessionId(words.get(0))
            .setNewSessionId(words.size() > 1 ? words.get(1) : newId())
            .build();
    Session session =
        connection
            .call(
                stub ->
                    SessionServiceGrpc.newBlockingStub(stub.getChannel())
                        .withDeadline(stub.getCallOptions().getDeadline())
                        .forkSession(request),
                Failure::mayPass)
            .getSession();
    print(session.getSessionId() + " " + session.getOrigin().getTurn() + "\n");
    return 0;
  }

  // --- Run -------------------------------------------------------------------------------------

  /** Runs one prompt and follows it to its end. */
  private static final class Runner {
    private final Connection connection;
    private final RunAcceptedRequest request;
    private final Optional<String> answer;

    /** Released once the accept has succeeded or failed. */
    private final CountDownLatch settled = new CountDownLatch(1);

    private volatile boolean interrupted;
    private long lastIndex;
    private RunComplete complete;

    Runner(Connection connection, Arguments arguments) {
      this.connection = connection;
      answer = arguments.option("answer");
      request =
          RunAcceptedRequest.newBuilder()
              .setSessionId(arguments.words().get(0))
              .setPrompt(arguments.words().get(1))
              // C1: created before the first attempt; every attempt sends the same id.
              .setRunId(arguments.runId().orElseGet(Main::newId))
              .setMaxAttempts(arguments.number("max-attempts").orElse(0))
              .setAllowMissing(true)
              .build();
    }

    int run() {
      Thread hook = new Thread(this::cancelInterrupted);
      Runtime.getRuntime().addShutdownHook(hook);
      try {
        accept();
        log("accepted " + request.getRunId());
        follow();
        if (interrupted) {
          return 130;
        }
        print("\n");
        String reason = shortName(complete.getFinishReason(), "FINISH_REASON_");
        log(shortName(complete.getState(), "RUN_STATE_").toLowerCase(Locale.ROOT) + " " + reason);
        return complete.getState() == RunState.RUN_STATE_COMPLETED ? 0 : 1;
      } finally {
        withdraw(hook);
      }
    }

    private void accept() {
      try {
        // C3: the id (C1) makes a retry safe; no retry after an interrupt.
        connection.call(
            stub -> stub.runAccepted(request), failure -> failure.mayPass() && !interrupted);
      } finally {
        settled.countDown();
      }
    }

    /** C7: writes the text of the run as it arrives, each piece once. */
    private void follow() {
      try {
        connection.resumed(this::subscribe, this::deal, Main::reconnecting, Optional.empty());
      } catch (Failure failure) {
        if (!failure.reason.equals("CURSOR_COMPACTED")) {
          throw failure;
        }
        readRemoved();
      }
    }

    private Iterator<SubscribeRunResponse> subscribe(RunServiceBlockingStub stub) {
      return stub.subscribeRun(
          SubscribeRunRequest.newBuilder()
              .setRunId(request.getRunId())
              .setAfterIndex(lastIndex)
              .build());
    }

    /** Returns whether it was the last event. */
    private boolean deal(SubscribeRunResponse message) {
      RunEvent event = message.getEvent();
      if (event.getIndex() <= lastIndex) {
        return false;
      }
      lastIndex = event.getIndex();
      switch (event.getEventCase()) {
        case TEXT_DELTA -> print(event.getTextDelta().getText());
        case STARTED -> begin(event.getStarted().getAttempt());
        case INPUT_REQUESTED -> ask(event.getInputRequested().getInputRequest());
        case RUN_COMPLETE -> complete = event.getRunComplete();
        default -> {} // Not shown, or newer than this program.
      }
      return complete != null;
    }

    /** C8: a second attempt starts the answer over, because the node of the first was lost. */
    private void begin(int attempt) {
      if (attempt > 1) {
        log("attempt " + attempt);
      }
    }

    /** C14: shows a question, and answers it if there is an answer. */
    private void ask(InputRequest asked) {
      String id = asked.getInputRequestId();
      log("asked " + id + " " + asked.getText());
      if (answer.isEmpty()) {
        return;
      }
      AnswerInputRequest reply = reply(asked, answer.get());
      try {
        AnswerInputResponse receipt =
            connection.call(
                stub -> stub.answerInput(reply), failure -> failure.mayPass() && !interrupted);
        log((receipt.getAcceptedThisAnswer() ? "answered " : "answered before ") + id);
      } catch (Failure failure) {
        if (!failure.reason.equals("INPUT_CLOSED")) {
          throw failure;
        }
        log("closed " + id);
      }
    }

    private static AnswerInputRequest reply(InputRequest asked, String text) {
      AnswerInputRequest.Builder reply =
          AnswerInputRequest.newBuilder()
              .setInputRequestId(asked.getInputRequestId())
              // Every attempt sends the same id, created before the first one.
              .setAnswerId(newId())
              .setQuestionDigest(asked.getQuestionDigest());
      switch (asked.getKind()) {
        case INPUT_KIND_APPROVAL ->
            reply.setApproval(Approval.newBuilder().setApproved(text.equals("yes")));
        case INPUT_KIND_CHOICE -> reply.setChoice(text);
        case INPUT_KIND_FORM -> reply.setFormJson(text);
        default -> reply.setText(text);
      }
      return reply.build();
    }

    /** C12: the events are compacted, because the id was used long ago. */
    private void readRemoved() {
      GetRunRequest which = GetRunRequest.newBuilder().setRunId(request.getRunId()).build();
      Run run = connection.call(stub -> stub.getRun(which), Failure::mayPass).getRun();
      if (!run.hasRunComplete()) {
        throw new Failure(Status.DATA_LOSS.withDescription("the run has lost its events"));
      }
      complete = run.getRunComplete();
      if (lastIndex == 0) {
        print(complete.getText());
      }
    }

    /**
     * Cancels the run by its id, after the current accept has ended: a run that is accepted after
     * its own cancel would stay active.
     */
    private void cancelInterrupted() {
      interrupted = true;
      try {
        settled.await();
        connection.cancel(CancelRequest.newBuilder().setRunId(request.getRunId()).build());
      } catch (Failure failure) {
        // Then the run was never accepted: nothing to cancel.
        if (!failure.reason.equals("RUN_NOT_FOUND")) {
          report(failure);
        }
      } catch (InterruptedException e) {
        Thread.currentThread().interrupt();
      }
    }

    /** Removes the hook; if it is already running, waits for it. */
    private static void withdraw(Thread hook) {
      try {
        Runtime.getRuntime().removeShutdownHook(hook);
      } catch (IllegalStateException shuttingDown) {
        joined(hook);
      }
    }

    private static void joined(Thread thread) {
      try {
        thread.join();
      } catch (InterruptedException e) {
        Thread.currentThread().interrupt();
      }
    }
  }

  // --- Watch -----------------------------------------------------------------------------------

  /** Prints every completion. */
  private static final class Watcher {
    /** C10: how many completions are remembered. A repeated one soon follows the first. */
    private static final int REMEMBERED = 1024;

    private final Connection connection;
    private final Optional<Path> file;
    private final int count;

    /** C11: timeout of a stream without messages; a server sends a mark every 15 s. */
    private final Duration silence;

    private final Set<String> known = new LinkedHashSet<>();
    private String cursor;
    private boolean established;
    private int printed;

    Watcher(Connection connection, Arguments arguments) {
      this.connection = connection;
      file = arguments.option("cursor-file").map(Path::of);
      count = arguments.number("count").orElse(Integer.MAX_VALUE);
      silence = arguments.seconds("silence").orElse(Duration.ofSeconds(45));
      cursor = file.map(Watcher::readCursor).orElse("");
    }

    int watch() {
      connection.resumed(this::subscribe, this::deal, this::lost, Optional.of(silence));
      return 0;
    }

    private Iterator<SubscribeRunCompleteResponse> subscribe(RunServiceBlockingStub stub) {
      SubscribeRunCompleteRequest.Builder request = SubscribeRunCompleteRequest.newBuilder();
      if (!cursor.isEmpty()) {
        request.setCursor(cursor);
      }
      return stub.subscribeRunComplete(request.build());
    }

    /** Returns whether `--count` is reached. */
    private boolean deal(SubscribeRunCompleteResponse message) {
      if (!established) {
        log("watching");
      }
      established = true;
      if (message.hasRunComplete() && isNew(message.getRunComplete())) {
        printEnd(message.getRunComplete());
        printed++;
      }
      // C9: of progress marks too, and only after the event is processed.
      cursor = message.getCursor();
      file.ifPresent(path -> writeCursor(path, cursor));
      return printed == count;
    }

    private static void printEnd(RunComplete end) {
      String state = shortName(end.getState(), "RUN_STATE_");
      String reason = shortName(end.getFinishReason(), "FINISH_REASON_");
      print(end.getRunId() + " " + state + " " + reason + "\n");
    }

    /** C10: whether this completion is new. */
    private boolean isNew(RunComplete end) {
      // An id is free again once its session is deleted; the time distinguishes the two runs.
      Timestamp time = end.getEndedAt();
      String key = end.getRunId() + " " + time.getSeconds() + "." + time.getNanos();
      if (!known.add(key)) {
        return false;
      }
      if (known.size() > REMEMBERED) {
        // The set keeps insertion order: the first entry is the oldest.
        Iterator<String> oldest = known.iterator();
        oldest.next();
        oldest.remove();
      }
      return true;
    }

    /** C12: resumes from the cursor that the server names. */
    private void lost(Failure failure) {
      String oldest = failure.metadata.getOrDefault("oldest_cursor", "");
      if (failure.reason.equals("CURSOR_COMPACTED") && !oldest.isEmpty()) {
        log("events before " + oldest + " are gone");
        cursor = oldest;
        return;
      }
      reconnecting(failure);
      String next = failure.metadata.getOrDefault("cursor", "");
      if (failure.reason.equals("DRAINING") && !next.isEmpty()) {
        cursor = next;
      }
    }

    private static String readCursor(Path file) {
      try {
        return Files.readString(file).strip();
      } catch (NoSuchFileException e) {
        return "";
      } catch (IOException e) {
        throw new UncheckedIOException(e);
      }
    }

    /** Replaces the file atomically: a crash leaves the old cursor or the new one. */
    private static void writeCursor(Path path, String cursor) {
      Path fresh = path.resolveSibling(path.getFileName() + ".new");
      try {
        Files.writeString(fresh, cursor, CREATE, TRUNCATE_EXISTING, WRITE, DSYNC);
        Files.move(fresh, path, ATOMIC_MOVE, REPLACE_EXISTING);
      } catch (IOException e) {
        throw new UncheckedIOException(e);
      }
    }
  }

  // --- Session ---------------------------------------------------------------------------------

  /** C15: prints a session as it is, and what happens in it. */
  private static final class SessionReader {
    private final Connection connection;
    private final String sessionId;
    private final Optional<Path> file;
    private final int count;
    private final Duration silence;

    private Snapshot.Builder parts = Snapshot.newBuilder();
    private String cursor;
    private boolean established;
    private int printed;

    SessionReader(Connection connection, Arguments arguments) {
      this.connection = connection;
      sessionId = arguments.words().get(0);
      file = arguments.option("cursor-file").map(Path::of);
      count = arguments.number("count").orElse(Integer.MAX_VALUE);
      silence = arguments.seconds("silence").orElse(Duration.ofSeconds(45));
      cursor = file.map(Watcher::readCursor).orElse("");
    }

    int read() {
      connection.resumed(this::subscribe, this::deal, this::lost, Optional.of(silence));
      return 0;
    }

    private Iterator<SubscribeSessionResponse> subscribe(RunServiceBlockingStub stub) {
      // The parts of a snapshot whose rest was lost are void.
      parts = Snapshot.newBuilder();
      SubscribeSessionRequest.Builder request =
          SubscribeSessionRequest.newBuilder().addSessionIds(sessionId).setWithDeltas(true);
      if (!cursor.isEmpty()) {
        request.addCursors(cursor);
      }
      // The channel of the stub adds the token.
      return SessionServiceGrpc.newBlockingStub(stub.getChannel())
          .subscribeSession(request.build());
    }

    /** Returns whether `--count` is reached, or the session deleted. */
    private boolean deal(SubscribeSessionResponse message) {
      if (!established) {
        log("watching");
      }
      established = true;
      boolean deleted = false;
      switch (message.getEventCase()) {
        case SNAPSHOT -> join(message.getSnapshot());
        case RUN_EVENT -> print(message.getRunEvent().getRunId(), message.getRunEvent().getEvent());
        case SESSION_CHANGED -> deleted = !message.getSessionChanged().hasSession();
        default -> {} // Not shown, or newer than this program.
      }
      if (deleted) {
        Main.print("deleted\n");
      }
      // A mark, or a part of a snapshot, has no cursor.
      if (message.getCursor().isEmpty() && !deleted) {
        return false;
      }
      // Only after the event is processed.
      cursor = message.getCursor();
      file.ifPresent(path -> Watcher.writeCursor(path, cursor));
      return deleted || printed == count;
    }

    private void join(Snapshot part) {
      parts.mergeFrom(part); // Appends to the lists.
      if (part.getContinues()) {
        return;
      }
      String active = parts.hasActiveRun() ? parts.getActiveRun().getRunId() : "-";
      StringBuilder line = new StringBuilder("snapshot ").append(active);
      parts.getQueueList().forEach(waiting -> line.append(' ').append(waiting.getRunId()));
      Main.print(line.append('\n').toString());
      parts.getOutputList().forEach(event -> print(active, event));
    }

    private void print(String runId, RunEvent event) {
      if (event.hasTextDelta()) {
        Main.print(runId + " text " + event.getTextDelta().getText() + "\n");
      }
      if (event.hasRunComplete()) {
        Watcher.printEnd(event.getRunComplete());
        printed++;
      }
    }

    private void lost(Failure failure) {
      if (failure.reason.equals("CURSOR_COMPACTED") && !cursor.isEmpty()) {
        // A snapshot shows what the lost events have led to.
        log("events after " + cursor + " are gone");
        cursor = "";
        return;
      }
      reconnecting(failure);
    }
  }

  // --- The connection --------------------------------------------------------------------------

  /** A channel, with deadlines and retries for its calls. */
  private static final class Connection implements AutoCloseable {
    private final ManagedChannel channel;
    private final RunServiceBlockingStub stub;
    private final Duration timeout;

    Connection(String target, Duration timeout) {
      Metadata headers = new Metadata();
      String token = System.getenv("RUNLANE_TOKEN");
      if (token != null && !token.isEmpty()) {
        // C13: anyone who sees the token can use it.
        if (!isLocal(target)) {
          throw new UsageException("the token would go to " + target + " unencrypted");
        }
        headers.put(
            Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
      }
      this.timeout = timeout;
      channel = open(target);
      stub =
          RunServiceGrpc.newBlockingStub(channel)
              .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
    }

    private static ManagedChannel open(String target) {
      ManagedChannelBuilder<?> builder =
          Grpc.newChannelBuilder(target, InsecureChannelCredentials.create())
              // C11. Without calls too, or a server that takes a connection and then says nothing
              // would block the calls that wait for it.
              .keepAliveTime(20, SECONDS)
              .keepAliveTimeout(10, SECONDS)
              .keepAliveWithoutCalls(true)
              // C6: gRPC itself must not retry; `call` decides which calls may be retried.
              .disableServiceConfigLookUp();
      if (isLocal(target)) {
        // C13: a proxy from the environment may be on another machine.
        builder.proxyDetector(address -> null);
      }
      return builder.build();
    }

    /** Whether a target is certainly on this machine. Other names may resolve to any machine. */
    private static boolean isLocal(String target) {
      String host = target.replaceFirst(":\\d+$", "").toLowerCase(Locale.ROOT);
      return host.equals("localhost")
          || host.equals("[::1]")
          || host.matches("127(\\.\\d{1,3}){3}");
    }

    /** C6: a second cancel of a session could cover runs accepted after the first. */
    CancelResponse cancel(CancelRequest request) {
      boolean ofOne = !request.getRunId().isEmpty();
      return call(
          each -> each.cancel(request), ofOne ? Failure::mayPass : Failure::serverDidNothing);
    }

    /** C2, C3, C4: makes a call, and retries it if allowed, within one deadline. */
    <T> T call(Function<RunServiceBlockingStub, T> once, Predicate<Failure> mayRepeat) {
      Deadline deadline = Deadline.after(timeout.toNanos(), NANOSECONDS);
      Backoff backoff = new Backoff();
      while (true) {
        try {
          return once.apply(ready().withDeadline(deadline));
        } catch (StatusRuntimeException e) {
          Failure failure = new Failure(e);
          Duration pause = backoff.next(failure);
          if (!mayRepeat.test(failure) || deadline.timeRemaining(NANOSECONDS) <= pause.toNanos()) {
            throw failure;
          }
          sleep(pause);
        }
      }
    }

    /**
     * Reads a stream over as many calls as necessary, until `deal` is done.
     *
     * @param open starts a call after the messages received so far
     * @param lost is called for each lost call, and throws if the stream must not be reopened
     * @param silence timeout of a call without messages
     */
    <T> void resumed(
        Function<RunServiceBlockingStub, Iterator<T>> open,
        Predicate<T> deal,
        Consumer<Failure> lost,
        Optional<Duration> silence) {
      Backoff backoff = new Backoff();
      while (true) {
        Failure failure;
        try (Watchdog watchdog = new Watchdog(silence)) {
          Iterator<T> messages = watchdog.guard(() -> open.apply(ready()));
          Optional<Failure> broken = readAll(messages, deal, watchdog, backoff);
          if (broken.isEmpty()) {
            return;
          }
          failure = broken.get();
        }
        lost.accept(failure);
        sleep(backoff.next(failure));
      }
    }

    /** Returns why the call failed; empty if `deal` is done. */
    private static <T> Optional<Failure> readAll(
        Iterator<T> messages, Predicate<T> deal, Watchdog watchdog, Backoff backoff) {
      try {
        for (int count = 1; messages.hasNext(); count++) {
          watchdog.heard();
          // No busy loop if the server breaks every call after its first message.
          if (count > 1) {
            backoff.reset();
          }
          if (deal.test(messages.next())) {
            return Optional.empty();
          }
        }
        return Optional.of(
            new Failure(Status.UNAVAILABLE.withDescription("the server ended the stream")));
      } catch (StatusRuntimeException e) {
        return Optional.of(watchdog.hasBarked() ? Watchdog.silent() : new Failure(e));
      }
    }

    /** The default backoff grows to two minutes: a restarted server would seem down. */
    private RunServiceBlockingStub ready() {
      channel.resetConnectBackoff();
      return stub;
    }

    @Override
    public void close() {
      channel.shutdownNow();
    }
  }

  /** C11: cancels a call that is silent for too long. */
  private static final class Watchdog implements AutoCloseable {
    private static final ScheduledExecutorService TIMER =
        Executors.newSingleThreadScheduledExecutor(Watchdog::daemon);

    private final Context.CancellableContext context = Context.current().withCancellation();
    private final Optional<Duration> silence;
    private ScheduledFuture<?> bark;
    private volatile boolean barked;

    Watchdog(Optional<Duration> silence) {
      this.silence = silence;
      heard();
    }

    private static Thread daemon(Runnable task) {
      Thread thread = new Thread(task, "watchdog");
      thread.setDaemon(true);
      return thread;
    }

    /** Starts a call that ends with the context. */
    <T> Iterator<T> guard(Supplier<Iterator<T>> start) {
      Context before = context.attach();
      try {
        return start.get();
      } finally {
        context.detach(before);
      }
    }

    void heard() {
      if (bark != null) {
        bark.cancel(false);
      }
      silence.ifPresent(time -> bark = TIMER.schedule(this::end, time.toMillis(), MILLISECONDS));
    }

    private void end() {
      barked = true;
      context.cancel(null);
    }

    boolean hasBarked() {
      return barked;
    }

    static Failure silent() {
      return new Failure(Status.UNAVAILABLE.withDescription("no message for too long"));
    }

    @Override
    public void close() {
      if (bark != null) {
        bark.cancel(false);
      }
      context.cancel(null);
    }
  }

  /** C3: exponential backoff from 0.1 s to 2 s, with jitter. */
  private static final class Backoff {
    private static final Duration FIRST = Duration.ofMillis(100);
    private static final Duration LONGEST = Duration.ofSeconds(2);

    private Duration pause = FIRST;

    /** C4: never less than the server asks for. */
    Duration next(Failure failure) {
      long nanos = pause.toNanos();
      Duration own = Duration.ofNanos(ThreadLocalRandom.current().nextLong(nanos / 2, nanos));
      pause = min(pause.multipliedBy(2), LONGEST);
      return failure.retryAfter.filter(asked -> asked.compareTo(own) > 0).orElse(own);
    }

    void reset() {
      pause = FIRST;
    }

    private static Duration min(Duration one, Duration other) {
      return one.compareTo(other) < 0 ? one : other;
    }
  }

  /** Reports a transient failure; throws any other. */
  private static void reconnecting(Failure failure) {
    if (!failure.mayPass()) {
      throw failure;
    }
    log("reconnecting " + failure.word());
  }

  // --- Errors ----------------------------------------------------------------------------------

  /** C5: a failed call, with the error details from the server. */
  private static final class Failure extends RuntimeException {
    private static final long serialVersionUID = 1;

    /** Codes of a broken connection, if the error is not from a Runlane server. */
    private static final Set<Status.Code> BROKEN =
        Set.of(
            Status.Code.UNAVAILABLE,
            Status.Code.ABORTED,
            Status.Code.CANCELLED,
            Status.Code.INTERNAL,
            Status.Code.UNKNOWN);

    final Status.Code status;

    /** The reason of the ErrorInfo; empty if the error is not from a Runlane server. */
    String reason = "";

    /** The metadata of the ErrorInfo. */
    transient Map<String, String> metadata = Map.of();

    /** From RetryInfo. */
    transient Optional<Duration> retryAfter = Optional.empty();

    /** From BadRequest. */
    transient List<FieldViolation> fields = List.of();

    Failure(Status status) {
      super(message(status));
      this.status = status.getCode();
    }

    private static String message(Status status) {
      String description = Optional.ofNullable(status.getDescription()).orElse("no message");
      // For example `io exception`, followed by its cause.
      Throwable cause = status.getCause();
      return cause == null ? description : description + ": " + cause.getMessage();
    }

    Failure(StatusRuntimeException error) {
      this(error.getStatus());
      initCause(error);
      try {
        for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
          read(detail);
        }
      } catch (InvalidProtocolBufferException e) {
        // Unknown details: the status still applies.
        addSuppressed(e);
      }
    }

    private void read(Any detail) throws InvalidProtocolBufferException {
      if (detail.is(ErrorInfo.class)) {
        readInfo(detail.unpack(ErrorInfo.class));
      } else if (detail.is(RetryInfo.class)) {
        var delay = detail.unpack(RetryInfo.class).getRetryDelay();
        retryAfter = Optional.of(Duration.ofSeconds(delay.getSeconds(), delay.getNanos()));
      } else if (detail.is(BadRequest.class)) {
        fields = detail.unpack(BadRequest.class).getFieldViolationsList();
      }
    }

    private void readInfo(ErrorInfo info) {
      // Other domains define other reasons.
      if (info.getDomain().equals("runlane")) {
        reason = info.getReason();
        metadata = info.getMetadataMap();
      }
    }

    /** The reason, or the gRPC status if there is none. */
    String word() {
      return reason.isEmpty() ? status.name() : reason;
    }

    /** C3, C4, C5: whether a retry may succeed. The call may have taken effect already. */
    boolean mayPass() {
      if (status == Status.Code.RESOURCE_EXHAUSTED) {
        return retryAfter.isPresent();
      }
      return reason.isEmpty() ? BROKEN.contains(status) : status == Status.Code.UNAVAILABLE;
    }

    /** C6: whether the call certainly had no effect, and a retry may succeed. */
    boolean serverDidNothing() {
      return reason.equals("DRAINING") || (status == Status.Code.RESOURCE_EXHAUSTED && mayPass());
    }
  }

  /** Prints a failure on stderr; returns the exit code. */
  private static int report(Failure failure) {
    if (failure.status == Status.Code.UNAVAILABLE
        || failure.status == Status.Code.DEADLINE_EXCEEDED) {
      log(failure.status + ": " + failure.getMessage());
      return 4;
    }
    log(failure.word() + ": " + failure.getMessage());
    for (FieldViolation field : failure.fields) {
      log("  " + field.getField() + ": " + field.getDescription());
    }
    return 3;
  }

  // --- The command line ------------------------------------------------------------------------

  private static final class UsageException extends RuntimeException {
    private static final long serialVersionUID = 1;

    UsageException(String message) {
      super(message);
    }
  }

  /** A command, its words, and its options by name. */
  private record Arguments(String verb, List<String> words, Map<String, String> options) {
    private static final Map<String, Integer> WORDS =
        Map.of("run", 2, "cancel", 1, "watch", 0, "session", 1, "edit", 2, "fork", 2);
    private static final Map<String, Set<String>> OPTIONS =
        Map.of(
            "run", Set.of("target", "timeout", "run-id", "max-attempts", "answer"),
            "cancel", Set.of("target", "timeout", "run-id"),
            "watch", Set.of("target", "timeout", "cursor-file", "count", "silence"),
            "session", Set.of("target", "timeout", "cursor-file", "count", "silence"),
            "edit", Set.of("target", "timeout"),
            "fork", Set.of("target", "timeout"));

    static Arguments parse(String[] args) {
      List<String> words = new ArrayList<>();
      Map<String, String> options = new HashMap<>();
      Iterator<String> rest = Arrays.asList(args).iterator();
      while (rest.hasNext()) {
        String word = rest.next();
        if (word.equals("--")) {
          rest.forEachRemaining(words::add);
        } else if (word.startsWith("--")) {
          addOption(word, rest, options);
        } else {
          words.add(word);
        }
      }
      if (words.isEmpty() || !WORDS.containsKey(words.get(0))) {
        throw new UsageException(words.isEmpty() ? "a verb is missing" : "unknown: " + words);
      }
      Arguments arguments = new Arguments(words.remove(0), words, options);
      arguments.check();
      return arguments;
    }

    /** Takes `--name value` or `--name=value`. */
    private static void addOption(String word, Iterator<String> rest, Map<String, String> options) {
      String[] parts = word.split("=", 2);
      if (parts.length == 1 && !rest.hasNext()) {
        throw new UsageException(word + " has no value");
      }
      options.put(parts[0].substring(2), parts.length == 2 ? parts[1] : rest.next());
    }

    /** Checks everything first, so that invalid arguments have no effect. */
    private void check() {
      boolean lacksOptional = verb.equals("fork") && words.size() == 1;
      if (words.size() != WORDS.get(verb) && !lacksOptional) {
        throw new UsageException(verb + " takes " + WORDS.get(verb) + " words");
      }
      for (String name : options.keySet()) {
        if (!OPTIONS.get(verb).contains(name)) {
          throw new UsageException(verb + " has no option --" + name);
        }
      }
      // An empty run id would cancel the whole session.
      if (options.containsValue("")) {
        throw new UsageException("an option is empty");
      }
      seconds("timeout");
      seconds("silence");
      number("max-attempts");
      number("count");
    }

    Optional<String> option(String name) {
      return Optional.ofNullable(options.get(name));
    }

    Optional<String> runId() {
      return option("run-id");
    }

    /** A positive integer. */
    Optional<Integer> number(String name) {
      return option(name).map(value -> parseNumber(name, value));
    }

    private static int parseNumber(String name, String value) {
      try {
        int number = Integer.parseInt(value);
        if (number > 0) {
          return number;
        }
      } catch (NumberFormatException e) {
        // Reported below, like other invalid values.
      }
      throw new UsageException("--" + name + ": " + value + " is no number from 1");
    }

    String target() {
      return option("target").orElse("127.0.0.1:50051");
    }

    Duration timeout() {
      return seconds("timeout").orElse(Duration.ofSeconds(10));
    }

    Optional<Duration> seconds(String name) {
      return option(name).map(value -> parseSeconds(name, value));
    }

    private static Duration parseSeconds(String name, String value) {
      try {
        double seconds = Double.parseDouble(value);
        if (seconds > 0 && seconds < 1e9) {
          return Duration.ofNanos((long) (seconds * 1e9));
        }
      } catch (NumberFormatException e) {
        // Reported below, like other invalid values.
      }
      throw new UsageException("--" + name + ": " + value + " is no number of seconds");
    }
  }

  /** C1: a UUIDv7 (RFC 9562, section 5.7): ids sort by the millisecond they were made in. */
  private static String newId() {
    SecureRandom random = new SecureRandom();
    long high = System.currentTimeMillis() << 16 | 0x7000 | random.nextInt(0x1000);
    long low = random.nextLong() >>> 2 | 0x8000_0000_0000_0000L;
    return new UUID(high, low).toString();
  }

  // --- Output ----------------------------------------------------------------------------------

  /** Writes to stdout at once. A failed write is an error: the event is not processed (C9). */
  private static void print(String text) {
    OUT.print(text);
    if (OUT.checkError()) {
      throw new UncheckedIOException(new IOException("stdout takes nothing any more"));
    }
  }

  private static void log(String line) {
    ERR.print(line + "\n");
  }

  /** The name of an enum's value without its prefix. */
  private static String shortName(Enum<?> value, String prefix) {
    return value.name().replaceFirst("^" + prefix, "");
  }

  private static void sleep(Duration pause) {
    try {
      NANOSECONDS.sleep(pause.toNanos());
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
      throw new Failure(Status.CANCELLED.withDescription("interrupted").withCause(e));
    }
  }
}
