package runlane.example;

import static java.util.concurrent.TimeUnit.SECONDS;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.util.ArrayList;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.StringTokenizer;
import runlane.worker.v1.WorkerServiceGrpc;

/**
 * A worker: executes runs of the agent {@code default}, or of the one that RUNLANE_AGENT names, until
 * SIGTERM. The page docs/workers.md lists its duties; their numbers stand in the comments.
 */
public final class Worker {
  private static final int SLOTS = 4;
  private static final int MAX_MESSAGE = (4 << 20) + (64 << 10);
  private static final String LOOPBACK = "(localhost|127(\\.\\d+){3}|\\[::1]):\\d+";
  private static final Map<String, String> ENV = System.getenv();

  private Worker() {}

  /** The agent: says the prompt in capitals, a word at a time, then the prompts that joined. */
  static void answer(Attempt attempt) throws InterruptedException {
    List<String> prompts = List.of(attempt.prompt());
    while (!prompts.isEmpty()) {
      var words = new StringTokenizer(String.join(" ", prompts));
      while (words.hasMoreTokens()) {
        attempt.say(words.nextToken().toUpperCase(Locale.ROOT) + " ");
        Thread.sleep(20);
      }
      prompts = attempt.takeFolded(); // W9
    }
  }

  public static void main(String[] args) {
    String server = ENV.getOrDefault("RUNLANE_SERVER", "127.0.0.1:50051");
    String token = ENV.getOrDefault("RUNLANE_TOKEN", "");
    String agent = ENV.getOrDefault("RUNLANE_AGENT", "default");
    if (!token.isEmpty() && !server.matches(LOOPBACK)) {
      System.err.println(
          "RUNLANE_TOKEN is not sent to " + server + ": the connection is not encrypted");
      System.exit(1);
    }
    var headers = new Metadata();
    if (!token.isEmpty()) {
      headers.put(
          Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
    }
    ManagedChannel channel =
        Grpc.newChannelBuilder(server, InsecureChannelCredentials.create())
            .maxInboundMessageSize(MAX_MESSAGE)
            .keepAliveTime(10, SECONDS)
            .keepAliveTimeout(5, SECONDS)
            .build();
    var stub =
        WorkerServiceGrpc.newStub(channel)
            .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
    var slots = new ArrayList<Slot>();
    var threads = new ArrayList<Thread>();
    for (int n = 0; n < SLOTS; n++) {
      var slot = new Slot(channel, stub, agent);
      slots.add(slot);
      threads.add(new Thread(() -> serve(slot)));
    }
    Runtime.getRuntime().addShutdownHook(new Thread(() -> stop(slots, threads)));
    threads.forEach(Thread::start);
    System.out.printf("worker for %s: %d slots%n", agent, SLOTS);
  }

  private static void serve(Slot slot) {
    try {
      slot.serve();
    } catch (StatusRuntimeException e) {
      System.err.println(e.getMessage());
      // Without the shutdown hook: the other slots are refused, too.
      Runtime.getRuntime().halt(1);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }

  /** The JVM calls this on SIGTERM and Ctrl-C. */
  private static void stop(List<Slot> slots, List<Thread> threads) {
    try {
      for (Slot slot : slots) {
        slot.stop();
      }
      for (Thread thread : threads) {
        thread.join();
      }
      // The exit code of the JVM after a signal is not 0.
      Runtime.getRuntime().halt(0);
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    }
  }
}
