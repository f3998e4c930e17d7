package main

import (
	"sync/atomic"
	"time"
)

// cancel starts runs, gives them time to become active, and cancels one after another: each time
// from before the cancel is sent to when a subscriber has the terminal event.
func cancel(job *Job, connections *Connections) map[string]any {
	accept, watch := template(job.Call, job.Prefix), template(job.Watch, job.Prefix)
	stop := template(job.Cancel, job.Prefix)
	prefix := []byte(job.Prefix)
	ended := make(chan int, job.Count)
	go follow(watching(watch, connections.one(), job.First), func(message []byte) {
		if number := numberIn(message, prefix); number >= 0 {
			ended <- number
		}
	})
	connection := connections.one()
	check(unaries(job, connections, accept))
	time.Sleep(seconds(job.Pause))
	mark("begin")
	begin := time.Now()
	var taken []int64
	for n := range job.Count {
		from := time.Now()
		receipt := make(chan error, 1)
		go func() { receipt <- stop.call(connection, job.First+n) }()
		for number := range ended {
			if number == job.First+n {
				break
			}
		}
		taken = append(taken, time.Since(from).Nanoseconds())
		check(<-receipt)
	}
	elapsed := time.Since(begin)
	mark("end")
	return map[string]any{
		"count": len(taken), "seconds": elapsed.Seconds(), "errors": 0, "latency": quantiles(taken),
	}
}

// burst has runs waiting, cancels them all at a stroke, and measures until all streams have all
// terminal events.
func burst(job *Job, connections *Connections) map[string]any {
	accept, watch := template(job.Call, job.Prefix), template(job.Watch, job.Prefix)
	stop := template(job.Cancel, job.Prefix)
	prefix := []byte(job.Prefix)
	all := int64(job.Streams) * int64(job.Count)
	done := make(chan struct{})
	var seen atomic.Int64
	for range job.Streams {
		go follow(watching(watch, connections.one(), job.First), func(message []byte) {
			if numberIn(message, prefix) >= 0 && seen.Add(1) == all {
				close(done)
			}
		})
	}
	check(unaries(job, connections, accept))
	elapsed := job.window(done, func() {
		go func() { check(stop.call(connections.one(), 0)) }()
	})
	return map[string]any{"count": all, "seconds": elapsed.Seconds(), "errors": 0}
}

// unaries makes as many calls as the job counts.
func unaries(job *Job, connections *Connections, call *Template) error {
	results := make(chan error, job.Concurrency)
	for w := range job.Concurrency {
		go func() {
			connection := connections.one()
			for n := w; n < job.Count; n += job.Concurrency {
				if err := call.call(connection, job.First+n); err != nil {
					results <- err
					return
				}
			}
			results <- nil
		}()
	}
	for range job.Concurrency {
		if err := <-results; err != nil {
			return err
		}
	}
	return nil
}
