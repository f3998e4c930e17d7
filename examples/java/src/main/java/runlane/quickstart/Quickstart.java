package runlane.quickstart;

import static java.nio.charset.StandardCharsets.UTF_8;
import static java.util.concurrent.TimeUnit.SECONDS;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.io.FileDescriptor;
import java.io.FileOutputStream;
import java.io.PrintStream;
import java.util.Locale;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CountDownLatch;
import runlane.v1.RunOuterClass.RunComplete;
import runlane.v1.RunOuterClass.RunEvent;
import runlane.v1.RunOuterClass.RunState;
import runlane.v1.RunServiceGrpc;
import runlane.v1.RunServiceGrpc.RunServiceBlockingStub;
import runlane.v1.RunServiceOuterClass.CancelRequest;
import runlane.v1.RunServiceOuterClass.RunAcceptedRequest;
import runlane.v1.RunServiceOuterClass.SubscribeRunRequest;

/** Runs a prompt in a session and prints the answer as it arrives. Ctrl-C cancels the run. */
public final class Quickstart {
  /** Unlike System.out, UTF-8 in every locale. */
  private static final PrintStream OUT =
      new PrintStream(new FileOutputStream(FileDescriptor.out), true, UTF_8);

  private static final String LOOPBACK = "(localhost|127(\\.\\d+){3}|\\[::1]):\\d+";

  private final RunServiceBlockingStub runs = connect();

  /** The id of the run; empty if the run was not accepted. */
  private final CompletableFuture<String> accepted = new CompletableFuture<>();

  private final CountDownLatch ended = new CountDownLatch(1);

  public static void main(String[] args) {
    try {
      if (args.length != 2) {
        throw new IllegalArgumentException("usage: quickstart SESSION PROMPT");
      }
      System.exit(new Quickstart().run(args[0], args[1]));
    } catch (IllegalArgumentException | StatusRuntimeException e) {
      System.err.println(e.getMessage());
      System.exit(1);
    }
  }

  private static RunServiceBlockingStub connect() {
    String server = System.getenv().getOrDefault("RUNLANE_SERVER", "127.0.0.1:50051");
    String token = System.getenv().getOrDefault("RUNLANE_TOKEN", "");
    var headers = new Metadata();
    if (!token.isEmpty()) {
      if (!server.matches(LOOPBACK)) {
        throw new IllegalArgumentException(
            "RUNLANE_TOKEN is not sent to " + server + ": the connection is not encrypted");
      }
      headers.put(
          Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
    }
    var channel = Grpc.newChannelBuilder(server, InsecureChannelCredentials.create()).build();
    return RunServiceGrpc.newBlockingStub(channel)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
  }

  private int run(String sessionId, String prompt) {
    Runtime.getRuntime().addShutdownHook(new Thread(this::cancelUnlessEnded));
    try {
      var request = RunAcceptedRequest.newBuilder().setAllowMissing(true);
      request.setSessionId(sessionId).setPrompt(prompt);
      var run = runs.withDeadlineAfter(10, SECONDS).runAccepted(request.build()).getRun();
      accepted.complete(run.getRunId());
      RunComplete complete = follow(run.getRunId());
      String state = complete.getState().name().replace("RUN_STATE_", "").toLowerCase(Locale.ROOT);
      String error = complete.hasError() ? ": " + complete.getError().getMessage() : "";
      System.err.println(state + error);
      return complete.getState() == RunState.RUN_STATE_COMPLETED ? 0 : 1;
    } finally {
      accepted.complete("");
      ended.countDown();
    }
  }

  /** Prints the text of the run; returns its end. */
  private RunComplete follow(String runId) {
    var events = runs.subscribeRun(SubscribeRunRequest.newBuilder().setRunId(runId).build());
    while (true) {
      RunEvent event = events.next().getEvent();
      OUT.print(event.getTextDelta().getText());
      if (event.hasRunComplete()) {
        OUT.println();
        return event.getRunComplete();
      }
    }
  }

  /** The JVM calls this on Ctrl-C, and at every other exit. */
  private void cancelUnlessEnded() {
    String runId = accepted.join();
    if (runId.isEmpty() || ended.getCount() == 0) {
      return;
    }
    try {
      var request = CancelRequest.newBuilder().setRunId(runId).build();
      runs.withDeadlineAfter(10, SECONDS).cancel(request);
      // The JVM halts when this method returns: the main thread prints the end of the run first.
      ended.await(10, SECONDS);
    } catch (StatusRuntimeException | InterruptedException e) {
      System.err.println(e.getMessage());
    }
  }
}
