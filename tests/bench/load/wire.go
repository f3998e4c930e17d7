package main

import (
	"bytes"
	"context"
	"fmt"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const digits = 12

// raw passes messages through as the bytes that they are.
type raw struct{}

func (raw) Name() string                        { return "proto" }
func (raw) Marshal(message any) ([]byte, error) { return *message.(*[]byte), nil }
func (raw) Unmarshal(data []byte, message any) error {
	*message.(*[]byte) = data
	return nil
}

// Connections are TCP connections that are used in turn.
type Connections struct {
	all  []*grpc.ClientConn
	next atomic.Int64
}

func connect(address string, count int) *Connections {
	made := &Connections{}
	for range max(count, 1) {
		connection, err := grpc.NewClient("passthrough:///"+address,
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			// Windows of a fixed size: the probes that adapt them would cost the server answers.
			grpc.WithInitialWindowSize(1<<18), grpc.WithInitialConnWindowSize(1<<22),
			grpc.WithDefaultCallOptions(grpc.ForceCodec(raw{})))
		check(err)
		made.all = append(made.all, connection)
	}
	return made
}

func (c *Connections) one() *grpc.ClientConn {
	return c.all[int(c.next.Add(1))%len(c.all)]
}

// Template makes requests: the digits after the prefix become a number.
type Template struct {
	method string
	bytes  []byte
	places []int
}

func template(call Call, prefix string) *Template {
	made := &Template{method: call.Method, bytes: call.Request}
	for from := 0; ; {
		at := bytes.Index(call.Request[from:], []byte(prefix))
		if at < 0 || prefix == "" {
			return made
		}
		from += at + len(prefix)
		made.places = append(made.places, from)
	}
}

func (t *Template) fill(number int) []byte {
	filled := bytes.Clone(t.bytes)
	text := fmt.Appendf(nil, "%0*d", digits, number)
	for _, place := range t.places {
		copy(filled[place:place+digits], text)
	}
	return filled
}

func (t *Template) call(connection *grpc.ClientConn, number int) error {
	request, response := t.fill(number), []byte(nil)
	return connection.Invoke(context.Background(), t.method, &request, &response)
}

func (t *Template) open(connection *grpc.ClientConn, number int) (grpc.ClientStream, error) {
	description := &grpc.StreamDesc{ServerStreams: true}
	stream, err := connection.NewStream(context.Background(), description, t.method)
	if err != nil {
		return nil, err
	}
	request := t.fill(number)
	if err := stream.SendMsg(&request); err != nil {
		return nil, err
	}
	return stream, stream.CloseSend()
}

// numberIn is the number of the session that a terminal event is about; -1 in any other message.
func numberIn(message []byte, prefix []byte) int {
	at := bytes.Index(message, prefix)
	if at < 0 {
		return -1
	}
	number := 0
	for _, digit := range message[at+len(prefix):][:digits] {
		number = number*10 + int(digit-'0')
	}
	return number
}
