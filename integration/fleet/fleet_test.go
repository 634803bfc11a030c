//go:build integration

// Package fleet runs a service of Docker Swarm over several rootless nodes, each a user's stack on a host of its own: a network
// namespace, joined to the others by a bridge. On each host others hold the first dynamic ports.
package fleet

import (
	"context"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/client"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"gotest.tools/v3/assert"
	"gotest.tools/v3/poll"

	"berth/hack/stack"
	"berth/integration/harness"
	"berth/integration/hostload"
	"berth/integration/stacktest"
	"berth/integration/whoami"
)

var full = flag.Bool("full", false, "30 replicas on three nodes, with 100 ports held on each")

func TestMain(m *testing.M) { stacktest.Main(m) }

// A task that finds no port fails, and Swarm starts another one five seconds later. What came of it is also written to
// build/results, for the harness's page.
func TestReplicasFindPorts(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("several users' stacks on hosts of their own take root")
	}
	nodes, replicas, held := 2, 6, 10
	if *full {
		nodes, replicas, held = 3, 30, 100
	}
	var results []harness.Fleet
	for _, dockerd := range []string{"dockerd-stock", "dockerd"} {
		t.Run(dockerd, func(t *testing.T) {
			r := harness.Fleet{Daemon: dockerd, Nodes: nodes, Replicas: replicas, Held: held}
			r.FailedTasks, r.Seconds = serve(t, fleet(t, dockerd, nodes, held), replicas)
			t.Logf("%+v", r)
			results = append(results, r)
		})
	}
	stacktest.WriteResults(t, harness.FleetFile, results)
	assert.Equal(t, len(results), 2)
	assert.Check(t, results[0].FailedTasks > 0, "with stock, no task failed: nothing is shown")
	assert.Check(t, results[1].FailedTasks == 0, "with Berth, %d tasks failed", results[1].FailedTasks)
}

// node is a stack on a host of its own.
type node struct {
	*stacktest.Daemon
	host netip.Addr
}

// fleet starts the nodes, and makes a swarm of them.
func fleet(t *testing.T, dockerd string, count, held int) (nodes []node) {
	t.Helper()
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "fleet"}}
	assert.NilError(t, netlink.LinkAdd(bridge))
	t.Cleanup(func() { assert.Check(t, netlink.LinkDel(bridge)) })
	up(t, bridge, "10.99.0.254/24")
	for i := range count {
		host := netip.AddrFrom4([4]byte{10, 99, 0, byte(i + 1)})
		// What is started meanwhile is on that host, as this thread is.
		back := newHost(t, bridge, fmt.Sprint("host", i), host)
		ports, err := hostload.DynamicPorts(held)
		assert.Check(t, err)
		stacktest.Hold(t, hostload.Load{Network: "tcp4", Ports: ports})
		nodes = append(nodes, node{stacktest.StartAs(t, stacktest.Users[i], dockerd, stack.Options{}), host})
		back()
	}
	first := nodes[0]
	// dockerd listens on the host: nothing has to be exposed there.
	manager := first.host.String() + ":2377"
	const anywhere = "0.0.0.0"
	forgetAfter := int64(1000) // tasks of a replica: all are to be counted
	_, err := first.API.SwarmInit(t.Context(), client.SwarmInitOptions{
		ListenAddr: anywhere, AdvertiseAddr: manager,
		Spec: swarm.Spec{Orchestration: swarm.OrchestrationConfig{TaskHistoryRetentionLimit: &forgetAfter}}})
	assert.NilError(t, err)
	s, err := first.API.SwarmInspect(t.Context(), client.SwarmInspectOptions{})
	assert.NilError(t, err)
	for _, n := range nodes[1:] {
		_, err := n.API.SwarmJoin(t.Context(), client.SwarmJoinOptions{
			ListenAddr: anywhere, AdvertiseAddr: n.host.String(), RemoteAddrs: []string{manager}, JoinToken: s.Swarm.JoinTokens.Worker})
		assert.NilError(t, err)
	}
	return nodes
}

