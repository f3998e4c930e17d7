// A worker: executes runs of the agent `default`, or of the one that RUNLANE_AGENT names, until SIGTERM.
// The page docs/workers.md lists its duties; their numbers stand in the comments.
package main

import (
	"cmp"
	"context"
	"fmt"
	"log"
	"os"
	"os/signal"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "runlane.example/gen/go/runlane/worker/v1"
)

const (
	slots      = 4
	maxMessage = 4<<20 + 64<<10
	maxText    = 1 << 14 // bytes in an event, and so fewer characters than the limit
	maxEvents  = 100     // in an emit, which so stays below 2 MiB
)

var loopback = regexp.MustCompile(`^(localhost|127(\.\d+){3}|\[::1\]):\d+$`)

// answer is the agent: it says the prompt in capitals, a word at a time, then the prompts that
// joined the turn. It stops when ctx is done.
func answer(ctx context.Context, a *attempt) {
	for prompts := []string{a.turn.Prompt}; len(prompts) > 0; prompts = a.takeFolded(ctx) { // W9
		for _, word := range strings.Fields(strings.Join(prompts, " ")) {
			a.say(ctx, strings.ToUpper(word)+" ")
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
				return
			}
		}
	}
}

// attempt is a turn in hand. It outlives the connection.
type attempt struct {
	turn    *pb.WorkResponse_Turn
	output  chan string        // closed when the agent has returned
	asks    chan chan []string // questions of the agent for folded prompts
	stop    context.CancelFunc
	waiting []*pb.Event // not acknowledged (W4)
	acked   int64
	sent    int64 // on this connection
	merged  int64 // the last event that must stay as it is, because it was sent (W3)
	ended   bool
	endSent bool

	asking     chan<- []string // gets the answer; nil without a question
	foldNumber int64
	foldSent   bool
	folded     []string
	foldedRuns []string
}

func start(turn *pb.WorkResponse_Turn) *attempt {
	ctx, stop := context.WithCancel(context.Background())
	a := &attempt{turn: turn, output: make(chan string), asks: make(chan chan []string), stop: stop}
	go func() {
		defer close(a.output)
		answer(ctx, a)
	}()
	return a
}

func (a *attempt) say(ctx context.Context, text string) {
	for len(text) > 0 {
		n := min(len(text), maxText)
		for n < len(text) && !utf8.RuneStart(text[n]) {
			n--
		}
		select {
		case a.output <- text[:n]:
		case <-ctx.Done():
			return
		}
		text = text[n:]
	}
}

// takeFolded returns the prompts that wait to join the turn.
func (a *attempt) takeFolded(ctx context.Context) []string {
	answer := make(chan []string, 1)
	select {
	case a.asks <- answer:
	case <-ctx.Done():
		return nil
	}
	select {
	case prompts := <-answer:
		return prompts
	case <-ctx.Done():
		return nil
	}
}

func (a *attempt) last() int64 { return a.acked + int64(len(a.waiting)) }

func (a *attempt) add(text string) {
	if n := len(a.waiting); n > 0 && a.last() > a.merged {
		if whole := a.waiting[n-1].GetTextDelta() + text; len(whole) <= maxText {
			a.waiting[n-1] = delta(whole)
			return
		}
	}
	a.waiting = append(a.waiting, delta(text))
}

func delta(text string) *pb.Event {
	return &pb.Event{Event: &pb.Event_TextDelta{TextDelta: text}}
}

func (a *attempt) onAcked(number int64) {
	if n := number - a.acked; n > 0 {
		a.waiting, a.acked = a.waiting[n:], number
	}
}

func (a *attempt) onFolded(folded *pb.WorkResponse_Folded) {
	for _, one := range folded.Prompts {
		a.folded = append(a.folded, one.Prompt)
		a.foldedRuns = append(a.foldedRuns, one.RunId)
	}
	if a.asking != nil && folded.Number == a.foldNumber {
		a.asking <- a.folded
		a.asking, a.folded = nil, nil
	}
}

// resync continues after the last durable event on a new connection (W8).
func (a *attempt) resync() {
	a.sent, a.endSent, a.foldSent = a.acked, false, false
}

// next is what to send now, if anything: one emit at a time (W2, W3), then a question (W9) or the end (W5).
func (a *attempt) next() *pb.WorkRequest {
	unsent := a.last() - a.sent
	if unsent > 0 && (a.sent == a.acked || a.ended || a.asking != nil) {
		count := min(unsent, maxEvents)
		first := a.sent - a.acked
		emit := &pb.WorkRequest_Emit{Number: a.sent + 1, Events: a.waiting[first : first+count]}
		a.sent += count
		a.merged = max(a.merged, a.sent)
		return &pb.WorkRequest{Message: &pb.WorkRequest_Emit_{Emit: emit}}
	}
	if unsent == 0 && a.asking != nil && !a.foldSent {
		a.foldSent = true
		take := &pb.WorkRequest_TakeFolded{Number: a.foldNumber}
		return &pb.WorkRequest{Message: &pb.WorkRequest_TakeFolded_{TakeFolded: take}}
	}
	if unsent == 0 && a.ended && !a.endSent {
		a.endSent = true
		finish := &pb.WorkRequest_Finish{Number: a.last()}
		return &pb.WorkRequest{Message: &pb.WorkRequest_Finish_{Finish: finish}}
	}
	return nil
}

// drop stops the agent and waits until it has returned.
func (a *attempt) drop() {
	a.stop()
	for !a.ended {
		_, more := <-a.output
		a.ended = !more
	}
}

