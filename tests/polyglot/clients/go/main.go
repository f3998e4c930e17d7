// A Runlane client in one file: runs prompts, edits and cancels runs, forks sessions, and watches
// completions and sessions.
//
// C1 to C17 are the rules of docs/clients.md; a comment marks the code that implements each one.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	pb "runlane.example/gen/go/runlane/v1"
)

const usage = `usage:
  run SESSION PROMPT [--run-id ID] [--max-attempts N] [--answer TEXT]
  cancel SESSION [--run-id ID]
  watch [--cursor-file FILE] [--count N] [--silence SECONDS]
  session SESSION [--cursor-file FILE] [--count N] [--silence SECONDS]
  edit RUN PROMPT
  fork SESSION [NEW]
options of all: --target HOST:PORT, --timeout SECONDS
`

// Exit codes.
const (
	completed   = 0
	failed      = 1
	wrong       = 2
	refused     = 3
	unanswered  = 4
	interrupted = 130
)

// remembered is how many completions watch remembers: a repeated one soon follows the first.
const remembered = 1024

// --- The commands --------------------------------------------------------------------------------

// run accepts a run, prints its text as it arrives, and reports its end.
func run(ctx context.Context, c *connection, o options) (int, error) {
	complete, err := acceptAndFollow(ctx, c, o)
	if ctx.Err() != nil {
		return interrupted, cancelInterrupted(c, o.runID)
	}
	if err != nil {
		return failed, err
	}
	fmt.Println()
	logf("%s %s", strings.ToLower(stateName(complete.State)), reasonName(complete.FinishReason))
	if complete.State != pb.RunState_RUN_STATE_COMPLETED {
		return failed, nil
	}
	return completed, nil
}

func acceptAndFollow(ctx context.Context, c *connection, o options) (*pb.RunComplete, error) {
	// C1: every attempt sends the same id, created before the first one.
	request := &pb.RunAcceptedRequest{
		SessionId:    o.words[0],
		Prompt:       o.words[1],
		RunId:        o.runID,
		MaxAttempts:  o.maxAttempts,
		AllowMissing: true,
	}
	if _, err := call(ctx, c, c.runs.RunAccepted, request, (*failure).mayPass); err != nil {
		return nil, err
	}
	logf("accepted %s", o.runID)
	return follow(ctx, c, o)
}

// follow prints the text of a run as it arrives, each piece once; it returns the end of the run.
func follow(ctx context.Context, c *connection, o options) (*pb.RunComplete, error) {
	runID := o.runID
	var lastIndex int64
	var complete *pb.RunComplete
	err := resumed(ctx, stream[pb.SubscribeRunResponse]{
		open: func(ctx context.Context) (grpc.ServerStreamingClient[pb.SubscribeRunResponse], error) {
			// C7: after the last event received.
			request := &pb.SubscribeRunRequest{RunId: runID, AfterIndex: lastIndex}
			return c.runs.SubscribeRun(c.outgoing(ctx), request)
		},
		deal: func(message *pb.SubscribeRunResponse) (bool, error) {
			event := message.GetEvent()
			if event.GetIndex() <= lastIndex {
				return false, nil
			}
			lastIndex = event.GetIndex()
			if delta := event.GetTextDelta(); delta != nil {
				fmt.Print(delta.Text)
			}
			if started := event.GetStarted(); started.GetAttempt() > 1 {
				// C8: the node of the first attempt was lost; the answer starts over.
				logf("attempt %d", started.Attempt)
			}
			if asked := event.GetInputRequested(); asked != nil {
				if err := ask(ctx, c, asked.InputRequest, o.answer); err != nil {
					return false, err
				}
			}
			complete = event.GetRunComplete()
			return complete != nil, nil
		},
		lost: reconnecting,
	})
	var f *failure
	if errors.As(err, &f) && f.reason == "CURSOR_COMPACTED" {
		return removed(ctx, c, runID, lastIndex)
	}
	return complete, err
}

