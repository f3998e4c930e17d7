"""What operators see: the log, Prometheus metrics and OpenTelemetry traces.

It observes commits and calls through `core.observer`; nothing below imports it. It never changes
what it observes. Prompts and answers never appear in it unless `--log-content` asks for them.
"""
