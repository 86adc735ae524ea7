# Short names for everyday commands; `just` lists them. Everything is compiled in the release profile: debug tensors are
# too slow to work with.

_list:
    @just --list

# Format the code
fmt:
    cargo fmt --all

# Lint as CI does
lint:
    cargo fmt --all --check
    cargo clippy --release --all-targets -- -D warnings

# All tests but the slow ones
test *ARGS:
    cargo test --release {{ARGS}}

# Parity with the reference implementations, all groups or those named
golden *GROUPS:
    cargo test --release --test golden -- {{GROUPS}}

# Damaged files of every kind, by default as many as take about an hour
mutants COUNT="20000":
    TRAINER_MUTANTS={{COUNT}} cargo test --release --test mutants

# The quickstart runs: loss falls, reward rises
e2e:
    cargo test --release --test quickstart -- --ignored --nocapture --test-threads=1

# Benchmarks of the CPU paths
bench *ARGS:
    cargo bench {{ARGS}}

# The CUDA kernels against the CPU; needs a GPU and nvcc of CUDA 13
test-gpu *ARGS:
    cargo test --release --features cuda --test cuda -- --ignored {{ARGS}}

# Speed and memory of whole steps on a GPU, results in a folder
bench-gpu *ARGS:
    scripts/bench/gpu.sh {{ARGS}}

# API documentation
docs:
    cargo doc --release --no-deps --document-private-items

# What CI runs
ci:
    .ci/run
