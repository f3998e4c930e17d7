package worker

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"strings"
	"unicode/utf8"

	v1 "runlane.example/gen/go/runlane/v1"
	pb "runlane.example/gen/go/runlane/worker/v1"
)

const maxText = 1 << 14 // bytes in an event, and so fewer characters than the limit

// A Turn is the input of an agent, and what it may do: Prompt, SessionId, RunId, Attempt, Attachments and
// Metadata are fields. Its methods may be called by several goroutines. After a cancel they return
// context.Canceled.
type Turn struct {
	*pb.WorkResponse_Turn
	attempt *attempt
}

// Say emits a piece of the answer. It waits while too much of the output is not durable.
func (t *Turn) Say(text string) error {
	return t.emitText(text, func(text string) *pb.Event {
		return &pb.Event{Event: &pb.Event_TextDelta{TextDelta: text}}
	})
}

// Think emits a piece of the model's reasoning.
func (t *Turn) Think(text string) error {
	return t.emitText(text, func(text string) *pb.Event {
		return &pb.Event{Event: &pb.Event_ReasoningDelta{ReasoningDelta: text}}
	})
}

func (t *Turn) emitText(text string, event func(string) *pb.Event) error {
	text = valid(text)
	for len(text) > 0 {
		n := min(len(text), maxText)
		for n < len(text) && !utf8.RuneStart(text[n]) {
			n--
		}
		if _, err := t.attempt.emit(event(text[:n])); err != nil {
			return err
		}
		text = text[n:]
	}
	return nil
}

// CallTool reports that the agent calls a tool; arguments is a JSON object. The id is unique within the turn.
func (t *Turn) CallTool(id, name, arguments string) error {
	return t.Emit(&pb.Event{Event: &pb.Event_ToolCall{
		ToolCall: &v1.ToolCall{ToolCallId: id, Name: name, ArgumentsJson: arguments},
	}})
}

// ToolReturned reports the result of a call.
func (t *Turn) ToolReturned(result *v1.ToolResult) error {
	return t.Emit(&pb.Event{Event: &pb.Event_ToolResult{ToolResult: result}})
}

// Artifact emits an artifact, or a piece of one.
func (t *Turn) Artifact(artifact *v1.Artifact) error {
	return t.Emit(&pb.Event{Event: &pb.Event_Artifact{Artifact: artifact}})
}

// Custom emits an event of a type that the agent defines; the value becomes JSON.
func (t *Turn) Custom(kind string, value any) error {
	content, err := json.Marshal(value)
	if err != nil {
		return err
	}
	return t.Emit(&pb.Event{Event: &pb.Event_Custom{Custom: &v1.RunEvent_Custom{Type: kind, Json: string(content)}}})
}

// Emit emits an event of any kind.
func (t *Turn) Emit(event *pb.Event) error {
	_, err := t.attempt.emit(validated(event))
	return err
}

// SetResult sets the structured result of the run; the value becomes JSON.
func (t *Turn) SetResult(value any) error {
	content, err := json.Marshal(value)
	if err == nil {
		t.attempt.report(func(end *pb.WorkRequest_Finish) { end.ResultJson = string(content) })
	}
	return err
}

// Report sets facts about the turn: the resources used, the model, and why it stopped.
func (t *Turn) Report(usage *v1.Usage, model string, reason v1.FinishReason) {
	t.attempt.report(func(end *pb.WorkRequest_Finish) {
		end.Usage, end.Model, end.FinishReason = usage, model, reason
	})
}

// TakeFolded returns the prompts that wait to join the turn. Call it between two steps: the agent must
// answer them too (W9).
func (t *Turn) TakeFolded() ([]*pb.WorkResponse_FoldedPrompt, error) {
	return t.attempt.takeFolded()
}

// History returns the transcript before the turn, the oldest message first. A long message comes in
// several parts with the same id.
func (t *Turn) History() ([]*v1.Message, error) {
	message := &pb.WorkRequest{Message: &pb.WorkRequest_GetHistory_{GetHistory: &pb.WorkRequest_GetHistory{}}}
	messages, err := t.attempt.ask("history", message)
	if err != nil {
		return nil, err
	}
	return messages.([]*v1.Message), nil
}

// Step does a piece of work once per run, also if an attempt is repeated: it returns the result that an
// earlier attempt has stored, or calls work and makes its result durable before it returns (W12). The
// result is stored as JSON. A key has 1 to 128 bytes.
func Step[T any](t *Turn, key string, work func() (T, error)) (T, error) {
	var result T
	key = valid(key)
	find := &pb.WorkRequest{Message: &pb.WorkRequest_FindStep_{FindStep: &pb.WorkRequest_FindStep{Key: key}}}
	found, err := t.attempt.ask("step "+key, find)
	if err != nil {
		return result, err
	}
	if stored := found.(*pb.WorkResponse_Step); stored.Result != nil {
		return result, json.Unmarshal([]byte(*stored.Result), &result)
	}
	if result, err = work(); err != nil {
		return result, err
	}
	content, err := json.Marshal(result)
	if err != nil {
		return result, err
	}
	event := &pb.Event{Event: &pb.Event_Step{Step: &v1.RunEvent_Step{Key: key, Result: string(content)}}}
	number, err := t.attempt.emit(validated(event))
	if err != nil {
		return result, err
	}
	return result, t.attempt.untilDurable(number)
}

// Ask asks people; the answers come in the order of the questions. If there is no answer yet, it returns
// context.Canceled: the run leaves this worker, and starts again, with any worker, once all is answered
// (W13). What the agent does before happens again, so put what must not be repeated into steps. Without a
// Key, the question itself is the key: the same key gets the same answer, and nobody is asked twice.
func (t *Turn) Ask(questions ...*pb.Question) ([]*v1.InputAnswer, error) {
	asked := make([]*pb.Question, len(questions))
	names := make([]string, len(questions))
	for n, question := range questions {
		asked[n] = validated(question)
		if asked[n].Key == "" {
			asked[n].Key = t.attempt.keyOf(asked[n])
		}
		names[n] = asked[n].Key
	}
	message := &pb.WorkRequest{Message: &pb.WorkRequest_Ask_{Ask: &pb.WorkRequest_Ask{Questions: asked}}}
	answers, err := t.attempt.ask("ask "+strings.Join(names, "\n"), message)
	if err != nil {
		return nil, err
	}
	return answers.([]*v1.InputAnswer), nil
}

// keyOf returns the same key in each attempt that asks the same; equal questions are counted.
func (a *attempt) keyOf(question *pb.Question) string {
	hash := fnv.New128a()
	shown := append([]string{question.Text, question.ToolName, question.ArgumentsJson, question.SchemaJson},
		question.Choices...)
	content, _ := json.Marshal(shown)
	hash.Write(content)
	sum := hash.Sum(nil)
	a.slot.mu.Lock()
	defer a.slot.mu.Unlock()
	a.asked[string(sum)]++
	return fmt.Sprintf("%x-%d", sum, a.asked[string(sum)])
}
