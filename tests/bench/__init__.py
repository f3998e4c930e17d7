"""Benchmarks: the cost of Runlane relative to that of gRPC alone. See docs/performance.md."""