// ask shows a question, and answers it if there is an answer (C14).
func ask(ctx context.Context, c *connection, asked *pb.InputRequest, answer string) error {
	logf("asked %s %s", asked.InputRequestId, asked.Text)
	if answer == "" {
		return nil // somebody else answers
	}
	request := &pb.AnswerInputRequest{
		InputRequestId: asked.InputRequestId,
		// Every attempt sends the same id, created before the first one.
		AnswerId:       uuid.Must(uuid.NewV7()).String(),
		QuestionDigest: asked.QuestionDigest,
	}
	switch asked.Kind {
	case pb.InputKind_INPUT_KIND_APPROVAL:
		approval := &pb.Approval{Approved: answer == "yes"}
		request.Answer = &pb.AnswerInputRequest_Approval{Approval: approval}
	case pb.InputKind_INPUT_KIND_CHOICE:
		request.Answer = &pb.AnswerInputRequest_Choice{Choice: answer}
	case pb.InputKind_INPUT_KIND_FORM:
		request.Answer = &pb.AnswerInputRequest_FormJson{FormJson: answer}
	default:
		request.Answer = &pb.AnswerInputRequest_Text{Text: answer}
	}
	response, err := call(ctx, c, c.runs.AnswerInput, request, (*failure).mayPass)
	var f *failure
	switch {
	case errors.As(err, &f) && f.reason == "INPUT_CLOSED":
		logf("closed %s", asked.InputRequestId)
		return nil
	case err != nil:
		return err
	case response.AcceptedThisAnswer:
		logf("answered %s", asked.InputRequestId)
	default:
		logf("answered before %s", asked.InputRequestId)
	}
	return nil
}

// removed returns the end of a run whose events are compacted, because its id was used long ago.
func removed(ctx context.Context, c *connection, runID string, seen int64) (*pb.RunComplete, error) {
	response, err := call(ctx, c, c.runs.GetRun, &pb.GetRunRequest{RunId: runID}, (*failure).mayPass)
	if err != nil {
		return nil, err
	}
	complete := response.GetRun().GetRunComplete()
	if complete == nil {
		return nil, &failure{code: codes.DataLoss, message: "run " + runID + " has lost its events"}
	}
	if seen == 0 {
		fmt.Print(complete.Text)
	}
	return complete, nil
}

// cancelInterrupted cancels the run after Ctrl-C: by its id, so that it may be retried.
func cancelInterrupted(c *connection, runID string) error {
	request := &pb.CancelRequest{RunId: runID, Reason: "interrupted"}
	_, err := call(context.Background(), c, c.runs.Cancel, request, (*failure).mayPass)
	var f *failure
	if errors.As(err, &f) && f.reason == "RUN_NOT_FOUND" {
		return nil // the run was never accepted: nothing to cancel
	}
	return err
}

// cancel cancels a session, or one run, and prints the runs that were covered.
func cancel(ctx context.Context, c *connection, o options) (int, error) {
	// C6: a second cancel of a session could cover runs accepted after the first.
	mayRepeat := (*failure).serverDidNothing
	if o.runID != "" {
		mayRepeat = (*failure).mayPass
	}
	request := &pb.CancelRequest{SessionId: o.words[0], RunId: o.runID}
	response, err := call(ctx, c, c.runs.Cancel, request, mayRepeat)
	for _, covered := range response.GetCancelled() {
		fmt.Println(covered.RunId, stateName(covered.StateWhenCancelled))
	}
	return completed, err
}

// edit replaces the prompt of a waiting run, and prints the one before and the new revision.
func edit(ctx context.Context, c *connection, o options) (int, error) {
	read := &pb.GetRunRequest{RunId: o.words[0], WithPrompt: true}
	found, err := call(ctx, c, c.runs.GetRun, read, (*failure).mayPass)
	if err != nil {
		return failed, err
	}
	request := &pb.UpdateRunRequest{
		RunId:      o.words[0],
		Prompt:     o.words[1],
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"prompt"}},
		// C16: not over the edit of another, and once however often it is sent.
		Revision: proto.Int64(found.Run.Revision),
		UpdateId: uuid.Must(uuid.NewV7()).String(),
	}
	response, err := call(ctx, c, c.runs.UpdateRun, request, (*failure).mayPass)
	if err != nil {
		return failed, err
	}
	fmt.Println(found.Prompt.Text)
	fmt.Println(response.Run.RunId, response.Run.Revision)
	return completed, nil
}

