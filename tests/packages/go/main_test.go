package main

import (
	"testing"

	pb "runlane.example/gen/go/runlane/v1"
	"runlane.example/gen/go/runlanetest"
)

func TestAServerForThisTest(t *testing.T) {
	server := runlanetest.Start(t)
	runs := pb.NewRunServiceClient(server.Conn)
	if state := follow(runs, `[{"text": "Hello"}]`, false); state != pb.RunState_RUN_STATE_COMPLETED {
		t.Error(state)
	}
}

func TestAServerWithAnotherAgent(t *testing.T) {
	server := runlanetest.Start(t, "--agent", "echo")
	runs := pb.NewRunServiceClient(server.Conn)
	if state := follow(runs, "Hello", false); state != pb.RunState_RUN_STATE_COMPLETED {
		t.Error(state)
	}
}
