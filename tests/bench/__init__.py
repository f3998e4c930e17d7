"""What Runlane costs, measured against what gRPC costs by itself. See docs/performance.md."""