// fork copies a session up to its last finished turn, and prints the new session and that turn.
func fork(ctx context.Context, c *connection, o options) (int, error) {
	// C17: every attempt sends the same id, created before the first one.
	request := &pb.ForkSessionRequest{SessionId: o.words[0], NewSessionId: uuid.Must(uuid.NewV7()).String()}
	if len(o.words) > 1 {
		request.NewSessionId = o.words[1]
	}
	response, err := call(ctx, c, c.sessions.ForkSession, request, (*failure).mayPass)
	if err != nil {
		return failed, err
	}
	fmt.Println(response.Session.SessionId, response.Session.Origin.Turn)
	return completed, nil
}

// watch prints every completion, across lost connections and restarts of the program.
func watch(ctx context.Context, c *connection, o options) (int, error) {
	cursor, err := readCursor(o.cursorFile)
	if err != nil {
		return wrong, err
	}
	known := &ends{seen: map[string]bool{}}
	watching := false
	printed := 0
	err = resumed(ctx, stream[pb.SubscribeRunCompleteResponse]{
		silence: o.silence,
		open: func(ctx context.Context) (grpc.ServerStreamingClient[pb.SubscribeRunCompleteResponse], error) {
			request := &pb.SubscribeRunCompleteRequest{}
			if cursor != "" {
				request.Start = &pb.SubscribeRunCompleteRequest_Cursor{Cursor: cursor}
			}
			return c.runs.SubscribeRunComplete(c.outgoing(ctx), request)
		},
		deal: func(message *pb.SubscribeRunCompleteResponse) (bool, error) {
			if !watching {
				logf("watching")
				watching = true
			}
			if end := message.GetRunComplete(); end != nil && known.isNew(end) {
				fmt.Println(end.RunId, stateName(end.State), reasonName(end.FinishReason))
				printed++
			}
			// C9: of progress marks too, and only after the event is processed.
			cursor = message.Cursor
			return o.count > 0 && printed >= o.count, writeCursor(o.cursorFile, cursor)
		},
		lost: func(f *failure) error {
			// C12: report lost events; resume from the cursor that a draining server names.
			if oldest := f.metadata["oldest_cursor"]; f.reason == "CURSOR_COMPACTED" && oldest != "" {
				logf("events before %s are gone", oldest)
				cursor = oldest
				return nil
			}
			if next := f.metadata["cursor"]; f.reason == "DRAINING" && next != "" {
				cursor = next
			}
			return reconnecting(f)
		},
	})
	return completed, err
}

