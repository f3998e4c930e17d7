package worker

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	v1 "runlane.example/gen/go/runlane/v1"
	pb "runlane.example/gen/go/runlane/worker/v1"
)

const (
	maxEvents    = 1000    // in an emit
	maxEmitBytes = 1 << 20 // unless a single event is larger
)

// An attempt is a turn in hand. It outlives the connection. The lock of its slot guards it.
type attempt struct {
	slot *slot
	turn *pb.WorkResponse_Turn
	stop context.CancelFunc

	isStopped  bool // a cancel, or the attempt is over
	isOver     bool // the server has confirmed the end, or has taken the attempt away
	isReturned bool // the agent has returned

	waiting  []*pb.Event // not acknowledged (W4)
	acked    int64
	sent     int64 // on this connection
	everSent int64 // the last event that must stay as it is (W3)

	isSynced bool // whether the server knows the attempt on this connection
	isBegun  bool
	urgent   int
	requests []*request
	asked    map[string]int

	foldNumber int64
	folded     []*pb.WorkResponse_FoldedPrompt
	foldedRuns []string
	history    []*v1.Message

	finish  *pb.WorkRequest_Finish
	end     *pb.WorkRequest
	endSent bool
}

// A request waits for an answer of the server. Each new connection sends it again.
type request struct {
	name    string
	message *pb.WorkRequest
	isSent  bool
	isDone  bool
	answer  any
}

func (s *slot) newAttempt(turn *pb.WorkResponse_Turn) *attempt {
	ctx, stop := context.WithCancel(context.Background())
	a := &attempt{
		slot: s, turn: turn, stop: stop, isSynced: true, asked: map[string]int{}, finish: &pb.WorkRequest_Finish{},
	}
	go a.execute(ctx, s.worker.Agents[turn.Agent])
	return a
}

// --- The agent

func (a *attempt) execute(ctx context.Context, agent Agent) {
	err := call(ctx, agent, &Turn{a.turn, a})
	reason, message := explain(err)
	a.slot.mu.Lock()
	defer a.slot.changed()
	a.isReturned = true
	if a.end != nil { // it is given back
		return
	}
	a.finish.Number = a.last()
	if err == nil || a.isStopped { // W6
		a.end = validated(&pb.WorkRequest{Message: &pb.WorkRequest_Finish_{Finish: a.finish}})
		return
	}
	fail := &pb.WorkRequest_Fail{Number: a.last(), Usage: a.finish.Usage, Model: a.finish.Model, Reason: reason, Message: message}
	a.end = validated(&pb.WorkRequest{Message: &pb.WorkRequest_Fail_{Fail: fail}})
}

// call fails the run, and not the worker, if the agent panics.
func call(ctx context.Context, agent Agent, turn *Turn) (err error) {
	defer func() {
		if cause := recover(); cause != nil {
			err = fmt.Errorf("panic: %v", cause)
		}
	}()
	return agent(ctx, turn)
}

// explain tells why an agent failed. The methods of its error are its own code, and may panic, as those of a
// nil pointer do.
func explain(err error) (reason, message string) {
	defer func() {
		if cause := recover(); cause != nil {
			message = cut(fmt.Sprintf("%T: its text cannot be told: %v", err, cause))
		}
	}()
	if err == nil {
		return "", ""
	}
	var own *Error
	if errors.As(err, &own) {
		reason = own.Reason
	}
	return reason, cut(err.Error())
}

func (a *attempt) report(change func(*pb.WorkRequest_Finish)) {
	a.slot.mu.Lock()
	defer a.slot.mu.Unlock()
	change(a.finish)
}

func (a *attempt) last() int64 { return a.acked + int64(len(a.waiting)) }

// emit adds an event, or joins a text with the last one that was not sent (W3); returns its number.
func (a *attempt) emit(event *pb.Event) (int64, error) {
	a.slot.mu.Lock()
	defer a.slot.changed()
	for len(a.waiting) >= max(1, int(a.turn.Window)) && !a.isStopped { // W4
		a.slot.wait()
	}
	if a.isStopped {
		return 0, context.Canceled
	}
	if n := len(a.waiting); n > 0 && a.last() > a.everSent {
		if joined := join(a.waiting[n-1], event); joined != nil {
			a.waiting[n-1] = joined
			return a.last(), nil
		}
	}
	a.waiting = append(a.waiting, event)
	return a.last(), nil
}

func join(first, second *pb.Event) *pb.Event {
	text, reasoning := first.GetTextDelta()+second.GetTextDelta(), first.GetReasoningDelta()+second.GetReasoningDelta()
	switch {
	case first.GetTextDelta() != "" && second.GetTextDelta() != "" && len(text) <= maxText:
		return &pb.Event{Event: &pb.Event_TextDelta{TextDelta: text}}
	case first.GetReasoningDelta() != "" && second.GetReasoningDelta() != "" && len(reasoning) <= maxText:
		return &pb.Event{Event: &pb.Event_ReasoningDelta{ReasoningDelta: reasoning}}
	}
	return nil
}

func (a *attempt) untilDurable(number int64) error {
	a.slot.mu.Lock()
	defer a.slot.changed()
	a.urgent++
	a.slot.cond.Broadcast()
	for a.acked < number && !a.isStopped {
		a.slot.wait()
	}
	a.urgent--
	if a.acked < number {
		return context.Canceled
	}
	return nil
}

// ask sends a message and waits for its answer. A request that is open is not sent twice.
func (a *attempt) ask(name string, message *pb.WorkRequest) (any, error) {
	a.slot.mu.Lock()
	defer a.slot.changed()
	found := a.find(name)
	if found == nil {
		found = &request{name: name, message: message}
		a.requests = append(a.requests, found)
		a.slot.cond.Broadcast()
	}
	for !found.isDone && !a.isStopped {
		a.slot.wait()
	}
	if !found.isDone {
		return nil, context.Canceled
	}
	return found.answer, nil
}

