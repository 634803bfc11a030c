# `make` lists the targets. All that is built goes to build/.
.DEFAULT_GOAL := help
.PHONY: help deps build bases patch stress stress-full stress-docs report-test users test race lock rootful clients fleet vm soak docs check bench bench-docs model model-docs upstream-integration upstream-docs dist clean
.NOTPARALLEL: # go uses all processors itself, and the order of what a target needs is meant

BERTH := build/bin/berth
N     ?= 10# times that `make bench` runs all benchmarks, one after the other
# Stock and Berth differ by a hundredth of what a publish through RootlessKit takes: that needs more samples than the rest.
CLOSE := 'RootlessKit/(No)?Refusal'
BENCH := build/bench.test -test.run '^$$' -test.benchmem -test.cpu 1,2
BASES ?= all# of `make bases`, VERSION[,VERSION]
DURATION ?= 20m# of `make soak`
CODE  := $(wildcard daemon hack integration)
# Tests run through this: a line as each (or each package) ends, a summary of them all, and a failure for a skip that .ci/skips does not expect.
TEST  = mkdir -p build/results && go tool gotestsum --format $(or $(FORMAT),testname) --jsonfile build/results/$@.json --post-run-command 'go run ./hack/skips' --

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-21s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## set up the system: packages, /dev/net/tun, test users (as root; else say what is missing)
	@hack/deps.sh

build: ## build the patched Docker, and the stock one beside it, into build/bin
	go build -trimpath -buildvcs=false -o $(BERTH) ./hack/berth
	@$(BERTH) build

stress: deps build ## watch stock fail and Berth not: 80 starts on a busy host, with each
	@$(BERTH) stress

stress-full: deps build ## measure every contender under every load, in at most 3 hours, or QUICK=1 (as root; installs podman; build/results/stress-full.html)
	@$(BERTH) build docker28 pasta
	dpkg -s podman >/dev/null 2>&1 || apt-get install -y --no-install-recommends podman
	@$(BERTH) stress $(if $(QUICK),--quick,--full)

stress-docs: ## put the picture that `make stress-full` drew (or with QUICK=1) into docs, where the README finds it
	install -D -m 644 build/results/stress-$(if $(QUICK),quick,full).svg docs/failure-rate.svg

report-test: ## look at the page that stress-full writes in a browser (as root; installs chromium-headless-shell)
	dpkg -s chromium-headless-shell >/dev/null 2>&1 || apt-get install -y --no-install-recommends chromium-headless-shell
	go test -tags chromium -count=1 -v -run '^TestPageInChromium$$' ./integration/harness

users: deps build ## watch two users' daemons start containers at once, stock and Berth (as root; build/results/users.json)
	go test -tags integration -count=1 -v -run '^TestTwoUsersStartAtOnce$$' ./integration/e2e

test: deps check build ## everything: check, then the end-to-end test on real stacks
	@$(BERTH) build pasta passt pesto rootlesskit2 rootlesskit31 busybox compose
	@$(TEST) -tags integration -count=1 -timeout 30m ./integration/e2e ./integration/soak ./integration/... # the longest first: two packages run at a time

race: deps build ## the end-to-end tests of a dockerd with the race detector in it, which takes minutes to build
	@$(BERTH) build --race pasta passt pesto
	@export BERTH_TEST_DOCKERD=dockerd-race; $(TEST) -tags integration -count=1 -timeout 30m -skip 'Stock|TestStopsWaitForASearch' ./integration/e2e

lock: deps build ## what other containers feel of one that searches for a port, stock and Berth (as root; build/results/lock.txt)
	go test -tags integration -count=1 -v -run '^TestStopsWaitForASearch$$' ./integration/e2e -lock-rounds 9

rootful: deps build ## start a rootful daemon beside 0 to 5,000 taken ports in a row, stock and Berth, 30 times each (as root; build/results/rootful.json)
	go test -tags integration -count=1 -v -timeout 20m ./integration/rootful -full

clients: deps build ## start Compose projects and testcontainers on a busy host, stock and Berth
	@$(BERTH) build compose
	go test -tags integration -count=1 -v ./integration/clients -full

fleet: deps build ## run 30 replicas of a Swarm service on three nodes, stock and Berth (as root; build/results/fleet.json)
	go test -tags integration -count=1 -v ./integration/fleet -full