// session prints a session as it is, and what happens in it, across lost connections and restarts of
// the program.
func session(ctx context.Context, c *connection, o options) (int, error) {
	cursor, err := readCursor(o.cursorFile)
	if err != nil {
		return wrong, err
	}
	watching := false
	printed := 0
	var parts *pb.SubscribeSessionResponse_Snapshot
	err = resumed(ctx, stream[pb.SubscribeSessionResponse]{
		silence: o.silence,
		open: func(ctx context.Context) (grpc.ServerStreamingClient[pb.SubscribeSessionResponse], error) {
			// C15: the parts of a snapshot whose rest was lost are void.
			parts = &pb.SubscribeSessionResponse_Snapshot{}
			request := &pb.SubscribeSessionRequest{SessionIds: o.words, WithDeltas: true}
			if cursor != "" {
				request.Cursors = []string{cursor}
			}
			return c.sessions.SubscribeSession(c.outgoing(ctx), request)
		},
		deal: func(message *pb.SubscribeSessionResponse) (bool, error) {
			if !watching {
				logf("watching")
				watching = true
			}
			gone := false
			switch event := message.Event.(type) {
			case *pb.SubscribeSessionResponse_Snapshot_:
				proto.Merge(parts, event.Snapshot) // appends to the lists
				if !event.Snapshot.Continues {
					printSnapshot(parts)
				}
			case *pb.SubscribeSessionResponse_RunEvent:
				printEvent(event.RunEvent.RunId, event.RunEvent.Event)
				if event.RunEvent.Event.GetRunComplete() != nil {
					printed++
				}
			case *pb.SubscribeSessionResponse_SessionChanged_:
				if gone = event.SessionChanged.Session == nil; gone {
					fmt.Println("deleted")
				}
			}
			if message.Cursor == "" && !gone {
				return false, nil // a mark, or a part of a snapshot
			}
			// C15: only after the event is processed.
			cursor = message.Cursor
			return gone || (o.count > 0 && printed >= o.count), writeCursor(o.cursorFile, cursor)
		},
		lost: func(f *failure) error {
			if f.reason == "CURSOR_COMPACTED" && cursor != "" {
				// C15: a snapshot shows what the lost events have led to.
				logf("events after %s are gone", cursor)
				cursor = ""
				return nil
			}
			return reconnecting(f)
		},
	})
	return completed, err
}

// printSnapshot prints the active run, the waiting runs, and the output of the active run so far.
func printSnapshot(snapshot *pb.SubscribeSessionResponse_Snapshot) {
	active := "-"
	if snapshot.ActiveRun != nil {
		active = snapshot.ActiveRun.RunId
	}
	words := []string{"snapshot", active}
	for _, waiting := range snapshot.Queue {
		words = append(words, waiting.RunId)
	}
	fmt.Println(strings.Join(words, " "))
	for _, event := range snapshot.Output {
		printEvent(active, event)
	}
}

func printEvent(runID string, event *pb.RunEvent) {
	if delta := event.GetTextDelta(); delta != nil {
		fmt.Println(runID, "text", delta.Text)
	}
	if end := event.GetRunComplete(); end != nil {
		fmt.Println(runID, stateName(end.State), reasonName(end.FinishReason))
	}
}

// ends remembers the completions that were printed (C10).
type ends struct {
	seen  map[string]bool
	order []string
}

// isNew reports whether a completion is new. An id is free again once its session is deleted; the time
// distinguishes the two runs.
func (e *ends) isNew(end *pb.RunComplete) bool {
	key := end.RunId + " " + end.GetEndedAt().AsTime().String()
	if e.seen[key] {
		return false
	}
	e.seen[key] = true
	e.order = append(e.order, key)
	if len(e.order) > remembered {
		delete(e.seen, e.order[0])
		e.order = e.order[1:]
	}
	return true
}

func readCursor(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	kept, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	return strings.TrimSpace(string(kept)), err
}

// writeCursor replaces the file atomically: a crash leaves the old cursor or the new one.
func writeCursor(file, cursor string) error {
	if file == "" {
		return nil
	}
	fresh, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	_, err = fresh.WriteString(cursor)
	if err = errors.Join(err, fresh.Sync(), fresh.Close()); err == nil {
		err = os.Rename(fresh.Name(), file)
	}
	if err != nil {
		_ = os.Remove(fresh.Name())
	}
	return err
}

// --- The connection ------------------------------------------------------------------------------

type connection struct {
	runs     pb.RunServiceClient
	sessions pb.SessionServiceClient
	token    string
	timeout  time.Duration // of a call, including its retries
}

