"""OpenTelemetry's variables: what turns tracing on, what is sampled, and what stops the start."""

import pytest

from gateway.errors import StartError
from gateway.telemetry.trace_options import Sampler, TraceOptions

HERE = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "x", "OTEL_TRACES_SAMPLER": "nonsense"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": " "},
        HERE | {"OTEL_SDK_DISABLED": "TRUE"},
        HERE | {"OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_tracing_is_off(environment: dict[str, str]) -> None:
    assert TraceOptions.read(environment) is None


@pytest.mark.parametrize(
    ("name", "argument", "sampler"),
    [
        ("", "0.5", Sampler(1.0, follows_parent=True)),
        ("parentbased_always_on", "", Sampler(1.0, follows_parent=True)),
        ("parentbased_always_off", "", Sampler(0.0, follows_parent=True)),
        ("parentbased_traceidratio", "0.25", Sampler(0.25, follows_parent=True)),
        ("traceidratio", "", Sampler(1.0, follows_parent=False)),
        ("Always_Off", "", Sampler(0.0, follows_parent=False)),
    ],
)
def test_samplers_are_the_standard_ones(name: str, argument: str, sampler: Sampler) -> None:
    environment = HERE | {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": argument}
    options = TraceOptions.read(environment)
    assert options is not None
    assert options.sampler == sampler


def test_a_ratio_samples_the_low_half_of_a_trace_id() -> None:
    sampler = Sampler(0.25)
    assert [sampler.begins(low) for low in (0, 2**62 - 1, 2**62, 2**64 - 1)] == [True, True, False, False]
    assert sampler.begins(7 << 64)
    assert not Sampler(0.0).begins(0)
    assert Sampler(1.0).begins(2**128 - 1)


def test_of_two_endpoints_that_of_traces_counts_and_no_password_is_shown() -> None:
    own = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://user:secret@collector:4318/v1/traces?key=secret"}
    options = TraceOptions.read(HERE | own)
    assert options is not None
    assert options.endpoint == "https://collector:4318/v1/traces"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4318", "http://localhost:4318"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://[", "http://localhost:4318"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon", "number of seconds"),
        ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "0", "number of seconds"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd", "gzip"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp"),
        ("OTEL_TRACES_SAMPLER", "jaeger_remote", "parentbased_traceidratio"),
        ("OTEL_TRACES_SAMPLER_ARG", "1.5", "0 to 1"),
        ("OTEL_TRACES_SAMPLER_ARG", "nan", "0 to 1"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "0", "above 0"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "100", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
        ("OTEL_BSP_SCHEDULE_DELAY", "-1", "above 0"),
    ],
)
def test_what_cannot_be_done_is_named_with_its_remedy(name: str, value: str, remedy: str) -> None:
    sampler = {"OTEL_TRACES_SAMPLER": "traceidratio"} if name.endswith("_ARG") else {}
    with pytest.raises(StartError, match=name) as raised:
        TraceOptions.read(HERE | sampler | {name: value})
    assert remedy in str(raised.value)
