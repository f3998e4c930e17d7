package user;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import runlane.v1.RunServiceGrpc;
import runlane.v1.RunServiceGrpc.RunServiceBlockingStub;
import runlane.v1.RunServiceOuterClass.CancelRequest;
import runlane.v1.RunServiceOuterClass.RunAcceptedRequest;
import runlane.v1.RunServiceOuterClass.SubscribeRunRequest;

/** Runs one prompt to its end and cancels another, with the packed Maven artifact. */
public final class Main {
  public static void main(String[] args) {
    var channel = Grpc.newChannelBuilder(args[0], InsecureChannelCredentials.create()).build();
    var runs = RunServiceGrpc.newBlockingStub(channel);
    follow(runs, args[1], false);
    follow(runs, args[2], true);
    channel.shutdownNow();
  }

  /** Prints the text of a run and its end. With `cancel`, it cancels the run at its first text. */
  private static void follow(RunServiceBlockingStub runs, String prompt, boolean cancel) {
    var request = RunAcceptedRequest.newBuilder().setSessionId("java").setPrompt(prompt);
    var run = runs.runAccepted(request.setAllowMissing(true).build()).getRun();
    var subscribe = SubscribeRunRequest.newBuilder().setRunId(run.getRunId()).build();
    runs.subscribeRun(subscribe)
        .forEachRemaining(
            message -> {
              var event = message.getEvent();
              if (event.hasTextDelta()) {
                System.out.println(event.getTextDelta().getText());
                if (cancel) {
                  runs.cancel(CancelRequest.newBuilder().setSessionId("java").build());
                }
              } else if (event.hasRunComplete()) {
                System.out.println(event.getRunComplete().getState());
              }
            });
  }
}
