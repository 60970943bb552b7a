"""What the gateway tells about itself: metrics for Prometheus, and traces for OpenTelemetry."""
