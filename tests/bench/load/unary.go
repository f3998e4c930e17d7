package main

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Numbers hands out what goes into the templates.
type Numbers struct {
	job  *Job
	next atomic.Int64
}

// stride is prime: it goes through all sessions in an order that no cache of the server likes.
const stride = 7919

func (n *Numbers) take() (ticket, number int) {
	ticket = int(n.next.Add(1)) - 1
	if n.job.Sessions > 0 {
		return ticket, n.job.First + ticket*stride%n.job.Sessions
	}
	return ticket, n.job.First + ticket
}

// unary makes calls from many callers, and measures how many and how long each.
func unary(job *Job, connections *Connections) map[string]any {
	call := template(job.Call, job.Prefix)
	return measure(job, func() func(int) error {
		connection := connections.one()
		return func(number int) error { return call.call(connection, number) }
	})
}

// measure starts callers, each with its own function, which makes the call with a number.
func measure(job *Job, caller func() func(int) error) map[string]any {
	numbers := &Numbers{job: job}
	var measuring, over atomic.Bool
	var failed atomic.Int64
	var firstError atomic.Value
	measuring.Store(job.Count > 0)
	taken := make([][]int64, job.Concurrency)
	var callers sync.WaitGroup
	begun := time.Now()
	for w := range job.Concurrency {
		callers.Go(func() {
			call := caller()
			for !over.Load() {
				ticket, number := numbers.take()
				if job.Count > 0 && ticket >= job.Count {
					return
				}
				from := time.Now()
				if job.Rate > 0 {
					// A late start counts as waiting: the caller was there on time.
					from = begun.Add(seconds(float64(ticket) / job.Rate))
					time.Sleep(time.Until(from))
				}
				if err := call(number); err != nil {
					failed.Add(1)
					firstError.CompareAndSwap(nil, err.Error())
				} else if measuring.Load() && !over.Load() {
					taken[w] = append(taken[w], time.Since(from).Nanoseconds())
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { callers.Wait(); close(done) }()
	elapsed := job.window(done, func() { measuring.Store(true) })
	over.Store(true)
	<-done
	all := slices.Concat(taken...)
	return map[string]any{
		"count": len(all), "seconds": elapsed.Seconds(), "errors": failed.Load(),
		"error": firstError.Load(), "latency": quantiles(all),
	}
}

// quantiles are in seconds.
func quantiles(nanoseconds []int64) map[string]float64 {
	if len(nanoseconds) == 0 {
		return map[string]float64{}
	}
	slices.Sort(nanoseconds)
	at := func(share float64) float64 {
		return float64(nanoseconds[int(share*float64(len(nanoseconds)-1))]) / 1e9
	}
	return map[string]float64{"p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "max": at(1)}
}
