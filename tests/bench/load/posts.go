package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
)

// posts makes requests of HTTP/1.1 as unary makes calls: the method is a path, in which the digits
// after the prefix become a number, and the request is a body of JSON.
func posts(job *Job, _ *Connections) map[string]any {
	path := template(Call{Request: []byte(job.Call.Method)}, job.Prefix)
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: job.Concurrency}}
	return measure(job, func() func(int) error {
		return func(number int) error {
			url := "http://" + job.Address + string(path.fill(number))
			return post(client, url, job.Call.Request)
		}
	})
}

func post(client *http.Client, url string, body []byte) error {
	response, err := client.Post(url, "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	answer, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode/100 != 2 {
		err = fmt.Errorf("%s: %s", response.Status, answer)
	}
	return err
}
