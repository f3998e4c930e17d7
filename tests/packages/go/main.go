// Runs one prompt to its end and cancels another, with the packed Go module.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pb "runlane.example/gen/go/runlane/v1"
)

func main() {
	log.SetFlags(0)
	conn, err := grpc.NewClient(os.Args[1], grpc.WithTransportCredentials(insecure.NewCredentials()))
	check(err)
	runs := pb.NewRunServiceClient(conn)
	fmt.Println(follow(runs, os.Args[2], false))
	fmt.Println(follow(runs, os.Args[3], true))
}

// follow prints the text of a run and returns its end. With `cancel`, it cancels the run at its first text.
func follow(runs pb.RunServiceClient, prompt string, cancel bool) pb.RunState {
	ctx, done := context.WithTimeout(context.Background(), time.Minute)
	defer done()
	accepted, err := runs.RunAccepted(ctx, &pb.RunAcceptedRequest{
		SessionId: "go", Prompt: prompt, AllowMissing: true,
	})
	check(err)
	events, err := runs.SubscribeRun(ctx, &pb.SubscribeRunRequest{RunId: accepted.Run.RunId})
	check(err)
	for {
		message, err := events.Recv()
		check(err)
		if text := message.Event.GetTextDelta().GetText(); text != "" {
			fmt.Println(text)
			if cancel {
				_, err := runs.Cancel(ctx, &pb.CancelRequest{SessionId: "go"})
				check(err)
			}
		}
		if complete := message.Event.GetRunComplete(); complete != nil {
			return complete.State
		}
	}
}

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}
