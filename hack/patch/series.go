package patch

// steps are the series, from the ground up: a step stands on those before it. The package compiles and passes its tests and upstream's
// after each, though nothing of it is used before the door comes: that puts the rooms together. The last one can be left out.
var steps = []step{
	{
		subject: "libnet/pms/nat: give PortDriverClient its own file",
		body: `
The interface is what all that follows stands on: drivers that wrap a
driver, a search that asks one, and a fake one for the tests. Move it
out of the mapper, and say what its methods promise. The error of a
call that is not settled yet is part of that promise: nobody returns
it so far.

No change in behavior.`,
		verified: "nothing that runs has changed",
		reason:   "drivers that wrap a driver need its contract in one place",
		canGo:    "never: it is a move",
		files:    []string{"driver_linux.go"},
	},
	{
		subject: "libnet/pms/nat: tell what a refused port means",
		body: `
Each error on the way to a published port answers one question: would
another port help? Judge it by where it comes from. An error that never
reached RootlessKit, or whose answer was lost, says nothing about the
port. What a port driver answers is text, its errno is flattened on the
way, so that it is matched by errors.Is and by text.

A request is made into a value once, so that nothing below the door
handles the bridge driver's own types.

Nothing uses it yet.`,
		verified: "refusal_linux_test.go comes with the mapper, which refuses first",
		reason:   "a refusal is told from a failure only by its text",
		canGo:    "RootlessKit's errors carry a code; the text matching goes then",
		files:    []string{"refusal_linux.go", "request_linux.go"},
	},
	{
		subject: "libnet/pms/nat: look at the host's ports",
		body: `
With RootlessKit's --detach-netns, dockerd's process stays in the host's
network namespace, and only the thread that runs MapPorts is in the
child's. So a bind on another thread tells whether a port is free on the
host, at a fraction of what a request to RootlessKit costs, and the
host's own settings can be read. Which thread is where is checked, and
whatever cannot be seen is left to RootlessKit.

Nothing uses it yet.`,
		verified: "nothing looks yet; the fake driver that listens on the host is here",
		reason:   "the two port tables differ, and only the host's is the users'",
		canGo:    "port allocation itself takes place on the host (moby 52933)",
		files:    []string{"host_linux.go", "holder_linux.go", "main_linux_test.go", "fake_linux_test.go"},
	},
	{
		subject: "libnet/pms/nat: explain why no port was found",
		body: `
The text of MapPorts' error is all that reaches the user. Name the
addresses, the range, how many ports were tried, the last refusal, and
what can be done. "address already in use" stays in it: callers look
for that.

Nothing uses it yet.`,
		verified: "explain_linux_test.go has each cause and its advice",
		reason:   "\"address already in use\" alone does not say where, or whose",
		canGo:    "RootlessKit's errors carry a code, and the client words them",
		files:    []string{"explain_linux.go", "explain_linux_test.go"},
	},
	{
		subject: "libnet/pms/nat: one child address per host address",
		body: `
RootlessKit's drivers give every host address of a family the same
address in the child. Two containers with one port on two addresses of
the host then fail in the child, where nothing stands in their way. Wrap
the driver: a loopback address for each host address.

Nothing uses it yet.`,
		verified: "childip_linux_test.go comes with the mapper",
		reason:   "one container per port and host, whatever the host's addresses",
		canGo:    "rlkclient's ChildHostIP does so (moby 52783)",
		files:    []string{"childip_linux.go"},
	},
	{
		subject: "libnet/pms/nat: put a limit to RootlessKit's silence",
		body: `
MapPorts and UnmapPorts run under the bridge driver's lock, and their
context is never cancelled: a RootlessKit that does not answer stops the
daemon's networking for good. Wrap the driver: a call that is not
answered in time is given up, and undone when its answer comes.

Nothing uses it yet.`,
		verified: "silence_linux_test.go has the cases, in a time of its own",
		reason:   "a call under the bridge driver's lock must end",
		canGo:    "rlkclient's calls have a deadline, and undo what came late",
		files:    []string{"silence_linux.go", "silence_linux_test.go"},
	},
	{
		subject: "libnet/pms/nat: tell who needs a child port",
		body: `
Host addresses can share a port in the child, and a removal that was
given up leaves one that RootlessKit still forwards to. Count who needs
a port, and release it in the allocator when nobody does any more.

Nothing uses it yet.`,
		verified: "reservation_linux_test.go has who joins, leaves and waits",
		reason:   "the allocator forgets a port that RootlessKit still has",
		canGo:    "the allocator counts who has a port",
		files:    []string{"reservation_linux.go", "reservation_linux_test.go"},
	},
	{
		subject: "libnet/pms/nat: list the host's free ports",
		body: `
A source of ports that are free on the host for every address of a
request: ascending from where the last one ended, so that TCP and UDP of
a container come out at one number, and elsewhere after many taken ones
in a row. The range is the host's ip_local_port_range, without its
ip_local_reserved_ports: MapPorts sees the child's, which are the
kernel's defaults.

Nothing uses it yet.`,
		verified: "view_linux_test.go comes with the mapper",
		reason:   "a taken port costs a system call, not a request",
		canGo:    "port allocation itself takes place on the host (moby 52933)",
		files:    []string{"hostports_linux.go", "walk_linux.go"},
	},
	{
		subject: "libnet/pms/nat: look for pasta, which nobody asks",
		body: `
With RootlessKit's port driver "implicit", pasta binds whatever is bound
in the child, and tells nobody when it cannot: a container is reported
as published while another process has its port. Make a driver of the
look at the host: it refuses a port that is taken there, and keeps it
for pasta until it is unmapped.

Nothing uses it yet.`,
		verified: "pasta_linux_test.go comes with the mapper",
		reason:   "pasta reports no port that it could not bind",
		canGo:    "pasta reports what it could not bind",
		files:    []string{"pasta_linux.go"},
	},
	{
		subject: "libnet/pms/nat: make and undo one attempt",
		body: `
An attempt is an allocation in the child and one request per host
address to the driver, undone as a whole. A port that was refused stays
reserved, so that the allocator does not return it again, and so does
one that RootlessKit may still have.

Nothing uses it yet.`,
		verified: "publish_linux_test.go comes with the mapper",
		reason:   "what an attempt did is undone as a whole, or not at all",
		canGo:    "the allocator hands out ports that are free on the host",
		files:    []string{"attempt_linux.go"},
	},
	{
		subject: "libnet/pms/nat: search for a port",
		body: `
One pass over the ports of a source, each asked for once, for two
seconds at most: the bridge driver's lock is held. Without a look at the
host, the source is the allocator's order for a few ports, and then at
random, since taken ports come in blocks. It ends with the range, the
number of ports that were tried, and the last refusal.

Nothing uses it yet.`,
		verified: "odds_linux_test.go counts what fails on simulated hosts, beside what\nothers do; search_linux_test.go comes with the mapper",
		reason:   "one taken port must not fail a container that takes any",
		canGo:    "OSAllocator tells exhaustion, and asks the port driver (moby 50704)",
		files:    []string{"search_linux.go", "allocatorports_linux.go", "odds_linux_test.go"},
	},
	{
		subject: "libnet/pms/nat: find a free host port, if there is one",
		body: `
Rootless dockerd binds a published port in two network namespaces, and
gave up at the first one that was free in the child and taken on the
host. Put the search in between: a container that asks for any free
host port, or for one of a range, gets one whenever the host has one. A
fixed port is asked for once, as before.

Rootful, a dynamic port is searched for in the same way, past the
allocator's ten tries; a fixed one and all its errors are unchanged.

The exported API is unchanged.

Fixes moby/moby#52903, moby/moby#53153
Helps moby/moby#53255, moby/moby#53306`,
		verified: "the tests by room, and a model of dockerd, RootlessKit and a\nbusy host that random operations are held against",
		reason:   "starts fail where any port would do",
		canGo:    "the allocator hands out ports that are free on the host",
		files: []string{
			door, "refusal_linux_test.go", "view_linux_test.go", "childip_linux_test.go", "pasta_linux_test.go",
			"search_linux_test.go", "model_linux_test.go", "publish_linux_test.go", "contract_linux_test.go", "stall_linux_test.go",
			"rootful_linux_test.go", "pasta_twice_linux_test.go", "ephemeral_linux_test.go",
		},
	},
	{
		subject: "integration/networking: publish on a busy host",
		body: `
Hold the first of the host's dynamic ports, and start containers: each
is published on another port. Without the search, all of them fail.`,
		verified: "it fails 10 times of 10 with a stock daemon, and passes 10 of 10",
		reason:   "the tests that flaked on this do so by chance",
		canGo:    "never: it is a test",
	},
	{
		subject: "libnet/pms/nat: count what publishing ports takes",
		body: `
With --metrics-addr, export how requests for host ports ended, how many
attempts and seconds they took, the looks at the host, the port driver's
refusals, what RootlessKit did not answer, what was undone late, and how
many dynamic ports are left. Add a span for MapPorts, with its attempts
and the port, where the caller's is recorded.

It is a driver around a driver, a line at the door, and one each where a
call is given up or undone late; nothing that is published differs.
The modules are those that the daemon has already.
This commit can be left out.`,
		verified: "metrics_linux_test.go gathers the registry around publishes",
		reason:   "a host that runs out of ports is seen before starts fail",
		canGo:    "when nobody scrapes it; it stands on all else, and nothing on it",
		files:    []string{"meters_linux.go", "metrics_linux.go", "portsleft_linux.go", "metrics_linux_test.go"},
		mark:     "meter",
	},
}