func connect(o options) (*connection, error) {
	token := os.Getenv("RUNLANE_TOKEN")
	if token != "" && !isLocal(o.target) {
		// C13: anyone who sees the token can use it.
		return nil, fmt.Errorf("the token would go to %s unencrypted", o.target)
	}
	settings := []grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		// C11.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 10 * time.Second}),
		// The channel's default backoff grows to two minutes: a restarted server would seem down.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: time.Second,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
		// C6: gRPC itself must not retry; `call` decides which calls may be retried.
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
	}
	if isLocal(o.target) {
		// C13: a proxy from the environment may be on another machine.
		settings = append(settings, grpc.WithNoProxy())
	}
	channel, err := grpc.NewClient(o.target, settings...)
	if err != nil {
		return nil, err
	}
	return &connection{
		runs:     pb.NewRunServiceClient(channel),
		sessions: pb.NewSessionServiceClient(channel),
		token:    token,
		timeout:  o.timeout,
	}, nil
}

// isLocal reports whether a target is certainly on this machine. Other names may resolve to any machine.
func isLocal(target string) bool {
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		return false
	}
	ip := net.ParseIP(host)
	return strings.EqualFold(host, "localhost") || (ip != nil && ip.IsLoopback())
}

// outgoing adds the token to a call.
func (c *connection) outgoing(ctx context.Context) context.Context {
	if c.token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
}

// call makes a call, and retries it after failures that mayRepeat accepts, all within one deadline
// (C2, C3). An interrupt ends a backoff but not the current call: a run accepted after its own cancel
// would stay active.
func call[Request, Response any](
	ctx context.Context,
	c *connection,
	method func(context.Context, *Request, ...grpc.CallOption) (*Response, error),
	request *Request,
	mayRepeat func(*failure) bool,
) (*Response, error) {
	whole, stop := context.WithTimeout(context.WithoutCancel(ctx), c.timeout)
	defer stop()
	deadline, _ := whole.Deadline()
	var pauses pauses
	for {
		response, err := method(c.outgoing(whole), request)
		if err == nil {
			return response, nil
		}
		f := failureOf(err)
		pause := pauses.next(f)
		if !mayRepeat(f) || time.Now().Add(pause).After(deadline) {
			return nil, f
		}
		if err := sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// stream describes a server stream that is read over as many calls as necessary.
type stream[Message any] struct {
	open    func(context.Context) (grpc.ServerStreamingClient[Message], error)
	deal    func(*Message) (done bool, err error)
	lost    func(*failure) error // returns an error if the stream must not be reopened
	silence time.Duration        // timeout of a call without messages; 0: none
}

// resumed processes the messages of a stream until deal is done.
func resumed[Message any](ctx context.Context, s stream[Message]) error {
	var pauses pauses
	for {
		dealt, done, err := s.once(ctx)
		var f *failure
		if done || ctx.Err() != nil || !errors.As(err, &f) {
			return err
		}
		// No busy loop if the server breaks every call after its first message.
		if dealt > 1 {
			pauses.reset()
		}
		if err := s.lost(f); err != nil {
			return err
		}
		if err := sleep(ctx, pauses.next(f)); err != nil {
			return err
		}
	}
}

// once reads one call to its end. An error of the call is a failure; any other error is not.
func (s stream[Message]) once(ctx context.Context) (dealt int, done bool, err error) {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	silent := &failure{code: codes.Unavailable, message: "the server said nothing for too long"}
	if s.silence > 0 {
		// C11.
		watchdog := time.AfterFunc(s.silence, func() { end(silent) })
		defer watchdog.Stop()
		deal := s.deal
		s.deal = func(message *Message) (bool, error) {
			watchdog.Reset(s.silence)
			return deal(message)
		}
	}
	messages, err := s.open(ctx)
	for err == nil {
		var message *Message
		if message, err = messages.Recv(); err == nil {
			dealt++
			if done, err := s.deal(message); done || err != nil {
				return dealt, done, err
			}
		}
	}
	if context.Cause(ctx) == error(silent) {
		return dealt, false, silent
	}
	return dealt, false, failureOf(err)
}

// --- Errors --------------------------------------------------------------------------------------

// failure is a failed call. Decide by its reason, never by its message (C5).
type failure struct {
	code     codes.Code
	reason   string // from the server; empty if the error is not from a Runlane server
	message  string
	metadata map[string]string
	fields   []*errdetails.BadRequest_FieldViolation
	// retryAfter is the delay that the server asks for; nil if it asks for none.
	retryAfter *time.Duration
}

func failureOf(err error) *failure {
	var f *failure
	if errors.As(err, &f) {
		return f
	}
	if errors.Is(err, io.EOF) {
		return &failure{code: codes.Unavailable, message: "the server ended the stream"}
	}
	converted := status.Convert(err)
	f = &failure{code: converted.Code(), message: converted.Message()}
	for _, detail := range converted.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == "runlane" {
				f.reason, f.metadata = detail.Reason, detail.Metadata
			}
		case *errdetails.BadRequest:
			f.fields = detail.FieldViolations
		case *errdetails.RetryInfo:
			after := detail.GetRetryDelay().AsDuration()
			f.retryAfter = &after
		}
	}
	return f
}

