package user;

import runlane.testing.RunlaneServer;
import runlane.v1.RunServiceGrpc;
import runlane.v1.RunServiceOuterClass.RunAcceptedRequest;
import runlane.v1.RunServiceOuterClass.WaitRunRequest;

/** Runs a prompt on a server of its own. */
public final class OwnServer {
  public static void main(String[] args) {
    try (var server = RunlaneServer.start()) {
      var runs = RunServiceGrpc.newBlockingStub(server.channel());

      var request = RunAcceptedRequest.newBuilder().setSessionId("s").setPrompt("Hello");
      var run = runs.runAccepted(request.setAllowMissing(true).build()).getRun();
      var wait = WaitRunRequest.newBuilder().setRunId(run.getRunId()).build();
      if (!runs.waitRun(wait).getRun().getRunComplete().getText().equals("Hello")) {
        throw new AssertionError(server.log());
      }
    }
    try {
      RunlaneServer.start("--agent", "nobody").close();
      throw new AssertionError("it started");
    } catch (IllegalStateException error) {
      if (!error.getMessage().contains("there is no agent 'nobody'")) {
        throw error;
      }
    }
  }
}