soak: deps build ## start and stop containers on a churning host for DURATION=20m, and look for what grows or is left
	go test -tags integration -count=1 -v -timeout 0 -run '^TestSoak$$' ./integration/soak -duration $(DURATION)

vm: deps build ## limits, install and a power cut under a real systemd, in a machine of QEMU's own (as root; installs qemu and mmdebstrap)
	apt-get install -y --no-install-recommends qemu-system-x86 seabios mmdebstrap
	go test -tags vm -count=1 -v -timeout 30m ./integration/vm

bases: deps build ## build the patched daemon for BASES=all of vendor.conf's, and hold each to upstream (docs/bases.md)
	go test -tags integration -count=1 -v -timeout 0 -run '^TestBases$$' ./integration/upstream -bases $(BASES) -table $(CURDIR)/docs/bases.md

patch: ## write the patch as a series of mails for upstream into build/patch
	go build -trimpath -buildvcs=false -o $(BERTH) ./hack/berth
	@$(BERTH) patch

docs: deps build ## write docs/port-drivers.md of what the port drivers answer
	@$(BERTH) build passt pesto rootlesskit2 rootlesskit31
	go test -tags integration -count=1 ./integration/portdriver -update

check: FORMAT := pkgname
check: ## gofmt, vet, staticcheck, shellcheck, and the unit tests with -race
	@unformatted=$$(gofmt -l $(CODE)); test -z "$$unformatted" || { echo "gofmt these:"; echo "$$unformatted"; exit 1; }
	go vet -tags integration,vm,chromium ./...
	go tool staticcheck -tags integration,vm,chromium ./...
	shellcheck hack/*.sh integration/vm/*.sh .ci/run
	go build -gcflags=-lang=go1.25 ./daemon/... # the oldest that a base is built with
	for arch in amd64 arm64; do GOOS=windows GOARCH=$$arch go build -o /dev/null ./hack/berth || exit 1; done # `berth doctor` is for Windows, too
	@$(TEST) -race ./...

bench: deps build ## run the benchmarks N times, and hold them against the limits (build/results)
	@mkdir -p build/results && rm -f build/results/bench.txt
	go test -tags integration -c -o build/bench.test ./integration/bench
	@for round in $$(seq $(N)); do echo "round $$round of $(N)"; \
		{ $(BENCH) -test.bench . -test.skip $(CLOSE)'|Hundred' -test.benchtime 200ms && \
		  $(BENCH) -test.bench $(CLOSE) -test.benchtime 2s && \
		  $(BENCH) -test.bench Hundred -test.benchtime 3x; } >>build/results/bench.txt || { cat build/results/bench.txt; exit 1; }; done
	@go run ./integration/bench/report -plot build/results/search-cost.svg build/results/bench.txt

model: ## simulate a million starts with Berth's search, and as many with others, on hosts whose ports are taken (build/results/model.json)
	@mkdir -p build/results
	go test -count=1 -timeout 20m -run '^TestOdds$$' ./daemon/libnetwork/portmappers/nat -odds.starts 500000 -odds.json $(CURDIR)/build/results/model.json
	@go run ./integration/model build/results/model.json

model-docs: ## put the plots that `make model` drew into docs
	install -D -m 644 -t docs build/results/model-failures.svg build/results/model-calls.svg build/results/model-lock.svg

bench-docs: ## put the plot that `make bench` drew into docs, where the README finds it
	install -D -m 644 build/results/search-cost.svg docs/search-cost.svg

upstream-integration: deps build ## run upstream's own integration tests, stock and Berth (as root, about an hour; build/results/upstream.md)
	@$(BERTH) build busybox
	@rm -f build/results/upstream.json
	go test -tags integration -count=1 -v -timeout 0 ./integration/moby -all -times 100

upstream-docs: ## put what `make upstream-integration` saw into docs/upstream.md
	install -D -m 644 build/results/upstream.md docs/upstream.md

dist: build ## a release for amd64 and arm64 in build/dist: archives, packages, bills of materials, patched sources, checksums
	@for arch in amd64 arm64; do GOARCH=$$arch $(BERTH) build dockerd docker-proxy || exit; done
	@go run ./hack/dist amd64 arm64

clean: ## remove all that was built
	rm -rf build