// name is the reason, or the status if there is none.
func (f *failure) name() string {
	if f.reason != "" {
		return f.reason
	}
	// The canonical names; codes.Code spells them differently.
	names := map[codes.Code]string{
		codes.Canceled: "CANCELLED", codes.Unknown: "UNKNOWN",
		codes.InvalidArgument: "INVALID_ARGUMENT", codes.DeadlineExceeded: "DEADLINE_EXCEEDED",
		codes.NotFound: "NOT_FOUND", codes.AlreadyExists: "ALREADY_EXISTS",
		codes.PermissionDenied: "PERMISSION_DENIED", codes.ResourceExhausted: "RESOURCE_EXHAUSTED",
		codes.FailedPrecondition: "FAILED_PRECONDITION", codes.Aborted: "ABORTED",
		codes.OutOfRange: "OUT_OF_RANGE", codes.Unimplemented: "UNIMPLEMENTED",
		codes.Internal: "INTERNAL", codes.Unavailable: "UNAVAILABLE", codes.DataLoss: "DATA_LOSS",
		codes.Unauthenticated: "UNAUTHENTICATED",
	}
	return names[f.code]
}

func (f *failure) Error() string { return f.name() + ": " + f.message }

// mayPass reports whether a retry may succeed (C3, C4).
func (f *failure) mayPass() bool {
	return f.code == codes.Unavailable || (f.code == codes.ResourceExhausted && f.retryAfter != nil)
}

// serverDidNothing reports whether the call certainly had no effect, and a retry may succeed (C6).
func (f *failure) serverDidNothing() bool {
	return f.reason == "DRAINING" || (f.code == codes.ResourceExhausted && f.mayPass())
}

// reconnecting reports a lost stream; it returns the failure if the stream must not be reopened.
func reconnecting(f *failure) error {
	if !f.mayPass() {
		return f
	}
	logf("reconnecting %s", f.name())
	return nil
}

// report prints an error, and returns the exit code for it.
func report(err error) int {
	logf("%s", err)
	var f *failure
	if !errors.As(err, &f) {
		return wrong // such as a file that cannot be written
	}
	for _, field := range f.fields {
		logf("  %s: %s", field.Field, field.Description)
	}
	if f.code == codes.Unavailable || f.code == codes.DeadlineExceeded {
		return unanswered
	}
	return refused
}

// pauses implements exponential backoff up to two seconds, with jitter, so that the clients of a server
// do not all return at once (C3).
type pauses struct{ last time.Duration }

func (p *pauses) next(f *failure) time.Duration {
	p.last = min(max(2*p.last, 100*time.Millisecond), 2*time.Second)
	pause := p.last / 2
	if chance, err := rand.Int(rand.Reader, big.NewInt(int64(p.last/2))); err == nil {
		pause += time.Duration(chance.Int64())
	}
	if f.retryAfter != nil {
		pause = max(pause, *f.retryAfter) // C4
	}
	return pause
}

func (p *pauses) reset() { p.last = 0 }

