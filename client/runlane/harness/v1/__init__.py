"""Code generated from `proto/runlane/v1`; `make proto` writes it, `make check-proto` proves it fresh."""
