// Agents that go wrong (test_odd_workers.py).
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"syscall"

	v1 "runlane.example/gen/go/runlane/v1"
	"runlane.example/gen/go/worker"
)

func answer(ctx context.Context, turn *worker.Turn) error {
	switch turn.Prompt {
	case "wordless":
		var none *worker.Error
		return none
	case "no text":
		return &worker.Error{Reason: "NO_MODEL", Message: "\xff"}
	case "early":
		fmt.Println("let go")
		<-ctx.Done()
		return ctx.Err()
	case "half":
		if _, err := worker.Step(turn, "mail \xff", func() (string, error) { return "\xff", nil }); err != nil {
			return err
		}
		call := &v1.ToolResult{ToolCallId: "\xff", Name: "\xff", Content: "\xff"}
		if err := turn.CallTool("\xff", "\xff", "{}"); err != nil {
			return err
		}
		if err := turn.ToolReturned(call); err != nil {
			return err
		}
		turn.Report(nil, "model \xff", v1.FinishReason_FINISH_REASON_UNSPECIFIED)
	case "nothing":
		if _, err := worker.Step(turn, "mail", func() (any, error) { return nil, nil }); err != nil {
			return err
		}
		if err := turn.Custom("sent", nil); err != nil {
			return err
		}
		if err := turn.SetResult(nil); err != nil {
			return err
		}
	}
	return turn.Say("ok")
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fmt.Println("worker for default: 1 slot")
	odd := worker.Worker{
		Servers: []string{os.Getenv("RUNLANE_SERVER")}, Agents: map[string]worker.Agent{"default": answer}, Slots: 1,
	}
	if err := odd.Run(ctx); err != nil {
		log.Fatal(err)
	}
}