// slot executes one run at a time (W1).
type slot struct {
	client  pb.WorkerServiceClient
	agent   string
	attempt *attempt
}

func (s *slot) serve(stopping <-chan struct{}) error {
	pause := 100 * time.Millisecond
	for {
		began := time.Now()
		stopped, err := s.connect(stopping)
		switch status.Code(err) {
		case codes.OK:
		case codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
			return err // W11
		}
		select {
		case <-stopping:
			stopped = stopped || s.attempt == nil
		default:
		}
		if stopped {
			return nil
		}
		if time.Since(began) > time.Minute {
			pause = 100 * time.Millisecond
		}
		log.Printf("reconnecting: %v", err)
		time.Sleep(pause) // W8
		pause = min(2*pause, 2*time.Second)
	}
}

// connect serves over one connection. It returns true once the slot has stopped.
func (s *slot) connect(stopping <-chan struct{}) (bool, error) {
	ctx, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	if token := os.Getenv("RUNLANE_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	stream, err := s.client.Work(ctx)
	if err != nil {
		return false, err
	}
	responses, failed := make(chan *pb.WorkResponse), make(chan error, 1)
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- response:
			case <-ctx.Done():
				return
			}
		}
	}()
	synced, leaving := s.attempt == nil, false
	if err := s.offer(stream); err != nil {
		return false, err
	}
	for {
		var output <-chan string
		var asks <-chan chan []string
		if a := s.attempt; a != nil {
			for synced && !leaving {
				message := a.next()
				if message == nil {
					break
				}
				if err := stream.Send(message); err != nil {
					return false, err
				}
			}
			asks = a.asks
			if !a.ended && len(a.waiting) < int(a.turn.Window) {
				output = a.output
			}
		}
		select {
		case text, more := <-output:
			if more {
				s.attempt.add(text)
			} else {
				s.attempt.ended = true
			}
		case ask := <-asks:
			s.attempt.asking, s.attempt.foldSent = ask, false
			s.attempt.foldNumber++
		case err := <-failed:
			return leaving && s.attempt == nil, err
		case <-stopping: // W10
			stopping, leaving = nil, true
			if s.attempt != nil {
				s.attempt.drop()
			}
			back := &pb.WorkRequest{Message: &pb.WorkRequest_HandBack_{HandBack: &pb.WorkRequest_HandBack{}}}
			if err := stream.Send(back); err != nil {
				return false, err
			}
		case response := <-responses:
			over := false
			switch message := response.Message.(type) {
			case *pb.WorkResponse_Turn_:
				if !leaving { // W2
					s.attempt = start(message.Turn)
					begun := &pb.WorkRequest{Message: &pb.WorkRequest_Begun_{Begun: &pb.WorkRequest_Begun{}}}
					if err := stream.Send(begun); err != nil {
						return false, err
					}
				}
			case *pb.WorkResponse_Acked_:
				if a := s.attempt; a != nil {
					a.onAcked(message.Acked.Number)
					if !synced {
						synced = true
						a.resync()
					}
				}
				over = message.Acked.Ended
			case *pb.WorkResponse_Folded_:
				if a := s.attempt; a != nil {
					a.onFolded(message.Folded)
				}
			case *pb.WorkResponse_Cancel_: // W6
				if s.attempt != nil {
					s.attempt.stop()
				}
			case *pb.WorkResponse_Fenced_: // W7
				over = true
			}
			if !over {
				continue
			}
			if s.attempt != nil {
				s.attempt.drop()
				s.attempt, synced = nil, true
			}
			if leaving {
				return true, nil
			}
			if err := s.offer(stream); err != nil {
				return false, err
			}
		}
	}
}

func (s *slot) offer(stream pb.WorkerService_WorkClient) error {
	offer := &pb.WorkRequest_Offer{
		Agents: []string{s.agent}, WorkerId: fmt.Sprintf("go-%d", os.Getpid()), ProtocolVersion: 1,
	}
	if a := s.attempt; a != nil {
		offer.Resume = &pb.WorkRequest_Resume{
			RunId: a.turn.RunId, Tenant: a.turn.Tenant, Attempt: a.turn.Attempt, Fence: a.turn.Fence,
			Acknowledged: a.acked, FoldedRunIds: a.foldedRuns,
		}
	}
	return stream.Send(&pb.WorkRequest{Message: &pb.WorkRequest_Offer_{Offer: offer}})
}

func main() {
	log.SetFlags(0)
	server := cmp.Or(os.Getenv("RUNLANE_SERVER"), "127.0.0.1:50051")
	if os.Getenv("RUNLANE_TOKEN") != "" && !loopback.MatchString(server) {
		log.Fatalf("RUNLANE_TOKEN is not sent to %s: the connection is not encrypted", server)
	}
	// By default, grpc waits up to two minutes between attempts to connect: longer than the worker lease.
	wait := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second}
	conn, err := grpc.NewClient(server,
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: wait, MinConnectTimeout: 5 * time.Second}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
	stopping, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer release()
	agent := cmp.Or(os.Getenv("RUNLANE_AGENT"), "default")
	fmt.Printf("worker for %s: %d slots\n", agent, slots)
	var working sync.WaitGroup
	for range slots {
		working.Add(1)
		go func() {
			defer working.Done()
			s := slot{client: pb.NewWorkerServiceClient(conn), agent: agent}
			if err := s.serve(stopping.Done()); err != nil {
				log.Fatal(err)
			}
		}()
	}
	working.Wait()
}