// newHost makes a network namespace with a link to the bridge and that address, and puts the calling thread there until back is
// called.
func newHost(t *testing.T, bridge netlink.Link, name string, at netip.Addr) (back func()) {
	t.Helper()
	runtime.LockOSThread()
	here, err := netns.Get()
	assert.NilError(t, err)
	there, err := netns.New()
	assert.NilError(t, err)
	t.Cleanup(func() { there.Close() })
	assert.NilError(t, netns.Set(here))
	assert.NilError(t, netlink.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: name, MasterIndex: bridge.Attrs().Index}, PeerName: "uplink", PeerNamespace: netlink.NsFd(there)}))
	link, err := netlink.LinkByName(name)
	assert.NilError(t, err)
	t.Cleanup(func() { assert.Check(t, netlink.LinkDel(link)) })
	assert.NilError(t, netlink.LinkSetUp(link))
	assert.NilError(t, netns.Set(there))
	for link, address := range map[string]string{"lo": "127.0.0.1/8", "uplink": at.String() + "/24"} {
		link, err := netlink.LinkByName(link)
		assert.NilError(t, err)
		up(t, link, address)
	}
	return func() {
		assert.NilError(t, netns.Set(here))
		here.Close()
		runtime.UnlockOSThread()
	}
}

func up(t *testing.T, link netlink.Link, address string) {
	t.Helper()
	a, err := netlink.ParseAddr(address)
	assert.NilError(t, err)
	assert.NilError(t, netlink.LinkSetUp(link))
	if link.Attrs().Name != "lo" { // it has its address
		assert.NilError(t, netlink.AddrAdd(link, a))
	}
}

// serve starts a service with a dynamic host port for each of its tasks, and waits until all run. Each must answer with its own
// id, at its host's address.
func serve(t *testing.T, nodes []node, replicas int) (failed int, seconds float64) {
	t.Helper()
	start := time.Now()
	count := uint64(replicas)
	made, err := nodes[0].API.ServiceCreate(t.Context(), client.ServiceCreateOptions{Spec: swarm.ServiceSpec{
		Annotations:  swarm.Annotations{Name: "whoami"},
		TaskTemplate: swarm.TaskSpec{ContainerSpec: &swarm.ContainerSpec{Image: whoami.Image}},
		Mode:         swarm.ServiceMode{Replicated: &swarm.ReplicatedService{Replicas: &count}},
		EndpointSpec: &swarm.EndpointSpec{Ports: []swarm.PortConfig{{TargetPort: 80, PublishMode: swarm.PortConfigPublishModeHost}}},
	}})
	assert.NilError(t, err)
	t.Cleanup(func() {
		_, err := nodes[0].API.ServiceRemove(context.Background(), made.ID, client.ServiceRemoveOptions{})
		assert.Check(t, err)
	})
	tasks := func() (states map[swarm.TaskState]int, last string) {
		list, err := nodes[0].API.TaskList(t.Context(), client.TaskListOptions{Filters: client.Filters{}.Add("service", made.ID)})
		assert.NilError(t, err)
		states = map[swarm.TaskState]int{}
		for _, task := range list.Items {
			states[task.Status.State]++
			if task.Status.Err != "" {
				last = task.Status.Err
			}
		}
		return states, last
	}
	poll.WaitOn(t, func(poll.LogT) poll.Result {
		states, last := tasks()
		if states[swarm.TaskStateRunning] == replicas {
			return poll.Success()
		}
		return poll.Continue("the tasks are %v; the last error: %s", states, last)
	}, poll.WithTimeout(10*time.Minute), poll.WithDelay(100*time.Millisecond))
	seconds = time.Since(start).Seconds()
	states, _ := tasks()

	answered, used := 0, 0
	for _, n := range nodes {
		list, err := n.API.ContainerList(t.Context(), client.ContainerListOptions{})
		assert.NilError(t, err)
		if len(list.Items) > 0 {
			used++
		}
		for _, c := range list.Items {
			at := n.Published(t, c.ID)
			assert.Assert(t, len(at) > 0, "%s is published nowhere", c.Names)
			stacktest.AssertAnswers(t, "tcp", netip.AddrPortFrom(n.host, at[0].Port()), c.ID)
			answered++
		}
	}
	assert.Equal(t, answered, replicas)
	assert.Equal(t, used, len(nodes), "not each node has a task")
	return states[swarm.TaskStateFailed] + states[swarm.TaskStateRejected], seconds
}
