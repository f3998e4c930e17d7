package runlane.worker;

import static java.util.concurrent.TimeUnit.SECONDS;

import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.MetadataUtils;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import runlane.worker.v1.WorkerServiceGrpc;
import runlane.worker.v1.WorkerServiceGrpc.WorkerServiceStub;

/**
 * Executes runs of the agents that a server declares as {@code worker}, in this process. It does what the
 * page docs/workers.md asks of a worker; the numbers W1 to W14 stand in the comments.
 *
 * <pre>{@code
 * new Worker(Map.of("default", turn -> turn.say(turn.prompt().toUpperCase()))).slots(8).run();
 * }</pre>
 */
public final class Worker {
  /** Where a server listens by default. */
  public static final String DEFAULT_SERVER = "127.0.0.1:50051";

  private static final int MAX_MESSAGE = (4 << 20) + (64 << 10);
  private static final String LOOPBACK = "(localhost|127(\\.\\d+){3}|\\[::1]):\\d+";
  private static final Duration HAND_BACK_TIMEOUT = Duration.ofSeconds(5);

  private final Map<String, Agent> agents;
  private List<String> servers = List.of(DEFAULT_SERVER);
  private int slots = 1;
  private String token = "";
  private ChannelCredentials credentials;
  private Duration drain = Duration.ZERO;
  private String name = "java:" + ProcessHandle.current().pid();

  private final CountDownLatch stopping = new CountDownLatch(1);
  private volatile StatusRuntimeException refused;

  /** Executes runs of these agents; {@code default} is the agent of a server with one. */
  public Worker(Map<String, Agent> agents) {
    this.agents = Map.copyOf(agents);
  }

  /** Sets the addresses of one or more nodes of the same store. */
  public Worker servers(String... addresses) {
    servers = List.of(addresses);
    return this;
  }

  /** Sets the number of runs that are executed at a time; the default is 1. */
  public Worker slots(int count) {
    slots = count;
    return this;
  }

  /** Sets the token, which needs the role work. It is sent to another machine only over TLS. */
  public Worker token(String secret) {
    token = secret;
    return this;
  }

  /** Sets credentials for TLS; the default is plaintext. */
  public Worker credentials(ChannelCredentials tls) {
    credentials = tls;
    return this;
  }

  /** Sets how long active runs may continue after {@code stop} before they are given back. */
  public Worker drain(Duration time) {
    drain = time;
    return this;
  }

  /** Sets the name of the worker in the logs of the server. */
  public Worker name(String shown) {
    name = shown;
    return this;
  }

  /** Makes {@code run} return, after the active runs or {@code drain}. From any thread. */
  public void stop() {
    stopping.countDown();
  }

  /**
   * Executes runs until {@code stop}. Throws StatusRuntimeException if the server refuses the worker, for
   * example because it does not declare an agent.
   */
  public void run() throws InterruptedException {
    checkToken();
    var channels = new ArrayList<ManagedChannel>();
    servers.forEach(server -> channels.add(channel(server)));
    var serving = new ArrayList<Slot>();
    var ended = new CountDownLatch(slots);
    for (int n = 0; n < slots; n++) {
      var nodes = new ArrayList<>(channels);
      Collections.rotate(nodes, -(n % nodes.size()));
      var slot = new Slot(nodes, agents, this);
      serving.add(slot);
      var thread = new Thread(() -> serve(slot, ended), "runlane slot " + n);
      thread.setDaemon(true);
      thread.start();
    }
    stopping.await();
    serving.forEach(Slot::stop);
    if (!ended.await(drain.toMillis(), TimeUnit.MILLISECONDS)) {
      serving.forEach(Slot::handBack);
      ended.await(HAND_BACK_TIMEOUT.toMillis(), TimeUnit.MILLISECONDS);
    }
    channels.forEach(ManagedChannel::shutdownNow);
    if (refused != null) {
      throw refused;
    }
  }

  /** Runs until SIGTERM or Ctrl-C, and ends the process: with 1 if the server refuses the worker. */
  public void runUntilSignal() throws InterruptedException {
    var done = new CountDownLatch(1);
    var hook =
        new Thread(
            () -> {
              stop();
              try {
                done.await();
              } catch (InterruptedException e) {
                Thread.currentThread().interrupt();
              }
              // The exit code of the JVM after a signal is not 0.
              Runtime.getRuntime().halt(refused == null ? 0 : 1);
            });
    Runtime.getRuntime().addShutdownHook(hook);
    try {
      run();
    } catch (StatusRuntimeException | IllegalArgumentException e) {
      System.err.println(e.getMessage());
      Runtime.getRuntime().halt(1);
    } finally {
      done.countDown();
    }
  }

  private void serve(Slot slot, CountDownLatch ended) {
    try {
      slot.serve();
    } catch (StatusRuntimeException e) {
      refused = e;
      stop();
    } catch (InterruptedException e) {
      Thread.currentThread().interrupt();
    } finally {
      ended.countDown();
    }
  }

  private void checkToken() {
    for (String server : servers) {
      if (!token.isEmpty() && credentials == null && !server.matches(LOOPBACK)) {
        throw new IllegalArgumentException(
            "token: is not sent to "
                + server
                + ": the connection is not encrypted; set credentials");
      }
    }
  }

  private ManagedChannel channel(String server) {
    return Grpc.newChannelBuilder(
            server, credentials == null ? InsecureChannelCredentials.create() : credentials)
        .maxInboundMessageSize(MAX_MESSAGE) // W1
        .keepAliveTime(10, SECONDS)
        .keepAliveTimeout(5, SECONDS)
        .build();
  }

  WorkerServiceStub stub(ManagedChannel channel) {
    var headers = new Metadata();
    if (!token.isEmpty()) {
      headers.put(
          Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
    }
    return WorkerServiceGrpc.newStub(channel)
        .withInterceptors(MetadataUtils.newAttachHeadersInterceptor(headers));
  }

  String name() {
    return name;
  }
}
