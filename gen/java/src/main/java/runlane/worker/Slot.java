package runlane.worker;

import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.StreamObserver;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.EnumSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import runlane.worker.v1.WorkerServiceGrpc.WorkerServiceStub;
import runlane.worker.v1.WorkerServiceOuterClass.WorkRequest;
import runlane.worker.v1.WorkerServiceOuterClass.WorkResponse;

/** Executes one run at a time (W1). Its lock guards the attempt, too. */
final class Slot {
  private static final System.Logger LOG = System.getLogger("runlane.worker");
  private static final long MAX_PAUSE = 2000;
  private static final Set<Status.Code> MISTAKES =
      EnumSet.of(
          Status.Code.INVALID_ARGUMENT,
          Status.Code.NOT_FOUND,
          Status.Code.PERMISSION_DENIED,
          Status.Code.UNAUTHENTICATED,
          Status.Code.UNIMPLEMENTED);

  /** They lead to nodes of the same store; the first one is used. */
  private final Deque<ManagedChannel> channels;

  private final Map<String, Agent> agents;
  private final Worker worker;

  private Attempt attempt;
  private StreamObserver<WorkRequest> up;
  private boolean hasOffered;

  /** Whether the offer was taken back. */
  private boolean hasTakenBack;

  private boolean isStopping;
  private boolean wasServed;

  Slot(List<ManagedChannel> channels, Map<String, Agent> agents, Worker worker) {
    this.channels = new ArrayDeque<>(channels);
    this.agents = agents;
    this.worker = worker;
  }

  /** Serves until it is stopped. Throws StatusRuntimeException if a new call would fail too. */
  void serve() throws InterruptedException {
    long pause = 100;
    while (true) {
      Status status = connect();
      synchronized (this) {
        if (isDone()) {
          return;
        }
        pause = wasServed ? 100 : pause;
      }
      if (MISTAKES.contains(status.getCode())) {
        throw new StatusRuntimeException(status); // W11
      }
      LOG.log(System.Logger.Level.INFO, "reconnecting: " + status.getDescription());
      Thread.sleep(pause); // W8
      pause = Math.min(2 * pause, MAX_PAUSE);
      channels.addLast(channels.removeFirst());
      // By itself, the channel waits up to two minutes between attempts to connect: longer than the
      // worker lease.
      channels.getFirst().resetConnectBackoff();
    }
  }

  /** Offers no more; {@code serve} returns once the attempt has ended. */
  synchronized void stop() {
    isStopping = true;
    changed();
  }

  /** Gives the turn back (W10). */
  synchronized void handBack() {
    if (attempt != null) {
      attempt.handBack();
      changed();
    }
  }

  private boolean isDone() {
    return isStopping && (attempt == null || attempt.hasEnded());
  }

  /** Serves over one connection; returns the status with which it ended. */
  private Status connect() throws InterruptedException {
    var ended = new CompletableFuture<Status>();
    WorkerServiceStub stub = worker.stub(channels.getFirst());
    synchronized (this) {
      hasOffered = false;
      hasTakenBack = false;
      wasServed = false;
      if (attempt != null) {
        attempt.disconnect();
      }
      up = stub.work(new Responses(ended));
      changed();
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
      take(response);
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

  private synchronized void take(WorkResponse response) {
    wasServed = true;
    if (hasTakenBack) { // a turn that came at the same time goes back
      if (response.getAcked().getEnded()) {
        hasOffered = false;
      }
    } else if (response.hasTurn()) {
      attempt = new Attempt(response.getTurn(), agents.get(response.getTurn().getAgent()), this);
    } else if (attempt != null) {
      attempt.take(response);
    }
    changed();
  }

  /** Sends what is due, and wakes the threads of the agent. The caller holds the lock. */
  void changed() {
    notifyAll();
    for (var message = next(); message != null; message = next()) {
      up.onNext(message.build());
    }
    if (up != null && isDone() && !hasOffered) {
      up.onCompleted();
      up = null;
    }
  }

  private WorkRequest.Builder next() {
    if (up == null) {
      return null;
    }
    if (attempt != null && attempt.hasEnded()) {
      attempt = null;
      hasOffered = false;
    }
    if (!hasOffered) {
      if (isDone() || (attempt != null && attempt.isOver())) {
        return null;
      }
      hasOffered = true;
      var offer = WorkRequest.Offer.newBuilder().addAllAgents(agents.keySet());
      offer.setProtocolVersion(1).setWorkerId(worker.name());
      if (attempt != null) {
        offer.setResume(attempt.resume());
      }
      return WorkRequest.newBuilder().setOffer(offer);
    }
    if (attempt != null) {
      return attempt.next();
    }
    if (!isStopping || hasTakenBack) {
      return null;
    }
    hasTakenBack = true;
    return WorkRequest.newBuilder().setHandBack(WorkRequest.HandBack.getDefaultInstance());
  }
}
