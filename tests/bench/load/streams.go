package main

import (
	"bytes"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
)

// runs accepts runs as fast as they end, and counts their terminal events on all streams.
func runs(job *Job, connections *Connections) map[string]any {
	accept, watch := template(job.Call, job.Prefix), template(job.Watch, job.Prefix)
	prefix := []byte(job.Prefix)
	window := make(chan struct{}, job.Window)
	done := make(chan struct{})
	var seen, failed, over atomic.Int64
	var firstError atomic.Value
	for range job.Streams {
		stream := watching(watch, connections.one(), job.First)
		go follow(stream, func(message []byte) {
			if numberIn(message, prefix) < 0 {
				return
			}
			// A run has left the window when every stream has had its event.
			if total := int(seen.Add(1)); total%job.Streams == 0 {
				<-window
				if job.Count == total/job.Streams {
					close(done)
				}
			}
		})
	}
	numbers := &Numbers{job: job}
	for range job.Concurrency {
		go func() {
			connection := connections.one()
			for over.Load() == 0 {
				window <- struct{}{}
				ticket, number := numbers.take()
				if job.Count > 0 && ticket >= job.Count {
					return
				}
				if err := accept.call(connection, number); err != nil {
					failed.Add(1)
					firstError.CompareAndSwap(nil, err.Error())
					<-window
				}
			}
		}()
	}
	elapsed, count := measured(job, &seen, done)
	over.Store(1)
	return map[string]any{
		"count": count, "seconds": elapsed.Seconds(), "errors": failed.Load(),
		"error": firstError.Load(),
	}
}

// streams reads what servers send without being asked. With a call, each stream is of a run of its
// own, and the next one follows when it ends. With a word, it is words that are counted.
func streams(job *Job, connections *Connections) map[string]any {
	call, watch := template(job.Call, job.Prefix), template(job.Watch, job.Prefix)
	numbers := &Numbers{job: job}
	word, prefix := []byte(job.Word), []byte(job.Prefix)
	var seen atomic.Int64
	for range job.Streams {
		go func() {
			connection := connections.one()
			for {
				_, number := numbers.take()
				if call.method != "" {
					check(call.call(connection, number))
				}
				follow(watching(watch, connection, number), func(message []byte) {
					if len(word) == 0 {
						seen.Add(1)
					} else if numberIn(message, prefix) < 0 { // the terminal event has them again
						seen.Add(int64(bytes.Count(message, word)))
					}
				})
			}
		}()
	}
	elapsed, count := measured(job, &seen, nil)
	return map[string]any{"count": count, "seconds": elapsed.Seconds(), "errors": 0}
}

// measured tells how long it took, and how many were seen meanwhile.
func measured(job *Job, seen *atomic.Int64, done <-chan struct{}) (time.Duration, int64) {
	var before int64
	elapsed := job.window(done, func() { before = seen.Load() })
	return elapsed, seen.Load() - before
}

// watching opens a stream. Streams of terminal events begin now, with a mark that says so.
func watching(watch *Template, connection *grpc.ClientConn, number int) grpc.ClientStream {
	stream, err := watch.open(connection, number)
	check(err)
	var first []byte
	check(stream.RecvMsg(&first))
	return stream
}

func follow(stream grpc.ClientStream, each func([]byte)) {
	for {
		var message []byte
		if stream.RecvMsg(&message) != nil {
			return
		}
		each(message)
	}
}

// idle holds streams on which nothing happens, and goes a step further at each line of stdin.
func idle(job *Job, connections *Connections) map[string]any {
	watch := template(job.Watch, job.Prefix)
	open := 0
	for _, step := range job.Steps {
		for ; open < step; open++ {
			go follow(watching(watch, connections.one(), open), func([]byte) {})
		}
		mark("ready")
		_, err := stdin.ReadBytes('\n')
		check(err)
	}
	return map[string]any{"count": open, "seconds": 0, "errors": 0}
}
