package runlane.testing;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import java.io.BufferedReader;
import java.io.File;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;

/**
 * A Runlane server for a test.
 *
 * <pre>{@code
 * try (var server = RunlaneServer.start()) {
 *   var runs = RunServiceGrpc.newBlockingStub(server.channel());
 * }
 * }</pre>
 *
 * <p>The server is the command {@code runlane-server} on the PATH, or the one that the environment
 * variable {@code RUNLANE_SERVER_COMMAND} names.
 */
public final class RunlaneServer implements AutoCloseable {
  private static final long START_SECONDS = 30;
  private static final long STOP_SECONDS = 10;
  private static final String LISTENING = " listening on ";
  private static final List<String> DEFAULTS =
      List.of(
          "--listen", "127.0.0.1:0", "--store", "memory:", "--harness", "--drain-timeout", "0");

  private final Process process;
  private final File log;
  private final Thread killer;
  private final String address;
  private final ManagedChannel channel;

  private RunlaneServer(Process process, File log, Thread killer, String address) {
    this.process = process;
    this.log = log;
    this.killer = killer;
    this.address = address;
    this.channel =
        Grpc.newChannelBuilder(address, InsecureChannelCredentials.create()).build();
  }

  /**
   * Starts a server with a store in memory, the scripted agent and the harness, on a free port.
   *
   * @param arguments those of runlane-server, such as "--agent", "echo"
   * @throws IllegalStateException if it does not start; the message has its log
   */
  public static RunlaneServer start(String... arguments) {
    var named = System.getenv("RUNLANE_SERVER_COMMAND");
    var command = new ArrayList<String>();
    command.add(named == null || named.isEmpty() ? "runlane-server" : named);
    command.addAll(DEFAULTS);
    if (List.of(arguments).stream().noneMatch(each -> each.startsWith("--agent"))) {
      command.addAll(List.of("--agent", "scripted"));
    }
    command.addAll(List.of(arguments));
    try {
      var log = File.createTempFile("runlane-server", ".log");
      log.deleteOnExit();
      var builder = new ProcessBuilder(command).redirectError(log);
      // The settings of another server.
      builder.environment().keySet().removeIf(name -> name.startsWith("RUNLANE_"));
      var process = builder.start();
      // A test that dies takes its server along.
      var killer = new Thread(process::destroyForcibly);
      Runtime.getRuntime().addShutdownHook(killer);
      var address = listening(process);
      if (address == null) {
        process.destroyForcibly();
        throw new IllegalStateException(
            command.get(0) + " did not start:\n" + Files.readString(log.toPath()));
      }
      return new RunlaneServer(process, log, killer, address);
    } catch (IOException error) {
      throw new IllegalStateException(
          "runlane-server: "
              + error.getMessage()
              + "; install it with: pip install 'runlane[server]', or name it in"
              + " RUNLANE_SERVER_COMMAND",
          error);
    }
  }

  /** The host and port of the server. */
  public String address() {
    return address;
  }

  /** A channel to the server, which is closed with it. */
  public ManagedChannel channel() {
    return channel;
  }

  /** What the server has logged so far. */
  public String log() {
    try {
      return Files.readString(log.toPath());
    } catch (IOException error) {
      throw new UncheckedIOException(error);
    }
  }

  /** Stops the server; waits for the end of its process. */
  @Override
  public void close() {
    channel.shutdownNow();
    process.destroy();
    try {
      if (!process.waitFor(STOP_SECONDS, TimeUnit.SECONDS)) {
        process.destroyForcibly().waitFor();
      }
    } catch (InterruptedException error) {
      process.destroyForcibly();
      Thread.currentThread().interrupt();
    }
    Runtime.getRuntime().removeShutdownHook(killer);
  }

  /** Waits for the first line of the server, which ends with its address; null if there is none. */
  private static String listening(Process process) {
    var first =
        CompletableFuture.supplyAsync(
            () -> {
              var stdout = new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8);
              try {
                return new BufferedReader(stdout).readLine();
              } catch (IOException error) {
                return null;
              }
            });
    try {
      var line = first.get(START_SECONDS, TimeUnit.SECONDS);
      var at = line == null ? -1 : line.indexOf(LISTENING);
      return at < 0 ? null : line.substring(at + LISTENING.length()).strip();
    } catch (InterruptedException error) {
      Thread.currentThread().interrupt();
      return null;
    } catch (ExecutionException | TimeoutException error) {
      return null;
    }
  }
}
