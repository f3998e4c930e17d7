"""For operators: the log, Prometheus metrics and OpenTelemetry traces.

`meter` updates the `metrics`, which `metrics_server` serves; `tracer` makes spans, which `otlp`
sends and `trace_export` sets up. All observe commits and calls through `core.observer` and never
change them. Prompts and answers appear nowhere unless `--log-content` is set.
"""
