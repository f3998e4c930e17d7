package main

import (
	"bytes"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// reader follows one run after another and keeps what it measured.
type reader struct {
	gaps   []int64 // nanoseconds between two messages with words of one run
	firsts []int64 // nanoseconds from the accept being sent to the first word
	words  int64
}

// tokens holds a number of runs that stream words, each followed live, and measures how evenly the
// words arrive. The runs begin spread over the warm-up, so that they are at different words.
func tokens(job *Job, connections *Connections) map[string]any {
	call, watch := template(job.Call, job.Prefix), template(job.Watch, job.Prefix)
	numbers := &Numbers{job: job}
	var measuring, over atomic.Bool
	readers := make([]*reader, job.Streams)
	var reading sync.WaitGroup
	for n := range readers {
		one := &reader{}
		readers[n] = one
		pause := seconds(job.Warmup * float64(n) / float64(job.Streams))
		reading.Go(func() {
			connection := connections.one()
			time.Sleep(pause)
			for !over.Load() {
				_, number := numbers.take()
				begun, counts := time.Now(), measuring.Load()
				check(call.call(connection, number))
				stream, err := watch.open(connection, number)
				check(err)
				var last time.Time
				follow(stream, func(message []byte) {
					words := int64(bytes.Count(message, []byte(job.Word)))
					if words == 0 || numberIn(message, []byte(job.Prefix)) >= 0 {
						return // the terminal event has all words again
					}
					now := time.Now()
					if last.IsZero() {
						if counts {
							one.firsts = append(one.firsts, now.Sub(begun).Nanoseconds())
						}
					} else if measuring.Load() {
						one.gaps = append(one.gaps, now.Sub(last).Nanoseconds())
					}
					if measuring.Load() {
						one.words += words
					}
					last = now
				})
			}
		})
	}
	elapsed := job.window(nil, func() { measuring.Store(true) })
	measuring.Store(false)
	over.Store(true)
	reading.Wait()
	var gaps, firsts []int64
	var words int64
	for _, one := range readers {
		gaps = slices.Concat(gaps, one.gaps)
		firsts = slices.Concat(firsts, one.firsts)
		words += one.words
	}
	return map[string]any{
		"count": words, "seconds": elapsed.Seconds(), "errors": 0,
		"latency": quantiles(gaps), "first": quantiles(firsts),
	}
}
