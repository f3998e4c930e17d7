// Quickstart: runs a prompt in a session and prints the answer as it arrives. Ctrl-C cancels the run.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/signal"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	pb "runlane.example/gen/go/runlane/v1"
)

const callTimeout = 10 * time.Second

func main() {
	log.SetFlags(0)
	if len(os.Args) != 3 {
		log.Fatal("usage: quickstart SESSION PROMPT")
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		log.Fatal(err)
	}
}

func run(sessionID, prompt string) error {
	ctx := context.Background()
	server := cmp.Or(os.Getenv("RUNLANE_SERVER"), "127.0.0.1:50051")
	if token := os.Getenv("RUNLANE_TOKEN"); token != "" {
		if !isLoopback(server) {
			return fmt.Errorf("RUNLANE_TOKEN is not sent to %s: the connection is not encrypted", server)
		}
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	conn, err := grpc.NewClient(server, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	runs := pb.NewRunServiceClient(conn)

	// Before the run is accepted: a Ctrl-C from here on finds a run to cancel.
	interrupted, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()

	acceptCtx, cancelAccept := context.WithTimeout(ctx, callTimeout)
	defer cancelAccept()
	accepted, err := runs.RunAccepted(acceptCtx, &pb.RunAcceptedRequest{
		SessionId: sessionID, Prompt: prompt, AllowMissing: true,
	})
	if err != nil {
		return err
	}
	runID := accepted.Run.RunId

	// The stream stays open after Ctrl-C, so that it delivers the end of the cancelled run.
	disarm := context.AfterFunc(interrupted, func() {
		stop() // A second Ctrl-C ends the program.
		cancelCtx, done := context.WithTimeout(ctx, callTimeout)
		defer done()
		if _, err := runs.Cancel(cancelCtx, &pb.CancelRequest{RunId: runID}); err != nil {
			log.Fatal(err)
		}
	})
	defer disarm()

	events, err := runs.SubscribeRun(ctx, &pb.SubscribeRunRequest{RunId: runID})
	if err != nil {
		return err
	}
	for {
		message, err := events.Recv()
		if err != nil {
			return err
		}
		switch event := message.GetEvent().GetEvent().(type) {
		case *pb.RunEvent_TextDelta_:
			fmt.Print(event.TextDelta.Text)
		case *pb.RunEvent_RunComplete:
			fmt.Println()
			return report(event.RunComplete)
		}
	}
}

// report prints how the run ended. Any other end than completed is an error.
func report(complete *pb.RunComplete) error {
	state := strings.ToLower(strings.TrimPrefix(complete.State.String(), "RUN_STATE_"))
	if complete.Error != nil {
		return fmt.Errorf("%s: %s", state, complete.Error.Message)
	}
	if complete.State != pb.RunState_RUN_STATE_COMPLETED {
		return errors.New(state)
	}
	log.Print(state)
	return nil
}

func isLoopback(server string) bool {
	host, _, err := net.SplitHostPort(server)
	return err == nil && (host == "localhost" || net.ParseIP(host).IsLoopback())
}
