// Package worker executes runs of a Runlane server in this process.
//
//	w := worker.Worker{Agents: map[string]worker.Agent{"default": answer}, Slots: 8}
//	err := w.Run(ctx)
//
// It does what the page docs/workers.md asks of a worker; the numbers W1 to W14 stand in the comments.
package worker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "runlane.example/gen/go/runlane/worker/v1"
)

// DefaultServer is where a server listens by default.
const DefaultServer = "127.0.0.1:50051"

const (
	maxMessage      = 4<<20 + 64<<10
	handBackTimeout = 5 * time.Second
)

var loopback = regexp.MustCompile(`^(localhost|127(\.\d+){3}|\[::1\]):\d+$`)

// An Agent answers a turn. It returns soon after ctx is done: the run was cancelled, or taken away. An
// error that it returns fails the run, unless the turn was stopped.
type Agent func(ctx context.Context, turn *Turn) error

// An Error fails a run with a reason of the agent's own, such as MODEL_UNAVAILABLE.
type Error struct {
	Reason  string
	Message string
}

func (e *Error) Error() string { return e.Message }

// A Worker executes runs of the agents that a server declares as `worker`.
type Worker struct {
	// Servers are the addresses of one or more nodes of the same store; the default is DefaultServer.
	Servers []string
	// Agents by name; `default` is the agent of a server with one.
	Agents map[string]Agent
	// Slots is the number of runs that are executed at a time; the default is 1.
	Slots int
	// Token needs the role work. It is sent to another machine only with Credentials.
	Token string
	// Credentials for TLS; nil means plaintext.
	Credentials credentials.TransportCredentials
	// Drain is how long active runs may continue after the end of the context, before the worker gives
	// them back.
	Drain time.Duration
	// Name of the worker in the logs of the server; the default has the host and the process.
	Name string
}

// Run executes runs until ctx is done, and then gives back what is left after Drain. It returns an error
// if the server refuses the worker, for example because it does not declare an agent.
func (w *Worker) Run(ctx context.Context) error {
	clients, hangUp, err := w.connect()
	if err != nil {
		return err
	}
	defer hangUp()
	slots := make([]*slot, max(1, w.Slots))
	serving, failed := sync.WaitGroup{}, make(chan error, len(slots))
	for n := range slots {
		slots[n] = newSlot(w, clients, n)
		serving.Add(1)
		go func() {
			defer serving.Done()
			if err := slots[n].serve(); err != nil {
				failed <- err
			}
		}()
	}
	ended := make(chan struct{})
	go func() { serving.Wait(); close(ended) }()
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	for _, each := range slots {
		each.stop()
	}
	select {
	case <-ended:
	case <-time.After(w.Drain):
		for _, each := range slots {
			each.handBack()
		}
		select {
		case <-ended:
		case <-time.After(handBackTimeout):
		}
	}
	return err
}

func (w *Worker) connect() ([]pb.WorkerServiceClient, func(), error) {
	if len(w.Agents) == 0 {
		return nil, nil, errors.New("Agents: is empty; name the agents that this worker executes")
	}
	servers := w.Servers
	if len(servers) == 0 {
		servers = []string{DefaultServer}
	}
	secure := w.Credentials
	if secure == nil {
		secure = insecure.NewCredentials()
	}
	// By default, grpc waits up to two minutes between attempts to connect: longer than the worker lease (W8).
	wait := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: maxPause}
	var conns []*grpc.ClientConn
	hangUp := func() {
		for _, conn := range conns {
			conn.Close()
		}
	}
	var clients []pb.WorkerServiceClient
	for _, server := range servers {
		if w.Token != "" && w.Credentials == nil && !loopback.MatchString(server) {
			hangUp()
			return nil, nil, fmt.Errorf("Token is not sent to %s: the connection is not encrypted; set Credentials", server)
		}
		conn, err := grpc.NewClient(server,
			grpc.WithTransportCredentials(secure),
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: wait, MinConnectTimeout: 5 * time.Second}),
			grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
			grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage))) // W1
		if err != nil {
			hangUp()
			return nil, nil, err
		}
		conns = append(conns, conn)
		clients = append(clients, pb.NewWorkerServiceClient(conn))
	}
	return clients, hangUp, nil
}

func (w *Worker) name() string {
	if w.Name != "" {
		return w.Name
	}
	host, _ := os.Hostname()
	return fmt.Sprintf("%s:%d", host, os.Getpid())
}
