package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// request is what the endpoint reads of a chat completion request.
type request struct {
	Model         string
	StreamOptions struct {
		IncludeUsage bool `json:"include_usage"`
	} `json:"stream_options"`
}

const chunk = `data: {"id":"chatcmpl-bench","object":"chat.completion.chunk",` +
	`"created":1760000000,"model":"word","choices":[%s]%s}` + "\n\n"

// endpoint serves the streaming chat completions API of OpenAI. The model `word-200-20ms` answers
// with 200 words, one every 20 ms.
func endpoint() {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Printf("endpoint listening on %s\n", listener.Addr())
	http.HandleFunc("POST /v1/chat/completions", complete)
	check(http.Serve(listener, nil))
}

func complete(response http.ResponseWriter, received *http.Request) {
	var wanted request
	if err := json.NewDecoder(received.Body).Decode(&wanted); err != nil {
		http.Error(response, err.Error(), http.StatusBadRequest)
		return
	}
	words, pause, err := model(wanted.Model)
	if err != nil {
		http.Error(response, err.Error(), http.StatusNotFound)
		return
	}
	response.Header().Set("Content-Type", "text/event-stream")
	controller := http.NewResponseController(response)
	send := func(choices, usage string) {
		_, _ = fmt.Fprintf(response, chunk, choices, usage)
	}
	send(`{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}`, "")
	begin := time.Now()
	for n := range words {
		if pause > 0 {
			// At fixed times, so that a late word delays no other.
			time.Sleep(time.Until(begin.Add(time.Duration(n) * pause)))
		}
		send(`{"index":0,"delta":{"content":"word "},"finish_reason":null}`, "")
		if controller.Flush() != nil || received.Context().Err() != nil {
			return
		}
	}
	send(`{"index":0,"delta":{},"finish_reason":"stop"}`, "")
	if wanted.StreamOptions.IncludeUsage {
		usage := `,"usage":{"prompt_tokens":9,"completion_tokens":%d,"total_tokens":%d}`
		send("", fmt.Sprintf(usage, words, words+9))
	}
	_, _ = fmt.Fprint(response, "data: [DONE]\n\n")
}

// model reads the number of words and the pause between them from a name.
func model(name string) (words int, pause time.Duration, err error) {
	parts := strings.Split(name, "-")
	if len(parts) != 3 || parts[0] != "word" {
		return 0, 0, fmt.Errorf("there is no model %q", name)
	}
	if words, err = strconv.Atoi(parts[1]); err != nil {
		return 0, 0, err
	}
	pause, err = time.ParseDuration(parts[2])
	return words, pause, err
}
