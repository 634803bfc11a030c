// Command hostname is the test image's only program: it answers every HTTP request on port 80 and on those
// of $PORTS, and every UDP datagram on port 80, with its hostname, which in a container is the container's
// short id. Whoever reaches it through a published port knows whose port it is. Upstream's tests give it a
// command, which it does not heed.
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	// Process 1 of a container gets no signal that it does not handle.
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM, syscall.SIGINT)
	name, err := os.Hostname()
	if err != nil {
		log.Fatal(err)
	}
	udp, err := net.ListenPacket("udp", ":80")
	if err != nil {
		log.Fatal(err)
	}
	go func() {
		buf := make([]byte, 1)
		for {
			_, from, err := udp.ReadFrom(buf)
			if err != nil {
				log.Fatal(err)
			}
			if _, err := udp.WriteTo([]byte(name+"\n"), from); err != nil {
				log.Print(err)
			}
		}
	}()
	answer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, name) })
	for _, port := range append([]string{"80"}, strings.Fields(os.Getenv("PORTS"))...) {
		go func() { log.Fatal(http.ListenAndServe(":"+port, answer)) }()
	}
	<-term
}
