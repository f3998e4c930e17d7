package runlane.example;

import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.stub.StreamObserver;
import java.util.EnumSet;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import runlane.worker.v1.WorkerServiceGrpc.WorkerServiceStub;
import runlane.worker.v1.WorkerServiceOuterClass.WorkRequest;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse;

/** Executes one run at a time (W1). Its lock guards the attempt, too. */
final class Slot {
  private static final Set<Status.Code> MISTAKES =
      EnumSet.of(
          Status.Code.INVALID_ARGUMENT,
          Status.Code.NOT_FOUND,
          Status.Code.PERMISSION_DENIED,
          Status.Code.UNAUTHENTICATED,
          Status.Code.UNIMPLEMENTED);

  private final ManagedChannel channel;
  private final WorkerServiceStub stub;
  private final String agent;
  private Attempt attempt;
  private StreamObserver<WorkRequest> up;

  /** Whether the server knows the attempt on this connection. */
  private boolean isSynced;

  private boolean isStopping;
  private boolean hasEnded;

  Slot(ManagedChannel channel, WorkerServiceStub stub, String agent) {
    this.channel = channel;
    this.stub = stub;
    this.agent = agent;
  }

  void serve() throws InterruptedException {
    long pause = 100;
    while (true) {
      long began = System.currentTimeMillis();
      Status status = connect();
      synchronized (this) {
        if (hasEnded || (isStopping && attempt == null)) {
          return;
        }
      }
      if (MISTAKES.contains(status.getCode())) {
        throw status.asRuntimeException(); // W11
      }
      System.err.println("reconnecting: " + status.getDescription());
      if (System.currentTimeMillis() - began > 60_000) {
        pause = 100;
      }
      Thread.sleep(pause); // W8
      pause = Math.min(2 * pause, 2000);
      // By itself, the channel waits up to two minutes between attempts to connect: longer than the
      // worker lease.
      channel.resetConnectBackoff();
    }
  }

  /** Stops the agent, and gives the turn back (W10). */
  void stop() throws InterruptedException {
    Attempt stopped;
    synchronized (this) {
      isStopping = true;
      stopped = attempt;
    }
    if (stopped != null) {
      stopped.stop();
      stopped.join();
    }
    send(WorkRequest.newBuilder().setHandBack(WorkRequest.HandBack.getDefaultInstance()));
  }

  /** Serves over one connection; returns the status with which it ended. */
  private Status connect() throws InterruptedException {
    var ended = new CompletableFuture<Status>();
    boolean wasStopped;
    synchronized (this) {
      isSynced = attempt == null;
      wasStopped = isStopping;
      up = stub.work(new Responses(ended));
      offer();
    }
    if (wasStopped) {
      stop();
    }
    Status status = ended.join();
    synchronized (this) {
      up = null;
    }
    return status;
  }

  private final class Responses implements StreamObserver<WorkResponse> {
    private final CompletableFuture<Status> ended;

    Responses(CompletableFuture<Status> ended) {
      this.ended = ended;
    }

    @Override
    public void onNext(WorkResponse response) {
      try {
        if (take(response)) {
          ended.complete(Status.OK);
        }
      } catch (InterruptedException e) {
        Thread.currentThread().interrupt();
      }
    }

    @Override
    public void onError(Throwable error) {
      ended.complete(Status.fromThrowable(error));
    }

    @Override
    public void onCompleted() {
      ended.complete(Status.UNAVAILABLE.withDescription("the server ended the call"));
    }
  }

  /** Takes a message of the server; returns whether the slot has stopped. */
  private boolean take(WorkResponse response) throws InterruptedException {
    Attempt over;
    synchronized (this) {
      boolean isOver = apply(response);
      if (!isOver) {
        flush();
        return false;
      }
      over = attempt;
      attempt = null;
      isSynced = true;
    }
    if (over != null) {
      over.stop();
      over.join();
    }
    synchronized (this) {
      hasEnded = isStopping;
      if (!hasEnded) {
        offer();
      }
      return hasEnded;
    }
  }

  private boolean apply(WorkResponse response) {
    switch (response.getMessageCase()) {
      case TURN:
        if (!isStopping) {
          send(WorkRequest.newBuilder().setBegun(WorkRequest.Begun.getDefaultInstance())); // W2
          attempt = new Attempt(response.getTurn(), this);
        }
        return false;
      case ACKED:
        if (attempt != null) {
          attempt.takeAcked(response.getAcked().getNumber());
          if (!isSynced) {
            attempt.resync();
          }
        }
        isSynced = true;
        return response.getAcked().getEnded();
      case FOLDED:
        if (attempt != null) {
          attempt.takePrompts(response.getFolded());
        }
        return false;
      case CANCEL: // W6
        if (attempt != null) {
          attempt.stop();
        }
        return false;
      case FENCED: // W7
        return true;
      default:
        return false;
    }
  }

  private void offer() {
    var offer = WorkRequest.Offer.newBuilder().addAgents(agent).setProtocolVersion(1);
    offer.setWorkerId("java-" + ProcessHandle.current().pid());
    if (attempt != null) {
      offer.setResume(attempt.resume());
    }
    send(WorkRequest.newBuilder().setOffer(offer));
  }

  /** Sends what the attempt has to send. */
  synchronized void flush() {
    if (attempt == null || !isSynced || isStopping) {
      return;
    }
    for (var message = attempt.next(); message != null; message = attempt.next()) {
      send(message);
    }
  }

  private synchronized void send(WorkRequest.Builder message) {
    if (up != null) {
      up.onNext(message.build());
    }
  }
}