func sleep(ctx context.Context, pause time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(pause):
		return nil
	}
}

// --- The command line ----------------------------------------------------------------------------

type options struct {
	words       []string // such as SESSION and PROMPT
	target      string
	timeout     time.Duration
	runID       string
	maxAttempts int32
	answer      string
	cursorFile  string
	count       int
	silence     time.Duration
}

type command struct {
	do       func(context.Context, *connection, options) (int, error)
	words    int
	optional int // of these words
}

// parse reads the arguments; options may precede or follow the words.
func parse(args []string) (command, options, error) {
	commands := map[string]command{
		"run": {run, 2, 0}, "cancel": {cancel, 1, 0}, "watch": {watch, 0, 0},
		"session": {session, 1, 0}, "edit": {edit, 2, 0}, "fork": {fork, 2, 1},
	}
	if len(args) == 0 {
		return command{}, options{}, errors.New("a command is missing")
	}
	chosen, found := commands[args[0]]
	if !found {
		return command{}, options{}, fmt.Errorf("there is no command %s", args[0])
	}
	o := options{timeout: 10 * time.Second, silence: 45 * time.Second}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&o.target, "target", "127.0.0.1:50051", "")
	flags.Func("timeout", "", seconds(&o.timeout))
	switch args[0] {
	case "run":
		flags.Func("max-attempts", "", func(text string) error {
			number, err := strconv.ParseInt(text, 10, 32)
			o.maxAttempts = int32(number)
			return err
		})
		flags.StringVar(&o.answer, "answer", "", "")
		fallthrough
	case "cancel":
		flags.StringVar(&o.runID, "run-id", "", "")
	case "watch", "session":
		flags.StringVar(&o.cursorFile, "cursor-file", "", "")
		flags.IntVar(&o.count, "count", 0, "")
		flags.Func("silence", "", seconds(&o.silence))
	}
	for rest := args[1:]; len(rest) > 0; {
		if err := flags.Parse(rest); err != nil {
			return chosen, o, err
		}
		if rest = flags.Args(); len(rest) > 0 {
			o.words, rest = append(o.words, rest[0]), rest[1:]
		}
	}
	if len(o.words) > chosen.words || len(o.words) < chosen.words-chosen.optional {
		return chosen, o, fmt.Errorf("%s takes %d words, not %d", args[0], chosen.words, len(o.words))
	}
	return chosen, o, nil
}

// seconds parses a positive number of seconds.
func seconds(into *time.Duration) func(string) error {
	return func(text string) error {
		number, err := strconv.ParseFloat(text, 64)
		if err != nil || !(number > 0 && number < 1e9) {
			return fmt.Errorf("%s is not a number of seconds", text)
		}
		*into = time.Duration(number * float64(time.Second))
		return nil
	}
}

func stateName(state pb.RunState) string {
	return strings.TrimPrefix(state.String(), "RUN_STATE_")
}

func reasonName(reason pb.FinishReason) string {
	return strings.TrimPrefix(reason.String(), "FINISH_REASON_")
}

func logf(format string, values ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", values...)
}

// perform executes the command, and returns the exit code.
func perform(args []string) int {
	chosen, o, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Print(usage)
		return completed
	}
	if err != nil {
		logf("%s\n%s", err, usage)
		return wrong
	}
	if args[0] == "run" && o.runID == "" {
		o.runID = uuid.Must(uuid.NewV7()).String() // C1
	}
	c, err := connect(o)
	if err != nil {
		logf("%s", err)
		return wrong
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	// A second Ctrl-C ends the program without waiting for anything.
	context.AfterFunc(ctx, stop)
	code, err := chosen.do(ctx, c, o)
	var f *failure
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.As(err, &f) && f.code == codes.Canceled) {
		return interrupted
	}
	if err != nil {
		code = report(err)
	}
	if ctx.Err() != nil {
		return interrupted
	}
	return code
}

func main() {
	os.Exit(perform(os.Args[1:]))
}
