"""Options of vLLM behind the `--` of `cwg up`: passed on, refused, or part of the model's fingerprint."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gateway.cli import main
from gateway.stack import commands, engine_args, local, models, preflight
from gateway.stack.errors import StackError
from tests.support.launch_options import options
from tests.support.local_stack import plan_for

pytestmark = pytest.mark.local


def of(*arguments: str) -> local.LocalStack:
    return local.LocalStack(data_dir=Path("data"), engine_args=arguments)


def test_they_are_the_last_so_that_vllm_takes_them() -> None:
    argv = commands.engine_launch(plan_for(of("--tool-call-parser", "mistral", "-tp", "2"))).argv
    assert argv[-4:] == ("--tool-call-parser", "mistral", "-tp", "2")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--tensor-parallel-size", "2", "--quantization", "awq"),
        ("-tp", "2", "--dtype=half", "--gpu-memory-utilization", "0.8"),
        ("--model-impl", "transformers", "--seed", "-1", "--hf-overrides.rope_scaling.factor", "4"),
    ],
)
def test_options_that_the_stack_leaves_open_pass(arguments: tuple[str, ...]) -> None:
    engine_args.check(arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "1"], "option --port of vLLM cannot be given: give --engine-port before the `--`"),
        (["-tp", "2", "--max_model_len=9"], "option --max-model-len of vLLM .*: give --max-model-len before the `--`"),
        (["--kv-transfer-config.kv_role", "kv_both"], "option --kv-transfer-config of vLLM .*the gateway relies on it"),
        (["--kv-trans", "{}"], "option --kv-trans of vLLM .*the gateway relies on it"),
        (["--no-enable-prefix-caching"], "option --no-enable-prefix-caching of vLLM .*the gateway relies on it"),
        (["--kv-cache-memory-bytes", "1"], "give --engine-kv-gb before"),
        (["--api-key", "k"], "only the gateway talks to this vLLM"),
        (["--config", "vllm.yaml"], "write the options out"),
        (["half"], "unexpected argument 'half'; options of vLLM come after `--`"),
    ],
)
def test_what_the_stack_sets_itself_is_refused_with_a_remedy(arguments: list[str], said: str) -> None:
    with pytest.raises(StackError, match=said):
        engine_args.check(tuple(arguments))


def test_every_option_that_the_stack_sets_for_a_gpu_is_refused(tmp_path: Path) -> None:
    plan = plan_for(local.LocalStack(data_dir=tmp_path, engine_kv_gb=1), demo=None, on_cpu=False)
    ours = {name for name in options(commands.engine_launch(plan).argv) if name.startswith("--")}
    assert ours <= set(engine_args.REFUSED)


def test_memory_of_the_engine_is_set_on_a_gpu_only_if_asked_for(tmp_path: Path) -> None:
    for wanted in (None, 3.0):
        stack = local.LocalStack(data_dir=tmp_path, engine_kv_gb=wanted)
        argv = commands.engine_launch(plan_for(stack, demo=None, on_cpu=False)).argv
        assert ("--kv-cache-memory-bytes" in argv) == bool(wanted)


@pytest.mark.parametrize(
    ("one", "same"),
    [
        ("--dtype half --seed 1", "--seed 1 --dtype=half"),
        ("-q awq", "--quantization awq"),
        ("--kv_cache_dtype fp8", "--kv-cache-dtype=fp8"),
        ("--hf-overrides.rope.factor=4", "--hf-overrides.rope.factor 4"),
        ("", "-tp 2 --tool-call-parser hermes --max-num-seqs 8"),
    ],
)
def test_options_that_mean_the_same_kv_are_the_same_model(one: str, same: str) -> None:
    assert engine_args.kv_identity(tuple(one.split())) == engine_args.kv_identity(tuple(same.split()))


def test_options_with_other_kv_are_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    given = ["", "--dtype half", "--dtype float", "--kv-cache-dtype fp8", "--some-future-option"]
    identities = [engine_args.kv_identity(tuple(one.split())) for one in given]
    prints = {models.prepare(tmp_path / "data", str(tmp_path), None, one).fingerprint for one in identities}
    assert len(prints) == len(given)
    assert models.prepare(tmp_path / "data", str(tmp_path), None).fingerprint in prints


@pytest.mark.parametrize("option", ["--cpu-cache-gb", "--engine-kv-gb"])
@pytest.mark.parametrize("size", ["0", "-1", "much"])
def test_memory_of_no_size_is_refused(option: str, size: str) -> None:
    refused = CliRunner().invoke(main, ["up", option, size])
    assert (refused.exit_code, option in refused.output) == (2, True)


def test_the_command_line_names_the_double_dash() -> None:
    forgotten = CliRunner().invoke(main, ["up", "--tensor-parallel-size", "2"])
    assert forgotten.exit_code == 2
    assert "'--tensor-parallel-size'. Options of vLLM come after `--`" in forgotten.output
    refused = CliRunner().invoke(main, ["up", "--", "--port", "1"])
    assert (refused.exit_code, refused.output) == (
        1,
        "error: option --port of vLLM cannot be given: give --engine-port before the `--`\n",
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("port = 1", "`cwg up` sets port itself; give --port instead"),
        ("kv_dir = '/kv'", "`cwg up` sets kv_dir itself; take it out"),
        ("auto_freez = true", "unknown setting 'auto_freez'; did you mean 'auto_freeze'"),
        ("port =", "is not TOML"),
    ],
)
def test_a_settings_file_that_cannot_be_used_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(content)
    with pytest.raises(StackError, match=said) as refused:
        preflight.check_settings(file, {})
    assert str(file) in str(refused.value)


def test_a_settings_file_reaches_the_gateway(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text("api_key = 'k'\nlog_level = 'debug'\n")
    assert preflight.check_settings(file, {}).api_key == "k"
    launch = commands.gateway_launch(plan_for(local.LocalStack(data_dir=tmp_path, config=file)))
    assert launch.argv[-2:] == ("--config", str(file))
    assert "--config" not in commands.gateway_launch(plan_for(local.LocalStack(data_dir=tmp_path))).argv


def test_what_cwg_up_sets_is_not_taken_from_a_file(tmp_path: Path) -> None:
    """The environment, by which the stack tells the gateway, would win over a file without a word."""
    plan = replace(plan_for(local.LocalStack(data_dir=tmp_path, redis_url="redis://h")), s3_port=1)
    launch = commands.gateway_launch(plan)
    told = {name.removeprefix("CWG_").lower() for name in launch.env if name.startswith("CWG_")}
    assert {*told, "chunk_size", "engines"} == set(preflight.OWN_SETTINGS)


def test_engines_of_others_are_not_taken_from_the_environment() -> None:
    with pytest.raises(StackError, match="CWG_ENGINES: `cwg up` starts its own engine"):
        preflight.check_settings(None, {"CWG_ENGINES": '[{"url": "http://a", "cache_url": "http://b"}]'})
