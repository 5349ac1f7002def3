# make help lists what there is. Programs and the image go to out/, tools of the
# build to .build/; `make clean` removes both.
GO      ?= go
# Stamped into the programs; empty: they call themselves "dev", and a build is
# the same whoever makes it.
VERSION ?=
IMAGE   ?= localhost/weir:dev
# Folder for the samples of benchmarks as JSON; empty: a table only.
OUT     ?=
# Folder of a running cluster's state (make cluster-up prints it); empty: e2e and
# conformance bring up their own.
WEIR_CLUSTER ?=

export GOFLAGS = -mod=readonly
export WEIR_CLUSTER OUT

LDFLAGS  = $(strip -s -w $(if $(VERSION),-X main.version=$(VERSION)))
# Without gRPC's pages for golang.org/x/net/trace, which nobody serves: with them
# come net/http and html/template, a quarter of weir-cni and of weir-proxy.
TAGS     = grpcnotrace
BUILD    = CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -tags=$(TAGS) -ldflags='$(LDFLAGS)'
PROGRAMS = out/bin/weir-cni out/bin/weir-agent out/bin/weir-proxy out/bin/weir-install

# Packages whose tests are stages of their own.
SUITES     = tests/netns tests/demo tests/chain tests/rotation tests/environments tests/interop tests/cluster tests/e2e tests/bench
UNIT       = $(GO) list ./... | grep -vE '/($(shell echo $(SUITES) | tr ' ' '|'))(/|$$)'
TEST       = $(GO) test -count=1 -v

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# ---- building

.PHONY: build $(PROGRAMS)
build: $(PROGRAMS) ## the four programs, static, in out/bin
out/bin/weir-cni:     ; $(BUILD) -o $@ ./plugin
out/bin/weir-agent:   ; $(BUILD) -o $@ ./agent
out/bin/weir-proxy:   ; $(BUILD) -o $@ ./proxy
out/bin/weir-install: ; $(BUILD) -o $@ ./install

# The storage is thrown away again: with the vfs driver each build is a full copy.
.PHONY: image
image: build ## the image, in out/weir-image.tar (for: ctr -n k8s.io images import)
	@mkdir -p .build; set -eu; \
	work=$$(mktemp -d $(CURDIR)/.build/image.XXXXXX); trap 'rm -rf "$$work"' EXIT; \
	image() { buildah --root "$$work/root" --runroot "$$work/run" --storage-driver vfs "$$@"; }; \
	image build --isolation chroot --timestamp 0 --quiet --tag $(IMAGE) . >"$$work/id"; \
	image push --quiet $(IMAGE) docker-archive:"$$work/image.tar":$(IMAGE); \
	mv "$$work/image.tar" out/weir-image.tar; \
	echo "out/weir-image.tar: $(IMAGE), $$(cat "$$work/id")"

.PHONY: generate generate-check
generate: ## Go from .proto files, CRDs and deep copies from the types in agent/api
	.ci/generate
generate-check: ## fail if `make generate` would change something
	.ci/generate --check

# ---- showing

.PHONY: demo
demo: ## the life of one request, a route, a retry, and who may call whom; without a cluster; needs root
	@$(GO) run ./tests/demo $(DEMO_FLAGS)

.PHONY: cluster-build cluster-up cluster-down
cluster-build: ## the test cluster's Kubernetes, containerd, CoreDNS: once per version, 10 to 20 minutes
	$(GO) run ./tests/cluster/cmd/weir-cluster build
cluster-up: ## a two-node Kubernetes on this machine; needs root
	$(GO) run ./tests/cluster/cmd/weir-cluster up
cluster-down: ## end it and remove everything it made
	$(GO) run ./tests/cluster/cmd/weir-cluster down

.PHONY: bench-add
bench-add: ## what a pod's ADD costs, beside iptables by exec and by restore; needs root; OUT=folder keeps the samples
	@$(GO) run ./tests/bench add $(BENCH_FLAGS)

.PHONY: bench-dataplane
bench-dataplane: ## requests and bytes through a pair of proxies, beside nginx, HAProxy and ReverseProxy; needs root
	@$(GO) run ./tests/bench dataplane $(BENCH_FLAGS)

