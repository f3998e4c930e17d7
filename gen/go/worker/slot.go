package worker

import (
	"context"
	"errors"
	"io"
	"log"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "runlane.example/gen/go/runlane/worker/v1"
)

const maxPause = 2 * time.Second

var errEnded = errors.New("the server ended the call")

// A slot executes one run at a time (W1). Its lock guards the attempt, too.
type slot struct {
	worker  *Worker
	clients []pb.WorkerServiceClient // the first one is used; the next one after a failure
	agents  []string

	mu   sync.Mutex
	cond *sync.Cond

	attempt     *attempt
	isConnected bool
	wasServed   bool // on this connection
	hasOffered  bool
	hasTaken    bool // back the offer
	isStopping  bool
}

func newSlot(worker *Worker, clients []pb.WorkerServiceClient, number int) *slot {
	first := number % len(clients)
	s := &slot{worker: worker}
	s.clients = append(append(s.clients, clients[first:]...), clients[:first]...)
	s.cond = sync.NewCond(&s.mu)
	for name := range worker.Agents {
		s.agents = append(s.agents, name)
	}
	return s
}

// wait waits for a change; the caller holds the lock.
func (s *slot) wait() { s.cond.Wait() }

// changed reports a change and releases the lock.
func (s *slot) changed() {
	s.cond.Broadcast()
	s.mu.Unlock()
}

// stop makes serve return once the attempt has ended.
func (s *slot) stop() {
	s.mu.Lock()
	defer s.changed()
	s.isStopping = true
}

// handBack gives the attempt back.
func (s *slot) handBack() {
	s.mu.Lock()
	defer s.changed()
	if s.attempt != nil {
		s.attempt.handBack()
	}
}

// serve executes runs, over one connection after the other.
func (s *slot) serve() error {
	pause := 100 * time.Millisecond
	for {
		err := s.connect()
		if s.isDone() {
			return nil
		}
		switch status.Code(err) {
		case codes.InvalidArgument, codes.NotFound, codes.PermissionDenied, codes.Unauthenticated, codes.Unimplemented:
			return err // W11
		}
		if s.wasServed {
			pause = 100 * time.Millisecond
		}
		log.Printf("reconnecting: %v", err)
		s.clients = append(s.clients[1:], s.clients[0])
		time.Sleep(pause) // W8
		pause = min(2*pause, maxPause)
	}
}

func (s *slot) isDone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.isStopping && (s.attempt == nil || s.attempt.isOver && s.attempt.isReturned)
}

// connect serves over one connection.
func (s *slot) connect() error {
	ctx, hangUp := context.WithCancel(context.Background())
	defer hangUp()
	if s.worker.Token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+s.worker.Token)
	}
	stream, err := s.clients[0].Work(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.isConnected, s.wasServed, s.hasOffered, s.hasTaken = true, false, false, false
	if s.attempt != nil {
		s.attempt.isSynced = false
	}
	s.mu.Unlock()
	written := make(chan struct{})
	go func() { defer close(written); s.write(stream) }()
	defer func() {
		s.mu.Lock()
		s.isConnected = false
		s.changed()
		hangUp()
		<-written
	}()
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errEnded
		}
		if err != nil {
			return err
		}
		s.take(response)
	}
}

// write sends what is due until the connection is lost, which the reader reports.
func (s *slot) write(stream pb.WorkerService_WorkClient) {
	for {
		message := s.next()
		if message == nil {
			_ = stream.CloseSend()
			return
		}
		if stream.Send(message) != nil {
			return
		}
	}
}

// next waits for the next message to send; nil at the end of the connection or of the slot.
func (s *slot) next() *pb.WorkRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.isConnected {
		if a := s.attempt; a != nil && a.isOver && a.isReturned {
			s.attempt, s.hasOffered = nil, false
		}
		isIdle := s.attempt == nil && s.isStopping
		if isIdle && !s.hasOffered {
			return nil
		}
		if !s.hasOffered && !(s.attempt != nil && s.attempt.isOver) {
			s.hasOffered = true
			return s.offer()
		}
		if isIdle && !s.hasTaken { // W10
			s.hasTaken = true
			return &pb.WorkRequest{Message: &pb.WorkRequest_HandBack_{HandBack: &pb.WorkRequest_HandBack{}}}
		}
		if s.attempt != nil {
			if message := s.attempt.next(); message != nil {
				return message
			}
		}
		s.wait()
	}
	return nil
}

func (s *slot) offer() *pb.WorkRequest {
	offer := &pb.WorkRequest_Offer{Agents: s.agents, WorkerId: s.worker.name(), ProtocolVersion: 1}
	if s.attempt != nil {
		offer.Resume = s.attempt.resume()
	}
	return &pb.WorkRequest{Message: &pb.WorkRequest_Offer_{Offer: offer}}
}

func (s *slot) take(response *pb.WorkResponse) {
	s.mu.Lock()
	defer s.changed()
	s.wasServed = true
	if s.hasTaken { // A turn that came at the same time goes back.
		if response.GetAcked().GetEnded() {
			s.hasOffered = false
		}
		return
	}
	if turn := response.GetTurn(); turn != nil {
		s.attempt = s.newAttempt(turn)
	} else if s.attempt != nil {
		s.attempt.take(response)
	}
}
