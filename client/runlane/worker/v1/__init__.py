"""Code generated from `proto/runlane/worker/v1`; `make proto` writes it, `make check-proto` proves it fresh."""