.PHONY: bench-config
bench-config: ## how soon a change in a real API server is every proxy's, and the memory for it; needs root and cluster-build
	@$(GO) run ./tests/bench config $(BENCH_FLAGS)

.PHONY: bench-memory
bench-memory: ## memory of proxies that idle, and of idle connections; needs root
	@$(GO) run ./tests/bench memory $(BENCH_FLAGS)

.PHONY: bench-overload
bench-overload: ## goodput at five times the peak, and latency beside slow clients; needs root
	@$(GO) run ./tests/bench overload $(BENCH_FLAGS)

# ---- testing: `make test` runs these as stages, see .ci/test

.PHONY: test
test: ## everything, as root; installs the Debian packages it needs
	.ci/test

.PHONY: packages
packages: ## Debian packages that the tests need
	.ci/packages

.PHONY: lint
lint: .build/tools/golangci-lint ## golangci-lint: .golangci.yml says what for
	$< run ./...

.build/tools/golangci-lint: .ci/lint/go.mod .ci/lint/go.sum
	cd .ci/lint && $(GO) build -o $(CURDIR)/$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint

.PHONY: unit
unit: ## unit tests with the race detector; some need root and say so
	$(TEST) -race -short -timeout 5m $$($(UNIT)) ./tests/cluster

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME
	.ci/fuzz

.PHONY: netns demo-test verbs old-runtime cycles first-packets rotations environments interop cluster-test e2e cluster-rotations conformance bench-smoke
netns: ## rules, proxies and kernel in network namespaces; needs root
	$(TEST) -timeout 5m ./tests/netns
	$(TEST) -timeout 2m -run ClientAddressMany ./proxy
demo-test: ## the demo, twice at once, and with a broken rule; needs root
	$(TEST) -timeout 5m ./tests/demo
verbs: ## every CNI verb in every version, behind every primary, through libcni; needs root
	$(TEST) -timeout 5m -run 'Verb|Failures|Primary|Addresses|Sandbox' ./tests/chain
old-runtime: ## Debian's containerd 1.6: chained by the installer, a captured sandbox; needs root
	$(TEST) -timeout 2m -run OldRuntime ./tests/chain
cycles: ## attach and detach, CYCLES times (500): nothing is left behind; needs root
	$(TEST) -timeout 60m -run 'Cycles|Left' ./tests/chain $(if $(CYCLES),-cycles $(CYCLES))
first-packets: ## of PODS pods (100), flooding as ADD returns: none gets away uncaptured; needs root
	$(TEST) -timeout 30m -run FirstPackets ./tests/chain $(if $(PODS),-pods $(PODS))
rotations: ## renew certificates ROTATIONS times (100), of PODS pods (30) that call each other, and change the CA TAKEOVERS times (1): no request fails; needs root
	$(TEST) -timeout 90m ./tests/rotation $(if $(ROTATIONS),-rotations $(ROTATIONS)) $(if $(TAKEOVERS),-takeovers $(TAKEOVERS)) $(if $(PODS),-pods $(PODS))
environments: ## nodes that are not like others; needs root
	$(TEST) -timeout 5m ./tests/environments
interop: ## clients and servers that others wrote, through both proxies; needs root
	$(TEST) -timeout 5m ./tests/interop
cluster-test: ## the test cluster itself; needs root
	$(TEST) -timeout 5m -run TestCluster ./tests/cluster
bench-smoke: ## the benchmarks run, for seconds; nothing is judged; needs root
	$(TEST) -timeout 5m ./tests/bench/...
e2e: ## Weir on a real Kubernetes; needs root
	$(TEST) -timeout 20m ./tests/e2e
cluster-rotations: ## the same as rotations on a real Kubernetes, by CertificateSigningRequests: ROTATIONS (200), TAKEOVERS (10); needs root
	$(TEST) -timeout 60m -run 'TestWeir/certificates_are_renewed' ./tests/e2e -rotations $(or $(ROTATIONS),200) -takeovers $(or $(TAKEOVERS),10)
conformance: ## the Gateway API's mesh conformance suite; its report goes to tests/conformance/reports; needs root
	$(GO) run ./tests/conformance $(CONFORMANCE_FLAGS)

.PHONY: clean
clean: ## what the targets made, but for the cluster's programs in the cache folder
	rm -rf out .build
