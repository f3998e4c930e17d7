// Command load drives a gRPC server for a benchmark: one job in JSON on stdin, lines of JSON on
// stdout. It sends requests made from templates and looks at no more of an answer than it has to,
// so that it costs less than any server in Python does. `load endpoint` serves a language model.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Job is what there is to do. See load.py, which writes it.
type Job struct {
	Kind        string
	Address     string
	Connections int
	Concurrency int     // calls at a time
	Streams     int     // streams at a time
	Window      int     // runs that were accepted and not yet seen to end, at the most
	Seconds     float64 // how long to measure, after Warmup seconds
	Warmup      float64
	Count       int     // measure so many calls or runs instead, without a warm-up
	Rate        float64 // calls a second, at fixed times; 0: as many as go
	First       int     // the first number that goes into a template
	Sessions    int     // how many different numbers there are; 0: a new one each time
	Prefix      string  // a number follows it, in templates and in terminal events
	Word        string  // count these instead of the messages of streams
	Steps       []int   // how many idle streams to hold, step by step
	Pause       float64 // seconds that runs have to become active
	Call        Call
	Watch       Call
	Cancel      Call
}

// Call is a method and a request, in which numbers are to be filled in.
type Call struct {
	Method  string
	Request []byte // base64 in JSON
}

var (
	stdin  = bufio.NewReader(os.Stdin)
	stdout = json.NewEncoder(os.Stdout)
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "endpoint" {
		endpoint()
	}
	line, err := stdin.ReadBytes('\n')
	check(err)
	var job Job
	check(json.Unmarshal(line, &job))
	kinds := map[string]func(*Job, *Connections) map[string]any{
		"unary": unary, "runs": runs, "streams": streams, "idle": idle, "cancel": cancel,
		"burst": burst, "tokens": tokens, "posts": posts,
	}
	kind, known := kinds[job.Kind]
	if !known {
		check(fmt.Errorf("there is no job %q", job.Kind))
	}
	say(map[string]any{"result": kind(&job, connect(job.Address, job.Connections))})
	// The harness still looks at this process, and ends it.
	_, _ = stdin.ReadBytes('\n')
}

// window waits for the warm-up, calls started, and then measures for as long as the job says, or
// until done.
func (job *Job) window(done <-chan struct{}, started func()) time.Duration {
	if job.Count == 0 {
		time.Sleep(seconds(job.Warmup))
	}
	started()
	mark("begin")
	begin := time.Now()
	if job.Count > 0 {
		<-done
	} else {
		time.Sleep(seconds(job.Seconds))
	}
	elapsed := time.Since(begin)
	mark("end")
	return elapsed
}

// mark tells the harness to look at the CPU time of all sides.
func mark(name string) { say(map[string]any{"mark": name}) }

func say(what any) { check(stdout.Encode(what)) }

func seconds(number float64) time.Duration { return time.Duration(number * float64(time.Second)) }

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}