func (a *attempt) find(name string) *request {
	for _, one := range a.requests {
		if one.name == name {
			return one
		}
	}
	return nil
}

func (a *attempt) answer(name string, value any) {
	for n, one := range a.requests {
		if one.name == name {
			one.answer, one.isDone = value, true
			a.requests = append(a.requests[:n:n], a.requests[n+1:]...)
			return
		}
	}
}

func (a *attempt) takeFolded() ([]*pb.WorkResponse_FoldedPrompt, error) {
	a.slot.mu.Lock()
	a.foldNumber++
	take := &pb.WorkRequest_TakeFolded{Number: a.foldNumber}
	a.slot.mu.Unlock()
	message := &pb.WorkRequest{Message: &pb.WorkRequest_TakeFolded_{TakeFolded: take}}
	if _, err := a.ask("folded", message); err != nil {
		return nil, err
	}
	a.slot.mu.Lock()
	defer a.slot.mu.Unlock()
	taken := a.folded
	a.folded = nil
	return taken, nil
}

// --- The connection; the slot holds its lock

// cancel stops the agent (W6).
func (a *attempt) cancel() {
	a.isStopped = true
	a.requests = nil
	a.stop()
}

// handBack stops the agent, and gives the turn back once it has returned (W10).
func (a *attempt) handBack() {
	if a.end == nil {
		a.end = &pb.WorkRequest{Message: &pb.WorkRequest_HandBack_{HandBack: &pb.WorkRequest_HandBack{}}}
		a.waiting = a.waiting[:a.sent-a.acked]
		a.cancel()
	}
}

func (a *attempt) take(response *pb.WorkResponse) {
	switch message := response.Message.(type) {
	case *pb.WorkResponse_Acked_:
		a.onAcked(message.Acked)
	case *pb.WorkResponse_Folded_:
		for _, one := range message.Folded.Prompts {
			a.folded = append(a.folded, one)
			a.foldedRuns = append(a.foldedRuns, one.RunId)
		}
		if message.Folded.Number > 0 {
			a.answer("folded", nil)
		}
	case *pb.WorkResponse_History_:
		a.history = append(a.history, message.History.Messages...)
		if message.History.Last {
			a.answer("history", a.history)
			a.history = nil
		}
	case *pb.WorkResponse_Step_:
		a.answer("step "+message.Step.Key, message.Step)
	case *pb.WorkResponse_Answers_:
		name, answers := "ask", []*v1.InputAnswer{}
		for n, one := range message.Answers.Answers {
			name += map[bool]string{true: " ", false: "\n"}[n == 0] + one.Key
			answers = append(answers, one.Answer)
		}
		a.answer(name, answers)
	case *pb.WorkResponse_Cancel_:
		a.cancel()
	case *pb.WorkResponse_Fenced_, *pb.WorkResponse_Parked_: // W7, W13
		a.isOver = true
		a.cancel()
	}
}

func (a *attempt) onAcked(acked *pb.WorkResponse_Acked) {
	if n := acked.Number - a.acked; n > 0 {
		a.waiting, a.acked = a.waiting[min(n, int64(len(a.waiting))):], acked.Number
	}
	a.isOver = a.isOver || acked.Ended
	if a.isSynced {
		return
	}
	// W8: continue after the last durable event.
	a.isSynced, a.isBegun, a.sent, a.endSent, a.history = true, true, a.acked, false, nil
	for _, one := range a.requests {
		one.isSent = false
	}
}

// next is the next message to send, if there is one. One emit at a time: what comes meanwhile is joined (W3).
func (a *attempt) next() *pb.WorkRequest {
	if !a.isSynced || a.isOver {
		return nil
	}
	if !a.isBegun { // W2
		a.isBegun = true
		return &pb.WorkRequest{Message: &pb.WorkRequest_Begun_{Begun: &pb.WorkRequest_Begun{}}}
	}
	unsent := a.unsentRequest()
	isUrgent := a.end != nil || a.urgent > 0 || unsent != nil
	if a.last() > a.sent && (isUrgent || a.sent == a.acked) {
		return a.emitRequest()
	}
	if unsent != nil {
		unsent.isSent = true
		return unsent.message
	}
	if a.end != nil && a.isReturned && !a.endSent { // W5
		a.endSent = true
		return a.end
	}
	return nil
}

func (a *attempt) unsentRequest() *request {
	for _, one := range a.requests {
		if !one.isSent {
			return one
		}
	}
	return nil
}

func (a *attempt) emitRequest() *pb.WorkRequest {
	emit, size := &pb.WorkRequest_Emit{Number: a.sent + 1}, 0
	for _, event := range a.waiting[a.sent-a.acked:] {
		size += proto.Size(event)
		if len(emit.Events) > 0 && (size > maxEmitBytes || len(emit.Events) == maxEvents) {
			break
		}
		emit.Events = append(emit.Events, event)
	}
	a.sent += int64(len(emit.Events))
	a.everSent = max(a.everSent, a.sent)
	return &pb.WorkRequest{Message: &pb.WorkRequest_Emit_{Emit: emit}}
}

func (a *attempt) resume() *pb.WorkRequest_Resume {
	return &pb.WorkRequest_Resume{
		RunId: a.turn.RunId, Tenant: a.turn.Tenant, Attempt: a.turn.Attempt, Fence: a.turn.Fence,
		Acknowledged: a.acked, FoldedRunIds: a.foldedRuns,
	}
}

// cut shortens the message of an error to what the server takes.
func cut(message string) string {
	const limit = 2048
	runes := []rune(message)
	return string(runes[:min(len(runes), limit)])
}
