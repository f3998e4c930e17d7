// Package runlanetest starts a Runlane server for a test.
//
//	server := runlanetest.Start(t)
//	runs := pb.NewRunServiceClient(server.Conn)
//
// The server is the command runlane-server on the PATH, or the one that RUNLANE_SERVER_COMMAND names.
package runlanetest

import (
	"bufio"
	"bytes"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 10 * time.Second
	listening    = " listening on "
)

// Server is a server that runs until the end of its test.
type Server struct {
	// Address is the host and port of the server.
	Address string
	// Conn is a connection to it.
	Conn *grpc.ClientConn
}

// Start starts a server with a store in memory, the scripted agent and the harness, on a free port. Further
// arguments are those of runlane-server, such as "--agent", "echo". The log of the server is shown if the test fails.
func Start(t testing.TB, arguments ...string) *Server {
	t.Helper()
	command := exec.Command(program(), withDefaults(arguments)...)
	command.Env = environment()
	var log bytes.Buffer
	command.Stderr = &log
	stdout, err := command.StdoutPipe()
	if err == nil {
		err = command.Start()
	}
	if err != nil {
		t.Fatalf("runlane-server: %v; install it with: pip install 'runlane[server]', "+
			"or name it in RUNLANE_SERVER_COMMAND", err)
	}
	t.Cleanup(func() { stop(t, command, &log) })

	address := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(stdout).ReadString('\n')
		_, found, _ := strings.Cut(strings.TrimSpace(line), listening)
		address <- found
	}()
	server := &Server{}
	select {
	case server.Address = <-address:
	case <-time.After(startTimeout):
	}
	if server.Address == "" {
		t.Fatalf("runlane-server did not start: see its log below")
	}
	server.Conn, err = grpc.NewClient(server.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = server.Conn.Close() })
	return server
}

func program() string {
	if named := os.Getenv("RUNLANE_SERVER_COMMAND"); named != "" {
		return named
	}
	return "runlane-server"
}

func withDefaults(arguments []string) []string {
	all := []string{"--listen", "127.0.0.1:0", "--store", "memory:", "--harness", "--drain-timeout", "0"}
	if !slices.ContainsFunc(arguments, func(each string) bool { return strings.HasPrefix(each, "--agent") }) {
		all = append(all, "--agent", "scripted")
	}
	return append(all, arguments...)
}

// environment leaves out the settings of another server.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(each string) bool { return strings.HasPrefix(each, "RUNLANE_") })
}

func stop(t testing.TB, command *exec.Cmd, log *bytes.Buffer) {
	ended := make(chan error, 1)
	go func() { ended <- command.Wait() }()
	if command.Process.Signal(syscall.SIGTERM) != nil {
		_ = command.Process.Kill() // Windows has no SIGTERM.
	}
	select {
	case <-ended:
	case <-time.After(stopTimeout):
		_ = command.Process.Kill()
		<-ended
	}
	if t.Failed() {
		t.Logf("the log of runlane-server:\n%s", log.String())
	}
}
