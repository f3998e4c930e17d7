// A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names, until SIGTERM.
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	v1 "runlane.example/gen/go/runlane/v1"
	pb "runlane.example/gen/go/runlane/worker/v1"
	"runlane.example/gen/go/worker"
)

const slots = 4

// answer says the prompt in capitals, a word at a time, then the prompts that joined the turn.
func answer(ctx context.Context, turn *worker.Turn) error {
	if version, ok := strings.CutPrefix(turn.Prompt, "release "); ok {
		return release(turn, version)
	}
	if turn.Prompt == "recall" {
		return recall(turn)
	}
	prompts := []string{turn.Prompt}
	for len(prompts) > 0 {
		for _, word := range strings.Fields(strings.Join(prompts, " ")) {
			if err := turn.Say(strings.ToUpper(word) + " "); err != nil {
				return err
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		folded, err := turn.TakeFolded()
		if err != nil {
			return err
		}
		prompts = nil
		for _, one := range folded {
			prompts = append(prompts, one.Prompt)
		}
	}
	return nil
}

// release builds once, also if it is called again, asks people, and deploys.
func release(turn *worker.Turn, version string) error {
	build, err := worker.Step(turn, "build", func() (string, error) {
		fmt.Println("building", version)
		return "app-" + version, nil
	})
	if err != nil {
		return err
	}
	answers, err := turn.Ask(&pb.Question{Text: "May I deploy " + build + "?", ToolName: "deploy"})
	if err != nil {
		return err
	}
	if !answers[0].GetApproval().GetApproved() {
		return &worker.Error{Reason: "NOT_APPROVED", Message: "nothing was deployed"}
	}
	notes := &v1.Artifact{
		ArtifactId: "notes", Name: "notes.txt", MimeType: "text/plain", Content: &v1.Artifact_Text{Text: "Release " + version},
		Last: true,
	}
	if err := turn.Artifact(notes); err != nil {
		return err
	}
	if err := turn.Custom("deployed", map[string]string{"build": build}); err != nil {
		return err
	}
	if err := turn.SetResult(map[string]string{"build": build}); err != nil {
		return err
	}
	return turn.Say("Deployed " + build + ".")
}

// recall says what the earlier turns of the session said.
func recall(turn *worker.Turn) error {
	messages, err := turn.History()
	if err != nil {
		return err
	}
	for _, message := range messages {
		for _, part := range message.Parts {
			if err := turn.Say(part.GetText() + "|"); err != nil {
				return err
			}
		}
	}
	return nil
}

func main() {
	log.SetFlags(0)
	agent := cmp.Or(os.Getenv("RUNLANE_AGENT"), "default")
	w := worker.Worker{
		Servers: []string{cmp.Or(os.Getenv("RUNLANE_SERVER"), worker.DefaultServer)},
		Token:   os.Getenv("RUNLANE_TOKEN"),
		Agents:  map[string]worker.Agent{agent: answer},
		Slots:   slots,
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	fmt.Printf("worker for %s: %d slots\n", agent, slots)
	if err := w.Run(ctx); err != nil {
		log.Fatal(err)
	}
}
