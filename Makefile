# For those who are used to it: cluster.sh and cargo do the work.
#
#   make run           three servers on 127.0.0.1:9001 to 9003, and a proxy to them on 8080; in the
#                      background
#   make run_proxy     the proxy alone, to the cluster that cluster.sh knows
#   make stop          stop them; the data stays (make clean removes it)
#   make dependencies  fetch what the build needs
#   make build         build the program
#   make check         everything that CI checks
PROXY_PORT ?= 8080

.PHONY: run run_proxy stop clean dependencies build check

run:
	./scripts/start_n_servers.sh 3 9001
	./cluster.sh gateway $(PROXY_PORT)

run_proxy:
	./cluster.sh gateway $(PROXY_PORT)

stop:
	./scripts/stop_servers.sh

clean:
	./scripts/stop_servers.sh --clean

dependencies:
	cargo fetch --locked

build:
	cargo build --release --locked

check:
	./.ci/run
